"""What Lightning's loop needs around a cut: inputs, wrappers, checkpoints (level 4)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from functools import partial
from itertools import islice
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from torch import nn
from torch.optim import Optimizer

from lightning_prune.averages import averages, rebind_swa_
from lightning_prune.batches import Example, inputs_of, one_sample, recalibrate_, switched, tracked_norms
from lightning_prune.feeding import train_batches
from lightning_prune.graph import ChannelGraph
from lightning_prune.limits import DenseSizes
from lightning_prune.policy import Rules
from lightning_prune.processes import average_, gathered, shared
from lightning_prune.record import PruningRecord
from lightning_prune.saving import check_weights, has_shapes_of, part_of, shrink_

__all__ = ["before_loading", "first_sample", "forward_context", "rebuild_wrapper_", "target_of"]


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise ValueError unless ``value`` is among ``choices``."""
    if value not in choices:
        raise ValueError(f"{name} must be {' or '.join(map(repr, choices))}, got {value!r}")


def dense_sizes(rules: Rules, graph: ChannelGraph, target: nn.Module) -> DenseSizes:
    """The sizes of a network that was not cut yet; warn if limits may stop pruning before its budget is met.

    Raises:
        ValueError: ``rules`` make no sense for this network.
    """
    rules.check(graph)
    foreseen = rules.foreseen(graph, target)
    if not foreseen.reached:
        rank_zero_warn(f"the limits may stop pruning above the budget: {foreseen}")
    return DenseSizes.of(graph)


def shrink_all_(
    trainer: L.Trainer, pl_module: L.LightningModule, saved: Mapping[str, Any], weights: Mapping[str, Any]
) -> PruningRecord:
    """Cut the network, and its averages, to the record of a checkpoint before the weights arrive."""
    record, submodule = PruningRecord.from_dict(saved["record"]), saved["submodule"]
    copies, target = averages(trainer, pl_module), part_of(pl_module, submodule or "")
    if not has_shapes_of(target, record):
        check_weights(pl_module, target, record, weights, strict=False)
    shrink_(target, record)
    for copy in copies:
        shrink_(copy.module, copy.part(record, submodule))
    return record


@rank_zero_only
def say(trainer: L.Trainer, line: str) -> None:
    """Print a line, past the progress bar."""
    bar = trainer.progress_bar_callback
    shown = bar is not None and getattr(bar, "is_enabled", True)
    (bar.print if bar is not None and shown else print)(line)


def target_of(pl_module: L.LightningModule, submodule: str | None) -> nn.Module:
    """The module to prune.

    Raises:
        ValueError: there is no submodule of that name.
    """
    if submodule is None:
        return pl_module
    found = dict(pl_module.named_modules())
    if submodule not in found:
        near = get_close_matches(submodule, found, n=3, cutoff=0.4) or list(found)[1:4]
        raise ValueError(f"no submodule {submodule!r}; did you mean {' or '.join(map(repr, near))}?")
    return found[submodule]


def first_sample(batch: Any, target: nn.Module) -> Example:
    """One sample of a training batch, as the example input; in all processes that of the first one.

    Raises:
        ValueError: the batch holds no tensor.
    """
    example = inputs_of(batch, target.forward)
    if example is None:
        raise ValueError(
            f"no example input: a training batch of type {type(batch).__name__} holds no tensor to take; set "
            "example_input_array of the LightningModule"
        )
    return shared(move_data_to_device(one_sample(example), torch.device("cpu")))


def train_inputs(trainer: L.Trainer, target: nn.Module) -> Iterator[Example]:
    """The inputs of one pass over the training data, on the device, as training sees them."""
    for batch in train_batches(trainer, next(target.parameters()).device):
        if (example := inputs_of(batch, target.forward)) is not None:
            yield example


def observe(trainer: L.Trainer, target: nn.Module) -> None:
    """A pass over the training data in eval mode, for whoever watches ``target``."""
    with torch.no_grad(), switched(target, lambda module: False), forward_context(trainer):
        for args, kwargs in train_inputs(trainer, target):
            target(*args, **kwargs)


@contextmanager
def forward_context(trainer: L.Trainer) -> Iterator[None]:
    """The precision that training runs in, without compiled code, which hooks cannot see into."""
    with trainer.precision_plugin.forward_context(), torch.compiler.set_stance("force_eager"):
        yield


def renew_norms_(trainer: L.Trainer, networks: Sequence[nn.Module], number: int) -> None:
    """:func:`~lightning_prune.batches.recalibrate_` on ``number`` batches of every process, as one estimate."""
    number = min(
        gathered(int(min(number, trainer.num_training_batches)))
    )  # synchronised norms wait for each other
    for network in networks:
        with forward_context(trainer):
            used = recalibrate_(network, islice(train_inputs(trainer, network), number))
        for norm in tracked_norms(network):
            for buffer in (norm.get_buffer("running_mean"), norm.get_buffer("running_var")):
                average_(buffer, used)


def is_compiled(pl_module: L.LightningModule) -> bool:
    """Whether ``torch.compile`` was applied to the module or a part of it."""
    return pl_module._compiler_ctx is not None or any(
        type(module).__name__ == "OptimizedModule" or module._compiled_call_impl is not None
        for module in pl_module.modules()
    )


def is_last_epoch(trainer: L.Trainer, epoch: int) -> bool:
    """Whether no training follows ``epoch``: not always the current one, a resumed run may still owe a cut."""
    return trainer.max_epochs is not None and 0 <= trainer.max_epochs <= epoch + 1


def fresh_optimizers_(trainer: L.Trainer, added: bool = True) -> None:
    """Optimizers and schedulers anew, as the module configures them.

    Args:
        trainer: whose they are.
        added: with the parameter groups that callbacks have added since.

    Raises:
        ValueError: there are more or fewer optimizers than before.
    """
    before, schedules = trainer.optimizers, trainer.lr_scheduler_configs
    trainer.strategy.setup_optimizers(trainer)
    if len(before) != len(trainer.optimizers):
        raise ValueError(
            f"{len(trainer.optimizers)} optimizers were built, training began with {len(before)}"
        )
    for old, fresh in zip(before, trainer.optimizers, strict=True) if added else ():
        _add_groups_(fresh, old.param_groups[len(fresh.param_groups) :])
    rebind_swa_(trainer, schedules)


def _add_groups_(optimizer: Optimizer, groups: Sequence[dict[str, Any]]) -> None:
    """Parameter groups that a callback added, when it unfroze them, get back their own learning rate."""
    for group in groups:
        added = {id(parameter) for parameter in group["params"]}
        for own in optimizer.param_groups:
            own["params"] = [parameter for parameter in own["params"] if id(parameter) not in added]
        optimizer.add_param_group(dict(group))


def rebuild_wrapper_(trainer: L.Trainer) -> None:
    """DistributedDataParallel remembers the old shapes: wrap the smaller module anew, same arguments."""
    if isinstance(trainer.strategy, DDPStrategy):
        trainer.strategy.model = trainer.lightning_module
        trainer.strategy._pl_static_graph_delay_done = False  # of a static graph's first backward, by hand
        trainer.strategy.configure_ddp()


def before_loading(pl_module: L.LightningModule, first: Callable[[dict[str, Any]], None] | None) -> None:
    """Have ``first(checkpoint)`` called before the module's own ``on_load_checkpoint``; None takes it back.

    Of a callback's hooks, those for loading come only after the weights are in.
    """
    pl_module.__dict__.pop("on_load_checkpoint", None)
    if first is None:
        return
    own = pl_module.on_load_checkpoint

    def on_load_checkpoint(checkpoint: dict[str, Any]) -> None:
        first(checkpoint)
        own(checkpoint)

    pl_module.on_load_checkpoint = on_load_checkpoint  # type: ignore[method-assign]


def carry_along(pl_module: L.LightningModule, extra: Mapping[str, Any]) -> None:
    """Have checkpoints of the module hold ``extra``, also those with weights only, and those after training.

    Lightning calls no hook of a callback for these.
    """
    saved = vars(pl_module).get("on_save_checkpoint")
    own = saved.args[0] if isinstance(saved, partial) else pl_module.on_save_checkpoint
    pl_module.on_save_checkpoint = partial(_save_along, own, dict(extra))  # type: ignore[method-assign]


def _save_along(
    own: Callable[[dict[str, Any]], None], extra: Mapping[str, Any], checkpoint: dict[str, Any]
) -> None:
    for name, value in extra.items():
        checkpoint.setdefault(name, value)
    own(checkpoint)
