"""Operators in ONNX Runtime: one small model for each, with any number of channels.

A convolution and the activation right after it form one piece, and a norm between them forms none: ONNX Runtime folds
both into the convolution. On a processor it converts tensors to a blocked layout before a convolution and back after
it. Within a network most of these conversions are not needed between two convolutions, so they are left out of the
time of a piece.
"""

from __future__ import annotations

import io
import json
import statistics
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_unflatten

from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.latency.operator_template import Operator, Size, Slot
from lightning_prune.latency.operators import operators
from lightning_prune.latency.timing import TimedCall
from lightning_prune.tracing.operator_sets import CONVOLUTIONS, EVAL_BATCH_NORMS

__all__ = ["OnnxOperator", "empty_session", "node_times", "onnx_network", "onnx_operators"]

CHANNEL_ALIGNMENT = 4  # ONNX Runtime uses the blocked layout for multiples of this many channels
FUSED_ACTIVATIONS = (
    "relu", "relu_", "clamp", "clamp_", "hardtanh", "hardtanh_", "leaky_relu", "leaky_relu_", "sigmoid", "sigmoid_",
    "tanh", "hardsigmoid", "hardsigmoid_", "hardswish", "hardswish_", "silu", "silu_",
)  # fmt: skip
PROFILED_RUNS = 12


class _OperatorModule(nn.Module):
    """A module that applies one operator to its inputs, and then the activations fused with it."""

    def __init__(self, operator: OnnxOperator) -> None:
        super().__init__()
        self.operator = operator

    def forward(self, *tensors: Tensor) -> Any:
        """Return the results of the operator."""
        inputs = iter(tensors)
        operator = self.operator
        leaves = [next(inputs) if isinstance(leaf, Slot) else _dense_size(leaf) for leaf in operator.leaves]
        args, kwargs = tree_unflatten(leaves, operator.spec)
        result = operator.op(*_without_scales(operator, args), **kwargs)
        for activation in operator.activations:
            leaves = [result if isinstance(leaf, Slot) else _dense_size(leaf) for leaf in activation.leaves]
            args, kwargs = tree_unflatten(leaves, activation.spec)
            result = activation.op(*args, **kwargs)
        return result


def _without_scales(operator: Operator, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the arguments of an interpolation without scales, which torch cannot export beside the output size."""
    if not operator.op._opname.startswith("upsample_"):
        return args
    return tuple(None if isinstance(argument, float) else argument for argument in args)


def _dense_size(leaf: Any) -> Any:
    return leaf.dense if isinstance(leaf, Size) else leaf


@dataclass(eq=False)
class OnnxOperator(Operator):
    """An operator that ONNX Runtime runs. It is exported once; then the shapes in its model are changed.

    Attributes:
        activations: that are fused with it.
    """

    activations: list[Operator] = field(default_factory=list)

    @cached_property
    def signature(self) -> str:
        """Operator, arguments and fused activations as text, without the numbers of channels."""
        parts = [f"{self.op.name()}({', '.join(map(str, self.leaves))})"]
        for activation in self.activations:
            constants = [leaf for leaf in activation.leaves if not isinstance(leaf, (Slot, Size))]
            parts.append(f"{activation.op.name()}{constants}")
        return " ".join(parts)

    @property
    def multiples(self) -> tuple[int, ...]:
        """For each axis 4 if it holds the input channels of a convolution, otherwise 1.

        With other numbers of channels ONNX Runtime does not use the blocked layout. A depthwise convolution then
        takes up to ten times as long (onnxruntime/core/optimizer/nchwc_transformer.cc, ``channel_alignment``).
        """
        channels: int | Size = 0
        if self.op._opname in CONVOLUTIONS and len(self.slots[1].sizes) == 4:
            transposed = tree_unflatten(self.leaves, self.spec)[0][6]
            channels = 0 if transposed else self.slots[0].sizes[-3]
        channel_axes = channels.axes if isinstance(channels, Size) else ()
        return tuple(CHANNEL_ALIGNMENT if axis in channel_axes else 1 for axis in range(len(self.factors)))

    def make_call(self, counts: Sequence[int], device: torch.device) -> TimedCall:
        """Return a call that runs it once with ``counts`` channels along each axis."""
        return session_call(*self.build_model(counts), device)

    def own_share(self, counts: Sequence[int], device: torch.device) -> float:
        """Return the share of its time without conversions of layout, by ONNX Runtime's profiler."""
        if device.type != "cpu" or self.op._opname not in CONVOLUTIONS:
            return 1.0
        times = node_times(*self.build_model(counts))
        own_time = sum(time for kind, time in times if not kind.startswith("Reorder"))
        return own_time / sum(time for _, time in times)

    def build_model(self, counts: Sequence[int]) -> tuple[bytes, list[Tensor]]:
        """Return the ONNX model with ``counts`` channels along each axis, and random inputs.

        Parameters become constants of the model, so that ONNX Runtime can prepare them once.
        """
        import onnx
        from onnx import numpy_helper

        model = onnx.ModelProto()
        model.ParseFromString(self._exported)
        if any(slot.dtype != torch.float32 for slot in self.slots):
            raise NotImplementedError("only float32 is measured in ONNX Runtime")
        shapes = [[self.size(size, counts) for size in slot.sizes] for slot in self.slots]
        inputs = {value.name: value for value in model.graph.input}
        del model.graph.value_info[:]
        for number, (slot, shape) in enumerate(zip(self.slots, shapes, strict=True)):
            if (value := inputs.get(f"s{number}")) is None:
                continue
            if slot.is_parameter:
                constant = np.random.default_rng(0).random(shape, dtype=np.float32) + 1
                model.graph.initializer.append(numpy_helper.from_array(constant, value.name))
                model.graph.input.remove(value)
            else:
                for dim, size in zip(value.type.tensor_type.shape.dim, shape, strict=True):
                    dim.dim_value = size
        for output in model.graph.output:
            output.type.tensor_type.ClearField("shape")
        self._set_groups(model, counts)
        dims = [[dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in model.graph.input]
        return model.SerializeToString(), [torch.rand(shape) for shape in dims]

    def _set_groups(self, model: Any, counts: Sequence[int]) -> None:
        args = tree_unflatten(self.leaves, self.spec)[0]
        if self.op._opname in CONVOLUTIONS and isinstance(args[8], Size):
            for node in model.graph.node:
                for attribute in node.attribute:
                    if attribute.name == "group":
                        attribute.i = self.size(args[8], counts)

    @cached_property
    def _exported(self) -> bytes:
        """The ONNX model with the dense channel counts; its inputs are named s0, s1, ..."""
        shapes = [[self.size(size, self.dense_counts) for size in slot.sizes] for slot in self.slots]
        tensors = tuple(torch.rand(shape) for shape in shapes)
        return export_onnx(_OperatorModule(self), tensors, input_names=[f"s{n}" for n in range(len(tensors))])


def export_onnx(net: nn.Module, args: tuple[Tensor, ...], **options: Any) -> bytes:
    """Export a network to ONNX with torch's older exporter, which is faster: there are many small models."""
    buffer = io.BytesIO()
    with warnings.catch_warnings(), torch.no_grad(), torch.inference_mode(False):
        warnings.simplefilter("ignore")
        # New tensors: those made in inference mode cannot be exported.
        args = tuple(
            torch.rand(x.shape) if x.is_floating_point() else torch.zeros(x.shape, dtype=x.dtype)
            for x in args
        )
        torch.onnx.export(net, args, buffer, dynamo=False, verbose=False, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


def _session_options() -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    options.log_severity_level = 4
    return options


def node_times(model: bytes, inputs: Sequence[Tensor]) -> list[tuple[str, float]]:
    """Return kind and mean microseconds of each node that ONNX Runtime runs for a model, on a processor."""
    import onnxruntime

    options = _session_options()
    with tempfile.TemporaryDirectory() as folder:
        options.enable_profiling, options.profile_file_prefix = True, f"{folder}/profile"
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        values = zip(session.get_inputs(), inputs, strict=True)
        feed = {value.name: tensor.numpy() for value, tensor in values}
        for _ in range(PROFILED_RUNS):
            session.run(None, feed)
        events = json.loads(Path(session.end_profiling()).read_text())
    times: dict[tuple[str, str], list[float]] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            # The profiler rounds down to whole microseconds: add half of one.
            times.setdefault((event["name"], event["args"]["op_name"]), []).append(event["dur"] + 0.5)
    # Without the slowest quarter, which holds the first runs.
    fast = PROFILED_RUNS * 3 // 4
    return [(kind, statistics.fmean(sorted(samples)[:fast])) for (_, kind), samples in times.items()]


def session_call(model: bytes, inputs: Sequence[Tensor], device: torch.device) -> TimedCall:
    """Return a call that runs a model once, without copies of inputs and outputs.

    Raises:
        ValueError: this ONNX Runtime does not run on the device.
    """
    import onnxruntime

    provider = f"{'CUDA' if device.type == 'cuda' else 'CPU'}ExecutionProvider"
    if provider not in onnxruntime.get_available_providers():
        raise ValueError(
            f"this onnxruntime has no {provider} and cannot run on {device}: install onnxruntime-gpu, or measure on "
            "the processor with device='cpu'"
        )
    session = onnxruntime.InferenceSession(model, _session_options(), providers=[provider])
    binding = session.io_binding()
    for value, tensor in zip(session.get_inputs(), inputs, strict=True):
        ort_value = onnxruntime.OrtValue.ortvalue_from_numpy(tensor.numpy(), device.type, device.index or 0)
        binding.bind_ortvalue_input(value.name, ort_value)
    for output in session.get_outputs():
        binding.bind_output(output.name, device.type, device.index or 0)
    return partial(session.run_with_iobinding, binding)


def onnx_network(net: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], threads: int) -> TimedCall:
    """Export a network and return a call that runs it once."""
    tensors = [leaf for leaf in tree_leaves((args, dict(kwargs))) if isinstance(leaf, Tensor)]
    device = tensors[0].device
    model = export_onnx(net.cpu(), tuple(tensors))
    return session_call(model, [tensor.cpu() for tensor in tensors], device)


def empty_session(device: torch.device) -> TimedCall:
    """Return a call of a session without any work: a network is one call, but each of its pieces is one too."""
    zero = torch.zeros(1)
    return session_call(export_onnx(nn.ReLU(), (zero,)), [zero], device)


def onnx_operators(graph: ChannelGraph) -> list[OnnxOperator]:
    """Return the operators of a network, each with the activations that ONNX Runtime fuses with it."""
    convolution_of: dict[int, OnnxOperator] = {}  # id of an operator -> the convolution that it is fused with
    pieces = []
    for operator in operators(graph):
        name, convolution = operator.op._opname, convolution_of.get(id(operator.source))
        if convolution is not None and (name in EVAL_BATCH_NORMS or name in FUSED_ACTIVATIONS):
            convolution.activations += [operator] if name in FUSED_ACTIVATIONS else []
            convolution_of[id(operator)] = convolution
            continue
        pieces.append(OnnxOperator(**{item.name: getattr(operator, item.name) for item in fields(operator)}))
        if name in CONVOLUTIONS:
            convolution_of[id(operator)] = pieces[-1]
    return pieces
