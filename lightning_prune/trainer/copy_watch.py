"""Find out whether a module that resembles the pruned network is kept up to date with it by hand."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_prune.utils.hashing import batch_digest

__all__ = ["CopyWatch"]


class CopyWatch:
    """Watches modules that have the structure of the pruned network, until its first cut.

    A frozen teacher for distillation does not change, and a second network that is trained gets gradients: both are
    left alone. A module that changes again and again without gradients is a copy that follows the network, and its
    update would fail after the first cut.

    Args:
        copies: name of each module -> name of the part of the pruned network that it resembles.
        pl_module: holds both.
        optimizers: those of the training.
    """

    def __init__(
        self, copies: Mapping[str, str], pl_module: L.LightningModule, optimizers: Sequence[Optimizer]
    ) -> None:
        self.copies = dict(copies)
        self._modules = {name: pl_module.get_submodule(name) for name in copies}
        trained = {id(p) for optimizer in optimizers for p in _parameters(optimizer) if p.requires_grad}
        self._may_be_trained = {name for name in copies if self._has_any(name, trained)}
        self._digests: dict[str, str] = {}
        self._changes: Counter[str] = Counter()
        self._warned: set[str] = set()
        self._batches = 0

    def warn_at_start(self) -> None:
        """Warn of modules that no optimizer trains and that are not frozen in eval mode either."""
        for name, module in self._modules.items():
            is_frozen = not any(p.requires_grad for p in module.parameters())
            if name not in self._may_be_trained and not (is_frozen and not module.training):
                self._warn(name)

    def on_step(self, optimizer: Optimizer) -> None:
        """Stop watching modules that ``optimizer`` is about to change by gradients."""
        if not self.copies:
            return
        stepped = {id(parameter) for parameter in _parameters(optimizer) if parameter.grad is not None}
        for name in [name for name in self.copies if self._has_any(name, stepped)]:
            del self.copies[name]

    def on_batch_end(self) -> None:
        """Compare parameters after the batches 1, 2, 4, 8, ..., so that long trainings are not slowed down."""
        self._batches += 1
        if self._batches & (self._batches - 1) == 0:
            self.check()

    def check(self) -> None:
        """Compare parameters with those of the last check; warn at the first change of a module.

        Raises:
            ValueError: a module has changed for the second time, and no optimizer can have done it.
        """
        for name, original in self.copies.items():
            digest = batch_digest(list(self._modules[name].parameters()))
            self._changes[name] += self._digests.setdefault(name, digest) != digest
            self._digests[name] = digest
            if self._changes[name] > 1 and name not in self._may_be_trained:
                raise ValueError(
                    f"{name!r} has the structure of {original!r} and is updated without gradients, so it seems to "
                    f"follow it; its update would fail once {original!r} is cut. {_advice(name)}"
                )
            if self._changes[name]:
                self._warn(name)

    def explain(self, error: BaseException) -> None:
        """Add a note to an error after a cut that was perhaps caused by a module which was not cut along."""
        for name, original in self.copies.items():
            error.add_note(
                f"{name!r} had the structure of {original!r} before this was pruned. If the error comes from the "
                f"update of {name!r}: {_advice(name)}"
            )

    def _has_any(self, name: str, parameters: set[int]) -> bool:
        return any(id(parameter) in parameters for parameter in self._modules[name].parameters())

    def _warn(self, name: str) -> None:
        if name not in self._warned:
            self._warned.add(name)
            rank_zero_warn(
                f"{name!r} has the structure of {self.copies[name]!r}, which will be pruned. {_advice(name)}"
            )


def _parameters(optimizer: Optimizer) -> Iterable[Tensor]:
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


def _advice(name: str) -> str:
    return (
        f"Set followers=[{name!r}] of the pruning callback if it follows that network (mean teacher, momentum "
        "encoder), so that it is cut along; or define on_after_prune(record) in the module; or set followers=[] to "
        "leave it as it is"
    )
