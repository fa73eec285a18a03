"""INT8 networks in ONNX: static quantisation by ONNX Runtime, with its scales from calibration images.

Weights get one scale per output channel, and activations one per tensor (Jacob et al., CVPR 2018). The file is an
ordinary ONNX model with QuantizeLinear and DequantizeLinear around the operators that run in INT8 (QDQ). Other
programs, such as TensorRT and OpenVINO, read it as well.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_prune.serialization.export import ExportError, export
from lightning_prune.serialization.record import PruningRecord
from lightning_prune.utils.atomic import atomic_write
from lightning_prune.utils.example_inputs import as_example, on_device
from lightning_prune.utils.modules import training_modes

__all__ = ["Int8Export", "export_int8"]

CONTRACTIONS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
Feed = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Int8Export:
    """What became of a network that was written in INT8.

    Example:
        >>> print(Int8Export({"Conv": 31}, {}, difference=0.01, images=64))
        INT8: 31 Conv; outputs differ by 1.0% from those in PyTorch on 64 training images

    Attributes:
        quantised: kind of operator -> number of those that run in INT8; of convolutions and matrix products.
        in_float: kind of operator -> number of those that stay in floating point; of the same.
        difference: root mean square difference of its outputs from those in PyTorch on the calibration images, as a
            share of the root mean square of these.
        images: number of calibration images.
    """

    quantised: dict[str, int]
    in_float: dict[str, int]
    difference: float
    images: int

    def __str__(self) -> str:
        kinds = ", ".join(f"{number} {kind}" for kind, number in self.quantised.items())
        rest = ", ".join(f"{number} {kind}" for kind, number in self.in_float.items())
        others = f"; in floating point stay {rest}" if rest else ""
        return (
            f"INT8: {kinds}{others}; outputs differ by {self.difference:.1%} from those in PyTorch on "
            f"{self.images} training images"
        )


def export_int8(
    model: nn.Module,
    path: str | Path,
    calibration: Iterable[Any],
    record: PruningRecord | None = None,
    *,
    dynamic_batch: bool = True,
    reduce_range: bool = False,
) -> Int8Export:
    """Write ``model`` as ONNX model whose convolutions and matrix products run in INT8.

    Args:
        model: the pruned network; not changed.
        path: must end in ``.onnx``.
        calibration: inputs as in training, in the form of ``example_input_array``: their activations set the ranges
            of INT8. Some dozens suffice. Take them from the training data: with test images, the score on these would
            be too good.
        record: pruning record to store in the file; see :func:`exported_record`.
        dynamic_batch: whether the first dimension of all inputs and outputs may vary.
        reduce_range: use 7 of the 8 bits of the weights, for x86 processors without VNNI, where sums may overflow.

    Raises:
        ValueError: ``path`` has another ending, or there is no calibration input.
        ExportError: the network has no operator that can be quantised, or its outputs are not finite.
        ImportError: the packages of ``pip install lightning-prune[export]`` are missing.

    Example:
        >>> import tempfile
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     export_int8(net, folder + "/net.onnx", [torch.rand(1, 1, 8, 8) for _ in range(8)]).quantised
        {'Conv': 2}
    """
    path, examples = Path(path), [as_example(example) for example in calibration]
    if path.suffix != ".onnx":
        raise ValueError(f"{path} must end in .onnx")
    if not examples:
        raise ValueError("INT8 needs calibration inputs, and there are none")
    with tempfile.TemporaryDirectory() as folder, atomic_write(path, suffix=path.suffix) as temporary:
        exact = Path(folder, "exact.onnx")
        export(model, _inputs(examples[0]), exact, record, dynamic_batch=dynamic_batch)
        feeds = [_feed(exact, example) for example in examples]
        _quantise(exact, temporary, feeds, reduce_range)
        quantised, in_float = _operators(temporary)
        if not quantised:
            others = ", ".join(f"{count} {name}" for name, count in in_float.items())
            raise ExportError(
                f"no operator of {type(model).__name__} can be quantised: of convolutions and matrix products it has "
                f"{others or 'none'}; export it without INT8"
            )
        difference = _difference(model, temporary, examples, feeds)
    return Int8Export(dict(quantised), dict(in_float), difference, sum(_size(feed) for feed in feeds))


def _inputs(example: Any) -> Any:
    args, kwargs = example
    return kwargs if kwargs and not args else args


def _size(feed: Feed) -> int:
    first = next(iter(feed.values()))
    return len(first) if first.ndim else 1


def _feed(path: Path, example: Any) -> Feed:
    """Return the inputs of an ONNX model by their names."""
    tensors = [x.detach().cpu().numpy() for x in tree_leaves(example) if isinstance(x, Tensor)]
    names = [node.name for node in open_session(path).get_inputs()]
    return dict(zip(names, tensors, strict=True))


def open_session(path: Path, threads: int = 0) -> Any:
    """Open an ONNX model on the CPU.

    Args:
        path: the file.
        threads: of one run; 0: as ONNX Runtime chooses.

    Raises:
        ImportError: ONNX Runtime is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise ImportError("ONNX Runtime is missing: pip install 'lightning-prune[export]'") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors; it warns about its own optimisations
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _quantise(source: Path, target: Path, feeds: Sequence[Feed], reduce_range: bool) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        """The calibration images, one after the other."""

        def __init__(self) -> None:
            self.rest = iter(feeds)

        def get_next(self) -> Feed | None:
            """Return the next inputs; None at the end."""
            return next(self.rest, None)

    with _quietly(), tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder, "prepared.onnx")
        quant_pre_process(source, prepared, skip_symbolic_shape=True)
        quantize_static(
            prepared,
            target,
            Reader(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            reduce_range=reduce_range,
            activation_type=QuantType.QUInt8,  # with signed weights the fast path of x86 processors
            weight_type=QuantType.QInt8,
        )
    _copy_metadata(source, target)


def _copy_metadata(source: Path, target: Path) -> None:
    """Copy the entries of the exact model, such as the pruning record."""
    import onnx

    properties = {entry.key: entry.value for entry in onnx.load(source).metadata_props}
    model = onnx.load(target)
    onnx.helper.set_model_props(model, properties)
    onnx.save(model, target)


@contextmanager
def _quietly() -> Iterator[None]:
    """Silence the logging of ONNX Runtime's quantisation, which goes to the root logger."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _operators(path: Path) -> tuple[Counter[str], Counter[str]]:
    """Count the convolutions and matrix products in INT8, and those in floating point."""
    import onnx

    nodes = onnx.load(path).graph.node
    producers = {name: node.op_type for node in nodes for name in node.output}
    quantised: Counter[str] = Counter()
    in_float: Counter[str] = Counter()
    for node in nodes:
        if node.op_type in CONTRACTIONS:
            inputs = [producers.get(name) for name in node.input[:2]]
            (quantised if inputs == ["DequantizeLinear"] * 2 else in_float)[node.op_type] += 1
    return quantised, in_float


def _difference(model: nn.Module, path: Path, examples: Sequence[Any], feeds: Sequence[Feed]) -> float:
    """Return the root mean square difference of the outputs, relative to that of the outputs in PyTorch."""
    session = open_session(path)
    device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    squares = np.zeros(2)
    with torch.no_grad(), training_modes(model, lambda module: False):
        for (args, kwargs), feed in zip(examples, feeds, strict=True):
            args, kwargs = on_device(args, device), on_device(kwargs, device)
            exact = [x for x in tree_leaves(model(*args, **kwargs)) if isinstance(x, Tensor)]
            for a, b in zip(exact, session.run(None, feed), strict=True):
                reference = a.detach().cpu().double().numpy()
                squares += ((b - reference) ** 2).sum(), (reference**2).sum()
    difference = float(np.sqrt(squares[0] / max(squares[1], 1e-24)))
    if not np.isfinite(difference):
        raise ExportError("the outputs of the network in INT8, or those in PyTorch, are not finite")
    return difference
