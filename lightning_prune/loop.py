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
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy
from torch import nn
from torch.optim import Optimizer

from lightning_prune.averages import rebind_swa_
from lightning_prune.batches import Example, inputs_of, one_sample, recalibrate_, tracked_norms
from lightning_prune.processes import average_, gathered, shared

__all__ = ["before_loading", "first_sample", "forward_context", "rebuild_wrapper_", "target_of"]


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise ValueError unless ``value`` is among ``choices``."""
    if value not in choices:
        raise ValueError(f"{name} must be {' or '.join(map(repr, choices))}, got {value!r}")


def check_strategy(trainer: L.Trainer) -> None:
    """Raise NotImplementedError where parameters do not lie whole on every device."""
    whole = isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy)
    if not whole or isinstance(trainer.strategy, DeepSpeedStrategy):  # which is a DDPStrategy by name only
        name = type(trainer.strategy).__name__
        raise NotImplementedError(
            f'{name} spreads or wraps parameters in a way that cannot be cut; use Trainer(strategy="ddp")'
        )


def check_batches(trainer: L.Trainer) -> None:
    """Raise ValueError where processes have different numbers of training batches: Lightning would wait for ever."""
    numbers = gathered(trainer.num_training_batches)
    if len(set(numbers)) > 1:
        raise ValueError(
            f"the ranks have {', '.join(map(str, numbers))} training batches, and Lightning's ranks wait for each "
            f"other at every batch; set Trainer(limit_train_batches={min(numbers)})"
        )


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
    loader, device = trainer.train_dataloader, next(target.parameters()).device
    for number, batch in enumerate(loader if loader is not None else ()):
        if number >= trainer.num_training_batches:
            break
        moved = trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(batch), device)
        if (example := inputs_of(moved, target.forward)) is not None:
            yield example


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


def is_last_epoch(trainer: L.Trainer) -> bool:
    """Whether no training follows the current epoch."""
    return trainer.max_epochs is not None and 0 <= trainer.max_epochs <= trainer.current_epoch + 1


def fresh_optimizers_(trainer: L.Trainer) -> None:
    """Optimizers and schedulers anew, as the module configures them, with what callbacks have done to them since."""
    before, schedules = trainer.optimizers, trainer.lr_scheduler_configs
    trainer.strategy.setup_optimizers(trainer)
    for old, fresh in zip(before, trainer.optimizers, strict=True):
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
