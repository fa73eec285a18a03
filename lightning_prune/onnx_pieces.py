"""A network's operators as ONNX Runtime runs them: one small model each, with any number of channels (level 3).

Norms and activations right after a convolution are no pieces of their own: the runtime folds them into it.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_unflatten

from lightning_prune.graph import ChannelGraph
from lightning_prune.operators import operators
from lightning_prune.templates import Operator, Size, Slot
from lightning_prune.timing import Run

__all__ = ["OnnxOperator", "onnx_idle", "onnx_operators", "onnx_whole"]

CONVOLUTIONS = ("convolution", "_convolution")
FOLDED = ("native_batch_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm")
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
    "tanh",
)


class _Call(nn.Module):
    """One operator, whose tensors are its inputs."""

    def __init__(self, operator: Operator) -> None:
        super().__init__()
        self.operator = operator

    def forward(self, *tensors: Tensor) -> Any:
        """The operator's results."""
        given = iter(tensors)
        known = self.operator
        leaves = [next(given) if isinstance(leaf, Slot) else _dense(leaf) for leaf in known.leaves]
        args, kwargs = tree_unflatten(leaves, known.spec)
        return known.op(*args, **kwargs)


def _dense(leaf: Any) -> Any:
    return leaf.dense if isinstance(leaf, Size) else leaf


@dataclass(eq=False)
class OnnxOperator(Operator):
    """An operator that is run by ONNX Runtime. It is exported once; then its model's shapes are changed."""

    def run(self, counts: Sequence[int], device: torch.device) -> Run:
        """What runs it once with ``counts`` channels along each axis."""
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
        return session(model.SerializeToString(), given, device)

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


def session(model: bytes, given: Sequence[Tensor], device: torch.device) -> Run:
    """What runs a model once, without copies of inputs and outputs."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    options.log_severity_level = 4
    kind = "CUDA" if device.type == "cuda" else "CPU"
    made = onnxruntime.InferenceSession(model, options, providers=[f"{kind}ExecutionProvider"])
    binding = made.io_binding()
    for held, tensor in zip(made.get_inputs(), given, strict=True):
        value = onnxruntime.OrtValue.ortvalue_from_numpy(tensor.numpy(), device.type, device.index or 0)
        binding.bind_ortvalue_input(held.name, value)
    for out in made.get_outputs():
        binding.bind_output(out.name, device.type, device.index or 0)
    return partial(made.run_with_iobinding, binding)


def onnx_whole(net: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], threads: int) -> Run:
    """What runs a whole network once."""
    tensors = [leaf for leaf in tree_leaves((args, dict(kwargs))) if isinstance(leaf, Tensor)]
    device = tensors[0].device
    model = exported(net.cpu(), tuple(tensors))
    return session(model, [tensor.cpu() for tensor in tensors], device)


def onnx_idle(device: torch.device) -> Run:
    """What calls a session that has nothing to do: a network is called once, its pieces once each."""
    one = torch.zeros(1)
    return session(exported(nn.ReLU(), (one,)), [one], device)


def onnx_operators(graph: ChannelGraph) -> list[OnnxOperator]:
    """The operators of a network that ONNX Runtime does not fold into others."""
    folded: set[int] = set()
    found = []
    for each in operators(graph):
        source = each.source
        name = each.op._opname
        after = source is not None and (source.op._opname in CONVOLUTIONS or id(source) in folded)
        if after and (name in FOLDED or name in FUSED):
            folded.add(id(each))
        else:
            found.append(OnnxOperator(**{field.name: getattr(each, field.name) for field in fields(each)}))
    return found
