"""A LightningModule without its trainer: how candidates of it are trained and judged anywhere (level 4).

Candidates call its ``training_step`` and ``validation_step`` by hand; what these log is collected by name. Their
optimizers are made as the trainer's own, from class and groups. A distillation is left out: candidates learn from
the task.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves
from torchmetrics import Metric

from lightning_prune.callbacks.candidate_trainer import CandidateTrainer, LoggedValues
from lightning_prune.netadapt.candidate import CandidateContext
from lightning_prune.netadapt.workers import Workers, packed, rehearse
from lightning_prune.pruning.session import PruningSession
from lightning_prune.pruning.training import Training, on_device
from lightning_prune.trainer.batches import IndexedBatch
from lightning_prune.trainer.step_outputs import step_loss
from lightning_prune.utils.modules import switched

__all__ = ["ModuleHost", "OptimizerFactory", "ValidationMetric", "rehearse_candidate", "training_from_trainer", "with_default_device"]

PATCHED = ("on_load_checkpoint", "on_save_checkpoint", "log")


def detached_copy(module: nn.Module, without: nn.Module | None = None) -> Any:
    """A copy that knows no trainer and no hooks of callbacks; an empty module in the place of ``without``."""
    bare = copy.copy(module)
    for name in PATCHED:
        bare.__dict__.pop(name, None)
    memo = _cut_off(module)
    if without is not None:
        memo[id(without)] = nn.Identity()
    if hasattr(module, "distillation"):
        bare.__dict__["distillation"] = None
    return copy.deepcopy(bare, memo)


def _cut_off(module: nn.Module) -> dict[int, Any]:
    """A memo for ``deepcopy``: tensors that modules keep together with the graph they come from, without it."""
    kept = (x for each in module.modules() for x in tree_leaves(list(vars(each).values())))
    return {id(x): x.detach().clone() for x in kept if isinstance(x, Tensor) and x.grad_fn is not None}


class ModuleHost:
    """A LightningModule with an empty place, which takes candidates.

    Args:
        pl_module: copied, but for the network.
        submodule: qualified name of the network; None: it is the whole.
        trainer: what stands in for it.
    """

    def __init__(
        self, pl_module: L.LightningModule, submodule: str | None, trainer: CandidateTrainer
    ) -> None:
        self.submodule, self.trainer = submodule, trainer
        self.rest = detached_copy(pl_module, pl_module.get_submodule(submodule)) if submodule else None

    def holding(self, net: nn.Module, training: bool = True) -> Any:
        """The LightningModule with ``net`` in it, on the device of ``net``."""
        module = self._whole(net)
        self.trainer.training = training
        module.trainer = self.trainer
        return module

    def _whole(self, net: nn.Module) -> Any:
        if self.submodule is None:
            return net
        parent, _, name = self.submodule.rpartition(".")
        setattr(self.rest.get_submodule(parent), name, net)  # type: ignore[union-attr]
        return self.rest.to(next(net.parameters()).device)  # type: ignore[union-attr]


@dataclass(frozen=True)
class CandidateLoss:
    """The loss of a training step."""

    shell: ModuleHost
    autocast: torch.dtype | None = None

    def __call__(self, net: nn.Module, batch: Any) -> Tensor | None:
        """Of one batch; None: the module skips it."""
        module = self.shell.holding(net)
        module.log = _ignore
        given = (
            (batch, 0)
            if is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)
            else (batch,)
        )
        device = next(net.parameters()).device.type
        with torch.autocast(device, self.autocast, enabled=self.autocast is not None):
            return step_loss(module.training_step(*given))


@dataclass(frozen=True)
class GradientClipper:
    """What the module does to gradients before a step."""

    shell: ModuleHost

    def __call__(self, net: nn.Module, optimizer: Optimizer) -> None:
        """Clip them as the trainer was told to, or as the module does."""
        trainer = self.shell.trainer
        self.shell.holding(net).configure_gradient_clipping(
            optimizer, trainer.gradient_clip_val, trainer.gradient_clip_algorithm
        )


@dataclass(frozen=True)
class ValidationMetric:
    """One of the metrics that ``validation_step`` and ``on_validation_epoch_end`` log, over given batches."""

    shell: ModuleHost
    batches: Sequence[IndexedBatch]
    metric: str

    def __call__(self, net: nn.Module) -> float:
        """The metric of a network."""
        module, logged = self.shell.holding(net, training=False), LoggedValues()
        module.log = logged
        device = next(net.parameters()).device
        for metric in module.modules():
            if isinstance(metric, Metric):
                metric.reset()
        with torch.no_grad(), switched(module, lambda each: False):
            module.on_validation_epoch_start()
            for batch, index, loader in self.batches:
                logged.size, logged.loader = _size(batch), loader
                module.validation_step(on_device(batch, device), *_numbers(module, index, loader))
            logged.size, logged.loader = 1, None
            module.on_validation_epoch_end()
        return logged.value(self.metric)


def _size(batch: Any) -> int:
    """Of a batch, as Lightning weights what is logged."""
    sizes = (len(x) for x in tree_leaves(batch) if isinstance(x, Tensor) and x.dim())
    return next(sizes, 1)


def _numbers(module: Any, index: int, loader: int | None) -> tuple[int, ...]:
    """Of batch and loader, as far as ``validation_step`` takes them."""
    takes = len(inspect.signature(module.validation_step).parameters)
    return (index, loader or 0)[: max(takes - 1, 0)]


def _ignore(*args: Any, **kwargs: Any) -> None:
    """What candidates log is nobody's business."""


class OptimizerFactory:
    """Makes optimizers of candidates like one of the whole LightningModule: same class, groups and options."""

    def __init__(self, optimizer: Optimizer, pl_module: L.LightningModule, shell: ModuleHost) -> None:
        names = {id(parameter): name for name, parameter in pl_module.named_parameters()}
        if not all(id(p) in names for group in optimizer.param_groups for p in group["params"]):
            raise ValueError(
                "the optimizer holds parameters that are not the LightningModule's, so that candidates cannot have "
                "one like it: register what owns them as a submodule"
            )
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


def training_from_trainer(
    trainer: L.Trainer,
    submodule: str | None,
    batches: Sequence[Any],
    held_out: Sequence[IndexedBatch],
    metric: str,
    higher_is_better: bool,
) -> Training:
    """How candidates of the trainer's network are trained, with an optimizer like the trainer's, and judged."""
    pl_module = trainer.lightning_module
    shell = ModuleHost(pl_module, submodule, CandidateTrainer(trainer))
    autocast = torch.bfloat16 if str(trainer.precision) == "bf16-mixed" else None
    if str(trainer.precision) == "16-mixed":
        rank_zero_warn("candidates are trained in 32 bits: 16-mixed would need a scaler of its own for each")
    clips = trainer.gradient_clip_val or is_overridden("configure_gradient_clipping", pl_module)
    return Training(
        batches,
        CandidateLoss(shell, autocast),
        ValidationMetric(shell, held_out, metric),
        OptimizerFactory(trainer.optimizers[0], pl_module, shell),
        higher_is_better,
        trainer.accumulate_grad_batches,
        GradientClipper(shell) if clips else None,
    )


def with_default_device(given: Workers, trainer: L.Trainer) -> Workers:
    """As given; on the trainer's GPU if no devices were."""
    device = trainer.strategy.root_device
    if given.devices or device.type == "cpu":
        return given
    return replace(given, n_jobs=given.number, devices=[str(device)])


def rehearse_candidate(run: PruningSession, training: Callable[[], Training], workers: Workers) -> None:
    """Train and judge one copy of the network, which nobody keeps; random states stay as they were.

    Raises:
        ValueError: the metric is not logged.
        RuntimeError: something that candidates cannot do, with what it is.
    """
    cpu = torch.device("cpu")
    try:
        shared = CandidateContext(
            detached_copy(run.target).to(cpu), on_device(run.example, cpu), training(), None, 1
        )
        rehearse(packed(shared), workers.device(0))
    except (ValueError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise RuntimeError(
            "candidates are copies of the LightningModule that are trained and judged without the trainer, and a "
            f"first one fails: {type(error).__name__}: {error}. Leave that out of training_step and "
            "validation_step, or use lightning_prune.netadapt.run.search with a loss of your own"
        ) from error
