"""Collect targets of a repair: outputs of the dense layers at the filters that a cut leaves, and of the network."""

from __future__ import annotations

import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.compensation.activations import ActivationWatch, Interval
from lightning_prune.compensation.calibration import (
    Calibration,
    CompensationError,
    CompensationSettings,
    calibration,
    outputs_of,
    undisturbed,
)
from lightning_prune.compensation.calls import LayerCall, observed_calls
from lightning_prune.compensation.im2col import (
    ImageAxis,
    Positions,
    image_axis,
    output_rows,
    position_shape,
    sample,
)
from lightning_prune.compensation.layers import Kept, Layer, find_layers, kept_filters, num_kept_inputs
from lightning_prune.compensation.sums import Summand, SumWatch
from lightning_prune.compensation.target_records import CallTargets, SampledRows, Targets, compute_dtype
from lightning_prune.compensation.value_watch import ValueWatch
from lightning_prune.utils.batch_norm import scale_and_shift, tracked_norms
from lightning_prune.utils.distributed import from_first
from lightning_prune.utils.seeding import derive_seed

__all__ = ["collect_targets"]

_LAST_CALLS = 4  # a norm is looked for behind so many layers, for branches that are computed side by side


def collect_targets(
    model: nn.Module, kept: Kept, batches: Sequence[Any], settings: CompensationSettings | None = None
) -> Targets:
    """Run the dense network once, before a cut, and keep what its layers give at the filters that will survive.

    In a distributed run every process must call this; only the first one runs the network, and the targets of the
    others stay empty.

    Args:
        model: the dense network; it is left unchanged.
        kept: tensor -> dimension -> indices that survive, as a :class:`~lightning_prune.PruningRecord` has them.
        batches: batches without labels, or with labels, which are ignored; they are joined to one. The first
            dimension of the first input counts the images.
        settings: how much is looked at.

    Raises:
        CompensationError: the batches cannot be used.

    Example:
        >>> import copy
        >>> from lightning_prune import prune_, trace
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 1))
        >>> images = torch.rand(8, 3, 16, 16)
        >>> small = copy.deepcopy(net)
        >>> graph = trace(small, images[:1])
        >>> record = prune_(small, graph, graph.layers["0.weight"][:4])
        >>> collect_targets(net, record.kept, [images]).calls["0"][0].fit.rows.shape[1]  # the filters that remain
        4
    """
    targets = Targets(settings or CompensationSettings())
    from_first(lambda: _collect(targets, model, kept, batches))
    return targets


def _collect(targets: Targets, model: nn.Module, kept: Kept, batches: Sequence[Any]) -> None:
    """Fill ``targets``."""
    images = calibration(model, batches, targets.settings)
    layers, left_alone = find_layers(model)
    targets.num_images, targets.left_alone = images.num_images, left_alone
    collector = _Collector(targets, kept, images)
    with (
        undisturbed(model),
        collector.values,
        _observed_norms(model, collector),
        collector.sums.watching(model),
        collector.activations.watching(model),
        observed_calls(model, layers, collector.observe),
    ):
        outputs = outputs_of(model, images)
    if not all(output.isfinite().all() for output in outputs):
        raise CompensationError("the network's outputs on the images for repairing a cut are not finite")
    collector.finish(layers, outputs)


#: Layer, number of its call, and whether the inputs of the call are unchanged.
_Pending = tuple[Layer, int, Callable[[], bool]]


class _Collector:
    """Samples the outputs of layers, and finds out which norm reads which output."""

    def __init__(self, targets: Targets, kept: Kept, images: Calibration) -> None:
        self.targets, self.kept, self.images = targets, kept, images
        self.last: deque[tuple[Layer, int, weakref.ref[Tensor]]] = deque(maxlen=_LAST_CALLS)
        self.sources: dict[str, list[tuple[Layer, int] | None]] = {}  # of each norm's calls
        self.sums: SumWatch[_Pending] = SumWatch(self._keep_sum)
        self.activations: ActivationWatch[tuple[Layer, int]] = ActivationWatch()
        self.values = ValueWatch()

    def observe(self, call: LayerCall) -> bool:
        """Keep sampled rows of one call."""
        reason = self._keep(call)
        if reason is not None:
            self.targets.left_alone[call.layer.name] = reason
        return False

    def _keep_sum(self, summand: Summand[_Pending], output: Tensor, other: Tensor) -> None:
        """Keep rows of a sum that reads a layer's output."""
        layer, call, are_unchanged = summand.payload
        if not are_unchanged():
            return
        calls = self.targets.calls[layer.name]
        filters = kept_filters(layer, self.kept)
        fit, held = (
            SampledRows(rows.positions, _rows(layer, output + other, rows.positions, filters))
            for rows in (calls[call].fit, calls[call].held)
        )
        calls[call] = replace(calls[call], sums=(fit, held))

    def _keep(self, call: LayerCall) -> str | None:
        """Keep rows of a call, or say why that is impossible."""
        layer, output = call.layer, call.output
        if self.values.has_value_size(output):
            return "the number of its inputs depends on values"
        shape = position_shape(layer, output)
        axis = image_axis(shape, self.images.num_images) if shape else None
        if shape is None or axis is None:
            return "its output has no dimension of images"
        filters = kept_filters(layer, self.kept)
        width = max(num_kept_inputs(layer, self.kept), output.shape[-1 if layer.is_linear else 1])
        number = self.targets.settings.num_positions(width)
        if not number:
            return f"too large, with {width} inputs"
        calls = self.targets.calls.setdefault(layer.name, [])
        share = max(1, number // (len(calls) + 1))  # of at most so many rows, whatever the number of calls
        fit, held = self._sampled(layer, len(calls), output, shape, axis, filters, share)
        if not (fit.rows.isfinite().all() and held.rows.isfinite().all()):
            return "its outputs are not finite"
        self.last.append((layer, len(calls), weakref.ref(output)))
        if self.targets.settings.sums:
            self.sums.expect(output, (layer, len(calls), call.watch_inputs()))
        if self.targets.settings.activations:
            self.activations.expect(output, (layer, len(calls)))
        self.values.on_layer(output, (layer.name, len(calls)))
        calls.append(CallTargets(shape, fit, held))
        return None

    def _sampled(
        self,
        layer: Layer,
        call: int,
        output: Tensor,
        shape: torch.Size,
        axis: ImageAxis,
        filters: Tensor | None,
        number: int,
    ) -> Iterator[SampledRows]:
        """Yield rows of the images for the fit, and of those held out."""
        generator = torch.Generator().manual_seed(derive_seed(layer.name, call))
        num_fit, num_images = self.images.num_fit, self.images.num_images
        for images, count in (((0, num_fit), number), ((num_fit, num_images), max(1, number // 4))):
            positions = sample(shape, axis, images, count, generator)
            yield SampledRows(positions, _rows(layer, output, positions, filters))

    def observe_norm(self, name: str, norm: nn.Module, args: Any) -> None:
        """Remember which layer's output a norm reads."""
        sources = [(layer, call) for layer, call, output in self.last if args and output() is args[0]]
        self.sources.setdefault(name, []).append(sources[-1] if sources else None)

    def finish(self, layers: Sequence[Layer], outputs: Sequence[Tensor]) -> None:
        """Drop what cannot be used, set the norms, and share the positions among the calls of a weight."""
        self.targets.outputs = [output for output in outputs if not self.values.has_value_size(output)]
        calls, left_alone = self.targets.calls, self.targets.left_alone
        unusable = {layer.key for layer in layers if layer.name in left_alone}
        self._set_norms()
        self._set_slack()
        number = Counter(layer.key for layer in layers for _ in calls.get(layer.name, ()))
        for layer in layers:
            if layer.key in unusable:
                calls.pop(layer.name, None)
                left_alone.setdefault(layer.name, "another call of its weight cannot be used")
            elif layer.name not in calls:
                left_alone[layer.name] = "it did not run"
            elif number[layer.key] > 1:
                calls[layer.name] = _shared(calls[layer.name], number[layer.key])
        if len(self.targets.outputs) < len(outputs):
            self.targets.judges = [key for key in self.values.last_comparable if key[0] in calls]

    def _set_norms(self) -> None:
        """Name the norm behind each call, if all that it ever reads is this weight's."""
        for name, sources in self.sources.items():
            keys = {source and source[0].key for source in sources}
            if len(keys) == 1 and None not in keys:
                for source in sources:
                    assert source is not None
                    calls = self.targets.calls[source[0].name]
                    calls[source[1]] = replace(calls[source[1]], norm=name)

    def _set_slack(self) -> None:
        """Give targets the slack of the activations behind them."""
        for chain in self.activations.chains:
            layer, number = chain.payload
            if chain.interval is None or chain.is_broken or layer.name not in self.targets.calls:
                continue
            calls = self.targets.calls[layer.name]
            call = calls[number]
            if chain.in_sum == (call.sums is None):  # the sum corrects another layer
                continue
            rows = call.sums or (call.fit, call.held)
            norm = None if chain.in_sum else chain.norm
            ends = _ends(chain.interval, norm, rows[0].rows, kept_filters(layer, self.kept))
            fit, held = (each.with_slack(*ends) for each in rows)
            calls[number] = (
                replace(call, sums=(fit, held)) if call.sums else replace(call, fit=fit, held=held)
            )


def _ends(
    interval: Interval, norm: nn.Module | None, rows: Tensor, filters: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return an activation's interval before the norm that it reads, and the sign of the norm's scale, per filter."""
    if norm is None:
        one = rows.new_ones(rows.shape[1])
        return interval[0] * one, interval[1] * one, one
    scale, shift = (each.to(rows.dtype) for each in scale_and_shift(norm))
    if filters is not None:
        scale, shift = scale[filters.to(scale.device)], shift[filters.to(scale.device)]
    lower, upper = ((end - shift) / scale for end in interval)
    return lower, upper, torch.where(lower.isfinite(), scale.sign(), 0)


def _rows(layer: Layer, output: Tensor, positions: Positions, filters: Tensor | None) -> Tensor:
    """Return the surviving channels of an output of the dense network at some positions."""
    rows = output_rows(layer, output, positions, compute_dtype(layer.weight))
    return rows if filters is None else rows[:, filters.to(rows.device)]


def _shared(calls: Sequence[CallTargets], number: int) -> list[CallTargets]:
    """Return calls with their share of the positions, among ``number`` calls of a weight."""
    fit, held = (max(1, len(rows.rows) // number) for rows in (calls[0].fit, calls[0].held))
    # Calls of one weight are fitted together as they come, not when their sums come.
    return [replace(call, fit=call.fit.first(fit), held=call.held.first(held), sums=None) for call in calls]


@contextmanager
def _observed_norms(model: nn.Module, collector: _Collector) -> Iterator[None]:
    names = {id(module): name for name, module in model.named_modules()}
    with ExitStack() as hooks:
        for norm in tracked_norms(model):
            observe = partial(collector.observe_norm, names[id(norm)])
            hooks.callback(norm.register_forward_pre_hook(observe).remove)
        yield
