"""A network's operators as ONNX Runtime runs them: one small model each, with any number of channels (level 3).

A convolution and the activation right after it are one piece, and the norm between them is none: the runtime folds
them into it. On a processor it brings convolutions into a blocked layout, and reorders tensors on the way in and out;
within a network most of that falls away between one convolution and the next, so it is left out of a piece's time.
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

__all__ = ["OnnxOperator", "onnx_idle", "onnx_operators", "onnx_whole"]

ALIGNED = 4  # channels, in whole multiples of which ONNX Runtime brings a tensor into blocks
FUSED = (
    "relu",
    "relu_",
    "clamp",
    "clamp_",
    "hardtanh",
    "hardtanh_",
    "leaky_relu",
    "leaky_relu_",
    "sigmoid",
    "sigmoid_",
    "tanh",
    "hardsigmoid",
    "hardsigmoid_",
    "hardswish",
    "hardswish_",
    "silu",
    "silu_",
)
PROFILED = 12  # runs under the runtime's profiler, of which the first few do not count


class _Call(nn.Module):
    """One operator, whose tensors are its inputs, and what follows it."""

    def __init__(self, operator: OnnxOperator) -> None:
        super().__init__()
        self.operator = operator

    def forward(self, *tensors: Tensor) -> Any:
        """The operator's results."""
        given = iter(tensors)
        known = self.operator
        leaves = [next(given) if isinstance(leaf, Slot) else _dense(leaf) for leaf in known.leaves]
        args, kwargs = tree_unflatten(leaves, known.spec)
        found = known.op(*args, **kwargs)
        for each in known.after:
            leaves = [found if isinstance(leaf, Slot) else _dense(leaf) for leaf in each.leaves]
            args, kwargs = tree_unflatten(leaves, each.spec)
            found = each.op(*args, **kwargs)
        return found


def _plain(leaves: Sequence[Any]) -> list[Any]:
    return [leaf for leaf in leaves if not isinstance(leaf, (Slot, Size))]


def _dense(leaf: Any) -> Any:
    return leaf.dense if isinstance(leaf, Size) else leaf


@dataclass(eq=False)
class OnnxOperator(Operator):
    """An operator that is run by ONNX Runtime. It is exported once; then its model's shapes are changed.

    Attributes:
        after: activations that are run along with it.
    """

    after: list[Operator] = field(default_factory=list)

    @cached_property
    def signature(self) -> str:
        """What it is and what is run along, without how many channels there are."""
        own = f"{self.op.name()}({', '.join(map(str, self.leaves))})"
        return " ".join([own, *(f"{each.op.name()}{_plain(each.leaves)}" for each in self.after)])

    @property
    def multiples(self) -> tuple[int, ...]:
        """A convolution whose input channels are no multiple of four is run without the blocked layout.

        A depthwise one takes up to ten times as long then (onnxruntime/core/optimizer/nchwc_transformer.cc,
        ``channel_alignment``).
        """
        read: int | Size = 0
        if self.op._opname in CONVOLUTIONS and len(self.slots[1].sizes) == 4:
            args = tree_unflatten(self.leaves, self.spec)[0]
            read = 0 if args[6] else self.slots[0].sizes[-3]
        along = read.axes if isinstance(read, Size) else ()
        return tuple(ALIGNED if axis in along else 1 for axis in range(len(self.factors)))

    def run(self, counts: Sequence[int], device: torch.device) -> TimedCall:
        """What runs it once with ``counts`` channels along each axis."""
        return session(*self._model(counts), device)

    def share(self, counts: Sequence[int], device: torch.device) -> float:
        """Share of a run's time that is its own, by the runtime's profiler: without the reorders around it."""
        if device.type != "cpu" or self.op._opname not in CONVOLUTIONS:
            return 1.0
        times = profiled(*self._model(counts))
        own = sum(time for kind, time in times if not kind.startswith("Reorder"))
        return own / sum(time for _, time in times)

    def _model(self, counts: Sequence[int]) -> tuple[bytes, list[Tensor]]:
        """It with ``counts`` channels along each axis, and random inputs."""
        import onnx
        from onnx import numpy_helper

        model = onnx.ModelProto()
        model.ParseFromString(self._exported)
        if any(slot.dtype != torch.float32 for slot in self.slots):
            raise NotImplementedError("only float32 is measured in ONNX Runtime")
        shapes = [[self.size(size, counts) for size in slot.sizes] for slot in self.slots]
        inputs = {held.name: held for held in model.graph.input}
        del model.graph.value_info[:]
        for number, (slot, shape) in enumerate(zip(self.slots, shapes, strict=True)):
            if (held := inputs.get(f"s{number}")) is None:
                continue
            if slot.held:
                values = np.random.default_rng(0).random(shape, dtype=np.float32) + 1
                model.graph.initializer.append(numpy_helper.from_array(values, held.name))
                model.graph.input.remove(held)
            else:
                for dim, size in zip(held.type.tensor_type.shape.dim, shape, strict=True):
                    dim.dim_value = size
        for out in model.graph.output:
            out.type.tensor_type.ClearField("shape")
        self._set_groups(model, counts)
        given = [
            torch.rand([dim.dim_value for dim in held.type.tensor_type.shape.dim])
            for held in model.graph.input
        ]
        return model.SerializeToString(), given

    def _set_groups(self, model: Any, counts: Sequence[int]) -> None:
        args = tree_unflatten(self.leaves, self.spec)[0]
        if self.op._opname in CONVOLUTIONS and isinstance(args[8], Size):
            for node in model.graph.node:
                for attribute in node.attribute:
                    if attribute.name == "group":
                        attribute.i = self.size(args[8], counts)

    @property
    def _exported(self) -> bytes:
        held: bytes | None = vars(self).get("model")
        if held is None:
            shapes = [[self.size(size, self.most) for size in slot.sizes] for slot in self.slots]
            tensors = tuple(torch.rand(shape) for shape in shapes)
            names = [f"s{number}" for number in range(len(tensors))]
            held = vars(self)["model"] = exported(_Call(self), tensors, input_names=names)
        return held


def exported(net: nn.Module, args: tuple[Tensor, ...], **given: Any) -> bytes:
    """ONNX by the quicker of torch's exporters: many small models are made."""
    buffer = io.BytesIO()
    with warnings.catch_warnings(), torch.no_grad(), torch.inference_mode(False):
        warnings.simplefilter("ignore")
        args = tuple(
            torch.rand(x.shape) if x.is_floating_point() else torch.zeros(x.shape, dtype=x.dtype)
            for x in args
        )
        torch.onnx.export(net, args, buffer, dynamo=False, verbose=False, **given)  # type: ignore[arg-type]
    return buffer.getvalue()


def _options() -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    options.log_severity_level = 4
    return options


def profiled(model: bytes, given: Sequence[Tensor]) -> list[tuple[str, float]]:
    """Kind and mean microseconds of each node that ONNX Runtime makes of a model, on a processor."""
    import onnxruntime

    options = _options()
    with tempfile.TemporaryDirectory() as folder:
        options.enable_profiling, options.profile_file_prefix = True, f"{folder}/profile"
        made = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        inputs = {held.name: tensor.numpy() for held, tensor in zip(made.get_inputs(), given, strict=True)}
        for _ in range(PROFILED):
            made.run(None, inputs)
        events = json.loads(Path(made.end_profiling()).read_text())
    times: dict[tuple[str, str], list[float]] = {}
    for each in events:
        if each.get("cat") == "Node" and each["name"].endswith("_kernel_time"):
            # whole microseconds, rounded down
            times.setdefault((each["name"], each["args"]["op_name"]), []).append(each["dur"] + 0.5)
    return [(kind, statistics.fmean(sorted(each)[: PROFILED * 3 // 4])) for (_, kind), each in times.items()]


def session(model: bytes, given: Sequence[Tensor], device: torch.device) -> TimedCall:
    """What runs a model once, without copies of inputs and outputs."""
    import onnxruntime

    kind = "CUDA" if device.type == "cuda" else "CPU"
    made = onnxruntime.InferenceSession(model, _options(), providers=[f"{kind}ExecutionProvider"])
    binding = made.io_binding()
    for held, tensor in zip(made.get_inputs(), given, strict=True):
        value = onnxruntime.OrtValue.ortvalue_from_numpy(tensor.numpy(), device.type, device.index or 0)
        binding.bind_ortvalue_input(held.name, value)
    for out in made.get_outputs():
        binding.bind_output(out.name, device.type, device.index or 0)
    return partial(made.run_with_iobinding, binding)


def onnx_whole(net: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], threads: int) -> TimedCall:
    """What runs a whole network once."""
    tensors = [leaf for leaf in tree_leaves((args, dict(kwargs))) if isinstance(leaf, Tensor)]
    device = tensors[0].device
    model = exported(net.cpu(), tuple(tensors))
    return session(model, [tensor.cpu() for tensor in tensors], device)


def onnx_idle(device: torch.device) -> TimedCall:
    """What calls a session that has nothing to do: a network is called once, its pieces once each."""
    one = torch.zeros(1)
    return session(exported(nn.ReLU(), (one,)), [one], device)


def onnx_operators(graph: ChannelGraph) -> list[OnnxOperator]:
    """The operators of a network, each with those that ONNX Runtime folds into it."""
    into: dict[int, OnnxOperator] = {}  # by operator: the convolution that it is a part of
    found = []
    for each in operators(graph):
        name, before = each.op._opname, into.get(id(each.source))
        if before is not None and (name in EVAL_BATCH_NORMS or name in FUSED):
            before.after += [each] if name in FUSED else []
            into[id(each)] = before
            continue
        found.append(OnnxOperator(**{held.name: getattr(each, held.name) for held in fields(each)}))
        if name in CONVOLUTIONS:
            into[id(each)] = found[-1]
    return found
