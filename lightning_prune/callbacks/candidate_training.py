"""Train and validate candidates of a LightningModule without its trainer, in any process.

Candidates are copies of the network. Each is put into a copy of the module, whose ``training_step`` and
``validation_step`` are called directly; what they log is collected by name. Optimizers of candidates have the class
and the parameter groups of the trainer's optimizer. Distillation is switched off: candidates are trained on the loss
of the task alone.
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
from lightning_prune.netadapt.workers import Workers, pack_context, rehearse
from lightning_prune.pruning.session import PruningSession
from lightning_prune.pruning.training import Training
from lightning_prune.trainer.batches import IndexedBatch
from lightning_prune.trainer.step_outputs import step_loss
from lightning_prune.utils.example_inputs import batched_tensors, on_device
from lightning_prune.utils.modules import declared, training_modes

__all__ = [
    "ModuleHost",
    "OptimizerFactory",
    "ValidationMetric",
    "rehearse_candidate",
    "training_from_trainer",
    "with_default_device",
]

#: methods that callbacks or this module replace on an instance
REPLACED_METHODS = ("on_load_checkpoint", "on_save_checkpoint", "log")


def detached_copy(module: nn.Module, without: nn.Module | None = None) -> Any:
    """Return a deep copy without trainer, without hooks of callbacks and without the graphs of kept tensors.

    Args:
        module: to copy.
        without: a submodule that is not copied; an ``nn.Identity`` takes its place.
    """
    shallow = copy.copy(module)
    for name in REPLACED_METHODS:
        shallow.__dict__.pop(name, None)
    memo = _detached_tensors(module)
    if without is not None:
        memo[id(without)] = nn.Identity()
    if declared(module, "distillation") is not None:
        shallow.__dict__["distillation"] = None  # the teacher is not copied to every worker
    return copy.deepcopy(shallow, memo)


def _detached_tensors(module: nn.Module) -> dict[int, Any]:
    """Return a memo for ``deepcopy``, which cannot copy tensors that have a graph: id -> copy without the graph."""
    attributes = (x for part in module.modules() for x in tree_leaves(list(vars(part).values())))
    return {id(x): x.detach().clone() for x in attributes if isinstance(x, Tensor) and x.grad_fn is not None}


class ModuleHost:
    """A copy of a LightningModule in which candidates take the place of the network.

    Args:
        pl_module: is copied without the network.
        submodule: qualified name of the network; None: the network is the whole module, and nothing is copied.
        trainer: the trainer that the steps of the module see.
    """

    def __init__(
        self, pl_module: L.LightningModule, submodule: str | None, trainer: CandidateTrainer
    ) -> None:
        self.submodule, self.trainer = submodule, trainer
        self.rest = detached_copy(pl_module, pl_module.get_submodule(submodule)) if submodule else None

    def with_network(self, net: nn.Module, training: bool = True) -> Any:
        """Return the LightningModule with ``net`` in it, on the device of ``net``."""
        module = self._assemble(net)
        self.trainer.training = training
        module.trainer = self.trainer
        return module

    def _assemble(self, net: nn.Module) -> Any:
        if self.submodule is None:
            return net
        parent, _, name = self.submodule.rpartition(".")
        setattr(self.rest.get_submodule(parent), name, net)  # type: ignore[union-attr]
        return self.rest.to(next(net.parameters()).device)  # type: ignore[union-attr]


@dataclass(frozen=True)
class CandidateLoss:
    """The loss of the module's ``training_step``, as a function of a network and a batch."""

    host: ModuleHost
    autocast: torch.dtype | None = None

    def __call__(self, net: nn.Module, batch: Any) -> Tensor | None:
        """Return the loss of one batch; None if the module skips it."""
        module = self.host.with_network(net)
        module.log = _ignore
        takes_index = is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)
        arguments = (batch, 0) if takes_index else (batch,)
        device = next(net.parameters()).device.type
        with torch.autocast(device, self.autocast, enabled=self.autocast is not None):
            return step_loss(module.training_step(*arguments))


@dataclass(frozen=True)
class GradientClipper:
    """The module's ``configure_gradient_clipping``, as a function of a network and its optimizer."""

    host: ModuleHost

    def __call__(self, net: nn.Module, optimizer: Optimizer) -> None:
        """Clip gradients by the settings of the trainer, or as the module overrides it."""
        trainer = self.host.trainer
        self.host.with_network(net).configure_gradient_clipping(
            optimizer, trainer.gradient_clip_val, trainer.gradient_clip_algorithm
        )


@dataclass(frozen=True)
class ValidationMetric:
    """A metric that ``validation_step`` or ``on_validation_epoch_end`` logs, as a function of a network.

    Attributes:
        host: holds the network while it is validated.
        batches: the validation data.
        metric: name of the metric.
    """

    host: ModuleHost
    batches: Sequence[IndexedBatch]
    metric: str

    def __call__(self, net: nn.Module) -> float:
        """Return the metric of a network, over all batches.

        Raises:
            ValueError: the metric is not logged.
        """
        module, logged = self.host.with_network(net, training=False), LoggedValues()
        module.log = logged
        device = next(net.parameters()).device
        for part in module.modules():
            if isinstance(part, Metric):
                part.reset()
        with torch.no_grad(), training_modes(module, lambda part: False):
            module.on_validation_epoch_start()
            for batch, index, loader in self.batches:
                logged.size, logged.loader = _batch_size(batch), loader
                module.validation_step(on_device(batch, device), *_indices(module, index, loader))
            logged.size, logged.loader = 1, None
            module.on_validation_epoch_end()
        return logged.value(self.metric)


def _batch_size(batch: Any) -> int:
    """Return the length of the first tensor, by which Lightning weights logged values."""
    return next(map(len, batched_tensors(batch)), 1)


def _indices(module: Any, index: int, loader: int | None) -> tuple[int, ...]:
    """Return the indices of batch and loader, as many of them as ``validation_step`` takes."""
    number = len(inspect.signature(module.validation_step).parameters)
    return (index, loader or 0)[: max(number - 1, 0)]


def _ignore(*args: Any, **kwargs: Any) -> None:
    """Discard what a training step logs."""


class OptimizerFactory:
    """Makes optimizers of candidates with the class, groups and options of the LightningModule's optimizer.

    Args:
        optimizer: of the LightningModule.
        pl_module: holds the parameters of the optimizer.
        host: holds a candidate.

    Raises:
        ValueError: the optimizer has parameters that are not the module's.
    """

    def __init__(self, optimizer: Optimizer, pl_module: L.LightningModule, host: ModuleHost) -> None:
        names = {id(parameter): name for name, parameter in pl_module.named_parameters()}
        if not all(id(p) in names for group in optimizer.param_groups for p in group["params"]):
            raise ValueError(
                "the optimizer holds parameters that are not the LightningModule's, so that candidates cannot have "
                "one like it: register what owns them as a submodule"
            )
        self.kind, self.host = type(optimizer), host
        self.groups = [
            ([names[id(p)] for p in group["params"]], {k: v for k, v in group.items() if k != "params"})
            for group in optimizer.param_groups
        ]

    def __call__(self, net: nn.Module) -> Optimizer:
        """Return the optimizer of a candidate."""
        parameters = dict(self.host.with_network(net).named_parameters())
        groups = [
            {**options, "params": [parameters[name] for name in names]} for names, options in self.groups
        ]
        return self.kind(groups)  # type: ignore[call-arg]


def training_from_trainer(
    trainer: L.Trainer,
    submodule: str | None,
    batches: Sequence[Any],
    held_out: Sequence[IndexedBatch],
    metric: str,
    higher_is_better: bool,
) -> Training:
    """Return how candidates of the trainer's network are trained and validated: as the trainer does it.

    Args:
        trainer: its module, optimizer, precision, accumulation and clipping are copied.
        submodule: qualified name of the network in the module; None: the whole.
        batches: to train candidates on.
        held_out: batches to validate candidates on.
        metric: name of a metric that the validation logs.
        higher_is_better: whether a higher metric is better.
    """
    pl_module = trainer.lightning_module
    host = ModuleHost(pl_module, submodule, CandidateTrainer(trainer))
    autocast = torch.bfloat16 if str(trainer.precision) == "bf16-mixed" else None
    if str(trainer.precision) == "16-mixed":
        rank_zero_warn(
            "candidates are trained in 32 bits: 16-mixed would need a gradient scaler for each of them"
        )
    clips = trainer.gradient_clip_val or is_overridden("configure_gradient_clipping", pl_module)
    return Training(
        batches,
        CandidateLoss(host, autocast),
        ValidationMetric(host, held_out, metric),
        OptimizerFactory(trainer.optimizers[0], pl_module, host),
        higher_is_better,
        trainer.accumulate_grad_batches,
        GradientClipper(host) if clips else None,
    )


def with_default_device(workers: Workers, trainer: L.Trainer) -> Workers:
    """Return the workers, on the trainer's GPU if they name no devices."""
    device = trainer.strategy.root_device
    if workers.devices or device.type == "cpu":
        return workers
    return replace(workers, n_jobs=workers.number, devices=[str(device)])


def rehearse_candidate(session: PruningSession, training: Callable[[], Training], workers: Workers) -> None:
    """Train and validate one copy of the network and discard it, to report errors early.

    The states of random generators do not change.

    Raises:
        ValueError: the metric is not logged.
        RuntimeError: a candidate cannot be trained or validated; the message says why.
    """
    cpu = torch.device("cpu")
    try:
        context = CandidateContext(
            detached_copy(session.target).to(cpu), on_device(session.example, cpu), training(), None, 1
        )
        rehearse(pack_context(context), workers.device(0))
    except (ValueError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise RuntimeError(
            "candidates are copies of the LightningModule that are trained and validated without the trainer, and "
            f"the first one fails: {type(error).__name__}: {error}. Leave that out of training_step and "
            "validation_step, or use lightning_prune.netadapt.search with a loss of your own"
        ) from error
