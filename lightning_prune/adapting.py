"""A LightningModule without its trainer: how candidates of it are trained and judged anywhere (level 4).

Candidates call its ``training_step`` and ``validation_step`` by hand; what these log is collected by name. Their
optimizers are made as the trainer's own, from class and groups. A distillation is left out: candidates learn from
the task.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics import Metric

from lightning_prune.batches import switched
from lightning_prune.candidates import Training, on_device
from lightning_prune.distillation import task_of
from lightning_prune.rounds import Round
from lightning_prune.tables import Table

__all__ = ["Judge", "Like", "Shell", "drawn", "rounds_table", "training_of"]

PATCHED = ("on_load_checkpoint", "on_save_checkpoint", "log")


def detached(module: nn.Module, without: nn.Module | None = None) -> Any:
    """A copy that knows no trainer and no hooks of callbacks; an empty module in the place of ``without``."""
    bare = copy.copy(module)
    for name in PATCHED:
        bare.__dict__.pop(name, None)
    memo: dict[int, Any] = {} if without is None else {id(without): nn.Identity()}
    if hasattr(module, "distillation"):
        bare.__dict__["distillation"] = None
    return copy.deepcopy(bare, memo)


class Shell:
    """A LightningModule with an empty place, which takes candidates.

    Args:
        pl_module: copied, but for the network.
        submodule: qualified name of the network; None: it is the whole.
    """

    def __init__(self, pl_module: L.LightningModule, submodule: str | None) -> None:
        self.submodule = submodule
        self.rest = detached(pl_module, pl_module.get_submodule(submodule)) if submodule else None

    def holding(self, net: nn.Module) -> Any:
        """The LightningModule with ``net`` in it, on the device of ``net``."""
        if self.submodule is None:
            return net
        parent, _, name = self.submodule.rpartition(".")
        setattr(self.rest.get_submodule(parent), name, net)  # type: ignore[union-attr]
        return self.rest.to(next(net.parameters()).device)  # type: ignore[union-attr]


@dataclass(frozen=True)
class Loss:
    """The loss of a training step."""

    shell: Shell
    autocast: torch.dtype | None = None

    def __call__(self, net: nn.Module, batch: Any) -> Tensor:
        """Of one batch."""
        module = self.shell.holding(net)
        module.log = _ignore
        device = next(net.parameters()).device.type
        with torch.autocast(device, self.autocast, enabled=self.autocast is not None):
            loss = task_of(module.training_step(batch, 0))
        if loss is None:
            raise ValueError("training_step returned no loss for a batch of a candidate")
        return loss


@dataclass(frozen=True)
class Judge:
    """One of the metrics that ``validation_step`` and ``on_validation_epoch_end`` log, over given batches."""

    shell: Shell
    batches: Sequence[Any]
    metric: str

    def __call__(self, net: nn.Module) -> float:
        """The metric of a network."""
        module, logged = self.shell.holding(net), Logged()
        module.log = logged
        device = next(net.parameters()).device
        with torch.no_grad(), switched(module, lambda each: False):
            module.on_validation_epoch_start()
            for index, batch in enumerate(self.batches):
                module.validation_step(on_device(batch, device), index)
            module.on_validation_epoch_end()
        return logged.value(self.metric)


class Logged:
    """Takes the place of ``LightningModule.log``: means over the calls, weighted by ``batch_size`` if given.

    Example:
        >>> logged = Logged()
        >>> logged("loss", 1.0, batch_size=1), logged("loss", torch.tensor(4.0), batch_size=2)
        (None, None)
        >>> logged.value("loss")
        3.0
    """

    def __init__(self) -> None:
        self.sums: dict[str, tuple[float, float]] = {}
        self.metrics: dict[str, Metric] = {}

    def __call__(
        self, name: str, value: Any, *args: Any, batch_size: int | None = None, **kwargs: Any
    ) -> None:
        """Remember a value."""
        if isinstance(value, Metric):
            self.metrics[name] = value
            return
        weight = float(batch_size or 1)
        total, number = self.sums.get(name, (0.0, 0.0))
        self.sums[name] = total + weight * float(value), number + weight

    def value(self, name: str) -> float:
        """The mean of what was logged under a name.

        Raises:
            ValueError: nothing was.
        """
        if name in self.metrics:
            found = float(self.metrics[name].compute())
            self.metrics[name].reset()
            return found
        if name not in self.sums:
            known = ", ".join([*self.sums, *self.metrics]) or "nothing"
            raise ValueError(f"validation logs no {name!r}, but {known}: set metric= to one of them")
        total, number = self.sums[name]
        return total / number


def _ignore(*args: Any, **kwargs: Any) -> None:
    """What candidates log is nobody's business."""


class Like:
    """Makes optimizers of candidates like one of the whole LightningModule: same class, groups and options."""

    def __init__(self, optimizer: Optimizer, pl_module: L.LightningModule, shell: Shell) -> None:
        names = {id(parameter): name for name, parameter in pl_module.named_parameters()}
        self.kind, self.shell = type(optimizer), shell
        self.groups = [
            ([names[id(p)] for p in group["params"]], {k: v for k, v in group.items() if k != "params"})
            for group in optimizer.param_groups
        ]

    def __call__(self, net: nn.Module) -> Optimizer:
        """The optimizer of a candidate."""
        known = dict(self.shell.holding(net).named_parameters())
        groups = [{**options, "params": [known[name] for name in names]} for names, options in self.groups]
        return self.kind(groups)  # type: ignore[call-arg]


def training_of(
    trainer: L.Trainer,
    pl_module: L.LightningModule,
    submodule: str | None,
    batches: Sequence[Any],
    held_out: Sequence[Any],
    metric: str,
    higher_is_better: bool,
) -> Training:
    """How candidates of the network in ``pl_module`` are trained, with the trainer's optimizer, and judged."""
    shell = Shell(pl_module, submodule)
    autocast = torch.bfloat16 if str(trainer.precision) == "bf16-mixed" else None
    if str(trainer.precision) == "16-mixed":
        rank_zero_warn("candidates are trained in 32 bits: 16-mixed would need a scaler of its own for each")
    return Training(
        batches,
        Loss(shell, autocast),
        Judge(shell, held_out, metric),
        Like(trainer.optimizers[0], pl_module, shell),
        higher_is_better,
    )


def drawn(trainer: L.Trainer, loader: Any, number: int | None = None) -> list[Any]:
    """The first ``number`` batches of a loader on the CPU, as the trainer would hand them to a step; None: all."""
    plugin, cpu = trainer.precision_plugin, torch.device("cpu")
    found = islice(iter(loader), number)
    return [trainer.strategy.batch_to_device(plugin.convert_input(batch), cpu) for batch in found]


def rounds_table(rounds: Sequence[Round], resource: str) -> Table:
    """What each round did.

    Example:
        >>> first = Round(1, "decoder", 0.8, 0.79, {"decoder": 0.79}, {"macs": 90}, {"macs": 0.9}, 4, 10, 1.5)
        >>> print(rounds_table([first], "macs").markdown())
        | round | block   | candidates | metric before |  after |  macs | seconds |
        | :---- | :------ | ---------: | ------------: | -----: | ----: | ------: |
        | 1     | decoder |          1 |        0.8000 | 0.7900 | 90.0% |     1.5 |
    """
    rows = [
        (
            str(each.number),
            each.block,
            str(len(each.metrics)),
            f"{each.before:.4f}",
            f"{each.after:.4f}",
            f"{each.share[resource]:.1%}",
            f"{each.seconds:.1f}",
        )
        for each in rounds
    ]
    return Table(
        ("round", "block", "candidates", "metric before", "after", resource, "seconds"), rows, left=2
    )
