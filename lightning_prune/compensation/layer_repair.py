"""Repair layers while the network runs, so that each sees the inputs that its repaired predecessors give."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_prune.compensation.calls import LayerCall
from lightning_prune.compensation.fit import CallRows, Fit, fit, refit, squared
from lightning_prune.compensation.im2col import columns, output_rows, position_shape
from lightning_prune.compensation.layers import Layer
from lightning_prune.compensation.report import LayerRepair
from lightning_prune.compensation.sums import Summand, SumWatch
from lightning_prune.compensation.target_records import CallTargets, SampledRows, Targets, compute_dtype
from lightning_prune.utils.precision import exact_products

__all__ = ["LayerRepairer"]

_NEGLIGIBLE = 1e-10  # squared residual, as a share of the targets' variance, below which a layer stays
_SMALLEST_FACTOR = (
    0.05  # of a norm, as a share of its largest; behind smaller ones, a layer does not correct a sum
)


@dataclass
class _Weight:
    """A weight under repair, with all layers that read it.

    Attributes:
        layers: that read it.
        original: its value after the cut.
        rows: (layer, number of the call) -> what was seen there.
    """

    layers: list[Layer]
    original: Tensor
    rows: dict[tuple[str, int], CallRows] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.layers[0].name


class LayerRepairer:
    """Fits each weight after each call of a layer that reads it, to all calls so far.

    Args:
        targets: of the dense network.
        model: the smaller network.

    Attributes:
        layers: repair of each weight, by the name of its first layer.
        left_alone: layer -> why it was not repaired.
        names: the parameters and buffers that were changed at some time.
        not_refined: why the layers were not refined together; empty if they were, or if nobody wanted it.
    """

    def __init__(self, targets: Targets, model: nn.Module) -> None:
        self.targets = targets
        self.modules = dict(model.named_modules())
        self.layers: dict[str, LayerRepair] = {}
        self.left_alone = dict(targets.left_alone)
        self.names: set[str] = set()
        self.not_refined = ""
        self._weights: dict[tuple[str, int | None], _Weight] = {}
        self._calls: Counter[str] = Counter()
        self._refits = False
        self.sums: SumWatch[LayerCall] = SumWatch(self._fit_to_sum)
        self._values: dict[
            str, tuple[Tensor, Tensor, Tensor]
        ] = {}  # tensor, value after the cut, present value

    @property
    def changed(self) -> bool:
        """Whether a layer was changed."""
        return any(layer.changed for layer in self.layers.values())

    def prepare(self, layers: Sequence[Layer]) -> bool:
        """Take the layers that may be repaired; return whether a weight is read by several calls."""
        for layer in layers:
            if layer.key in self._weights:
                self._weights[layer.key].layers.append(layer)
            else:
                self._weights[layer.key] = _Weight([layer], layer.weight_data().clone())
        calls = [sum(len(self.targets.calls[each.name]) for each in w.layers) for w in self._weights.values()]
        return any(number > 1 for number in calls)

    def start_forward(self, refits: bool) -> None:
        """Start with the first call of every layer; ``refits``: fit to all images with the dampings chosen so far."""
        self._calls.clear()
        self._refits = refits

    def observe(self, call: LayerCall) -> bool:
        """Fit the weight of a layer that was just called; return whether its output is out of date now.

        A layer whose output only a sum reads is fitted when the sum comes.
        """
        layer, output = call.layer, call.output
        number, calls = self._calls[layer.name], self.targets.calls[layer.name]
        self._calls[layer.name] += 1
        weight = self._weights[layer.key]
        reason = _mismatch(layer, calls, number, output)
        if reason is not None:
            self.left_alone[layer.name] = reason
            return self._reset(weight)
        if any(each.name in self.left_alone for each in weight.layers):
            return False
        target = calls[number]
        if target.sums is not None:
            self.sums.expect(output, call)
            return False
        return self._fit(call, number, (target.fit, target.held))

    def _fit(self, call: LayerCall, number: int, wanted: tuple[SampledRows, SampledRows]) -> bool:
        """Fit a layer so that a call gives the rows that are wanted; return whether it changed."""
        layer, weight, x = call.layer, self._weights[call.layer.key], call.read()
        target = self.targets.calls[layer.name][number]
        with torch.autocast(x.device.type, enabled=False), exact_products():
            weight.rows[layer.name, number] = self._rows(layer, weight, target, x, wanted)
            return self._repair(weight)

    def _fit_to_sum(self, summand: Summand[LayerCall], output: Tensor, other: Tensor) -> None:
        """Fit a layer so that a sum comes nearer to that of the dense network, and update what the sum reads."""
        call = summand.payload
        layer = call.layer
        target = self.targets.calls[layer.name][0]
        assert target.sums is not None
        scale = _scale(summand.norm, compute_dtype(layer.weight))
        rows = []
        for dense in target.sums:
            present, total = (
                output_rows(layer, x, dense.positions, dense.rows.dtype)
                for x in (call.output, output + other)
            )
            slack = None if dense.slack is None else dense.slack * scale
            rows.append(SampledRows(dense.positions, present + (dense.rows - total) * scale, slack))
        if self._fit(call, 0, (rows[0], rows[1])):
            again = call.rerun()
            output.copy_(again if summand.norm is None else summand.norm.forward(again))

    def _rows(
        self,
        layer: Layer,
        weight: _Weight,
        target: CallTargets,
        x: Tensor,
        wanted: tuple[SampledRows, SampledRows],
    ) -> CallRows:
        """Compute what the weight after the cut lacks in this call, for the outputs that are wanted."""
        dtype = compute_dtype(layer.weight)
        slot, bias = self._slot(layer, target.norm), self._bias(layer)
        matrix = layer.matrix(weight.original.to(dtype))

        def seen(sampled: SampledRows) -> tuple[Tensor, Tensor, Tensor | None]:
            inputs = columns(layer, x, sampled.positions, dtype)
            rows = sampled.rows if bias is None else sampled.rows - bias.to(dtype)
            slack = None if sampled.slack is None else layer.in_groups(sampled.slack)
            return inputs, layer.in_groups(rows) - inputs @ matrix, slack

        held_rows = target.held.rows
        variance = float((held_rows - held_rows.mean(0)).double().square().sum())
        if len(held_rows) == 1:  # no variance within one row
            variance = float(held_rows.double().square().sum())
        fit_rows, held = map(seen, wanted)
        return CallRows(slot, *fit_rows[:2], *held[:2], variance, fit_rows[2], held[2])

    def _slot(self, layer: Layer, norm: str | None) -> str | None:
        """Return the name of what takes a constant that is added to the layer's outputs."""
        if layer.bias is not None:
            frozen = layer.weight.requires_grad and not layer.bias.requires_grad
            return None if layer.bias_key is None or frozen else f"bias {layer.bias_key}"
        return None if norm is None else f"norm {norm}"

    def _bias(self, layer: Layer) -> Tensor | None:
        """Return the bias after the cut, before its repair."""
        entry = self._values.get(f"bias {layer.bias_key}")
        data = layer.bias_data() if entry is None else entry[1]
        return None if data is None else data.clone()

    def _repair(self, weight: _Weight) -> bool:
        """Fit a weight to its calls so far, and set it; return whether it changed."""
        calls = list(weight.rows.values())
        residual = sum(squared(call.residual, call.slack) for call in calls)
        scale = sum(call.variance * call.residual.shape[1] / call.held_residual.shape[1] for call in calls)
        if residual <= _NEGLIGIBLE * scale:
            return self._reset(weight)
        if self._refits:
            damping = self.layers[weight.name].damping if weight.name in self.layers else None
            return False if damping is None else self._set(weight, refit(calls, damping))
        result = fit(calls, self.targets.settings.dampings)
        self.layers[weight.name] = LayerRepair(result.before, result.after, result.damping)
        return self._reset(weight) if result.damping is None else self._set(weight, result)

    def _set(self, weight: _Weight, result: Fit) -> bool:
        assert result.change is not None
        assert result.constants is not None
        layer, original = weight.layers[0], weight.original
        self.names.add(layer.weight_name)
        changed = original.to(result.change.dtype) + layer.weight_of(result.change)
        self._write(f"weight {layer.key}", layer.weight_data(), changed)
        for slot, constant in result.constants.items():
            name, tensor = self._slot_tensor(weight, slot)
            self.names.add(name)
            before = self._values.get(slot, (tensor, tensor, tensor))[1].to(constant.dtype)
            self._write(slot, tensor, before - constant if slot.startswith("norm") else before + constant)
        return True

    def _slot_tensor(self, weight: _Weight, slot: str) -> tuple[str, Tensor]:
        """Return name and data of what takes a constant."""
        kind, _, name = slot.partition(" ")
        if kind == "norm":
            return f"{name}.running_mean", self.modules[name].get_buffer("running_mean")
        layer = next(layer for layer in weight.layers if layer.bias_key == name)
        data = layer.bias_data()
        assert data is not None
        assert layer.bias_name is not None
        return layer.bias_name, data

    def _write(self, name: str, tensor: Tensor, value: Tensor) -> None:
        """Set a tensor, and remember its value after the cut."""
        original = self._values[name][1] if name in self._values else tensor.clone()
        value = value.to(tensor.dtype)
        if not value.isfinite().all():
            value = original
        self._values[name] = (tensor, original, value)
        tensor.copy_(value)

    def _reset(self, weight: _Weight) -> bool:
        """Set a weight, and what takes its constants, to the values after the cut; return whether they differed."""
        names = {f"weight {weight.layers[0].key}", *(str(call.slot) for call in weight.rows.values())}
        entries = {name: self._values[name] for name in sorted(names) if name in self._values}
        for name, (tensor, original, _) in entries.items():
            self._write(name, tensor, original)
        return bool(entries)

    def write(self) -> None:
        """Set all changed tensors again, after a forward whose buffers were restored; name what was not fitted."""
        for weight in self._weights.values():
            for layer in weight.layers:
                if self._calls[layer.name] and (layer.name, 0) not in weight.rows:
                    self.left_alone.setdefault(
                        layer.name, "the sum that reads it in the dense network did not come"
                    )
        for tensor, _, value in self._values.values():
            tensor.data.copy_(value)

    def undo(self) -> None:
        """Set everything to its value after the cut."""
        for tensor, original, _ in self._values.values():
            tensor.data.copy_(original)

    def snapshot(self) -> Callable[[], None]:
        """Return a function that sets everything to its present value."""
        values = [(tensor, value) for tensor, _, value in self._values.values()]

        def restore() -> None:
            for tensor, value in values:
                tensor.data.copy_(value)

        return restore


def _scale(norm: nn.Module | None, dtype: torch.dtype) -> Tensor | float:
    """Return by how much an output must change for a change of one behind its norm; 0 where that is too much."""
    if norm is None:
        return 1.0
    assert isinstance(norm, _BatchNorm)
    assert norm.running_var is not None
    factor = (norm.running_var.to(dtype) + norm.eps).rsqrt()
    factor = factor if norm.weight is None else factor * norm.weight.to(dtype)
    return torch.where(factor.abs() > _SMALLEST_FACTOR * factor.abs().max(), 1 / factor, 0)


def _mismatch(layer: Layer, calls: Sequence[CallTargets], call: int, output: Tensor) -> str | None:
    """Return the reason why a call cannot be compared with that of the dense layer; None if it can."""
    if call >= len(calls):
        return "it is called more often than in the dense network"
    if position_shape(layer, output) != calls[call].shape:
        return "its output has another shape than in the dense network"
    if output.shape[-1 if layer.is_linear else 1] != calls[call].fit.rows.shape[1]:
        return "it has another number of filters than the record says"
    return None
