"""Export of pruned networks to ONNX and torch.export, compared with eager mode, with the record in the file."""

from __future__ import annotations

import copy
import inspect
import json
import warnings
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.utils._pytree import tree_leaves, tree_map

from lightning_prune.serialization.json_file import MAX_BYTES, parse_json
from lightning_prune.serialization.record import PruningRecord, RecordError
from lightning_prune.serialization.saving import CHECKPOINT_KEY
from lightning_prune.utils.atomic import atomic_write
from lightning_prune.utils.example_inputs import Example, as_example
from lightning_prune.utils.modules import training_modes

__all__ = ["ExportError", "export", "exported_record"]

MAX_ONNX_BYTES = 1_800_000_000  # of weights; protobuf, the format of ONNX, ends at 2 GB
RECORD_FILE = f"{CHECKPOINT_KEY}.json"


class ExportError(RuntimeError):
    """The outputs of the exported network differ from those in eager mode. Nothing was written."""


def export(
    model: nn.Module,
    example: Any,
    path: str | Path,
    record: PruningRecord | None = None,
    *,
    dynamic_batch: bool = True,
    tolerance: float = 1e-4,
) -> float:
    """Write ``model`` as ONNX (``.onnx``, by the dynamo exporter) or as a ``torch.export`` program (``.pt2``).

    The network is exported in eval mode. Before the file gets its name, it is read back and run by onnxruntime or
    torch on random inputs of the example's shapes (integer inputs are used unchanged), also with a batch of three if
    the batch is dynamic. The outputs must agree with those in eager mode.

    Args:
        model: the pruned network; not changed.
        example: input in the form of ``example_input_array``: a tensor, a tuple of positional inputs, or a
            dictionary of keyword inputs.
        path: must end in ``.onnx`` or ``.pt2``.
        record: pruning record to store in the file; see :func:`exported_record`.
        dynamic_batch: whether the first dimension of all inputs and outputs may vary.
        tolerance: largest difference allowed, relative to the largest output.

    Returns:
        The largest difference, relative to the largest output.

    Raises:
        ValueError: ``path`` has another ending.
        ExportError: the outputs differ.
        OverflowError: the file would exceed the 2 GB that an ONNX file can have.
        ImportError: the packages of ``pip install lightning-prune[export]`` are missing.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     export(nn.Conv2d(1, 2, 3), torch.zeros(1, 1, 8, 8), folder + "/net.pt2")
        0.0
    """
    path = Path(path)
    if path.suffix not in WRITERS:
        raise ValueError(f"{path} must end in {' or '.join(WRITERS)}")
    net, cpu_example = _on_cpu(model, as_example(example))
    text = json.dumps({"record": record.to_dict() if record else None})
    with atomic_write(path, suffix=path.suffix) as temporary:
        with torch.no_grad(), training_modes(net, lambda module: False), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporters warn about their own code
            difference = _write_and_compare(net, cpu_example, dynamic_batch, temporary, text)
        if not difference <= tolerance:  # written so that NaN fails too
            raise ExportError(
                f"the outputs of the exported network differ from the eager ones by {difference:.2g} of the "
                f"largest output; {tolerance:g} is allowed"
            )
    return difference


def _on_cpu(model: nn.Module, example: Example) -> tuple[nn.Module, Example]:
    """Return model and example on the CPU, where the exporters need them; a model on another device is copied."""
    cpu_example: Example = tree_map(lambda x: x.cpu() if isinstance(x, Tensor) else x, example)
    on_cpu = all(tensor.device.type == "cpu" for tensor in model.state_dict().values())
    return model if on_cpu else copy.deepcopy(model).cpu(), cpu_example


def exported_record(path: str | Path, verify: bool = True) -> PruningRecord | None:
    """Return the record in a file that :func:`export` wrote; None if nothing had been pruned.

    Args:
        path: the file.
        verify: whether the checksum of the record must be right.

    Raises:
        RecordError: the file has no record, or a damaged one.
    """
    path = Path(path)
    try:
        record = parse_json(READERS[path.suffix](path))["record"]
        return None if record is None else PruningRecord.from_dict(record, verify)
    except (OSError, MemoryError, ImportError):
        raise
    except Exception as error:  # readers of archives and of protobuf raise many types for a damaged file
        raise RecordError(f"{path} has no pruning record that can be read: {error}") from error


def random_batch(example: Example, size: int | None) -> Example:
    """Return random inputs of the example's shapes and dtypes; integer inputs keep their values.

    Args:
        example: the inputs to follow.
        size: number of samples, each of the shape of the example's first; None: as many as the example has.

    Example:
        >>> (x,), _ = random_batch(((torch.zeros(1, 4),), {}), 3)
        >>> x.shape
        torch.Size([3, 4])
    """
    generator = torch.Generator().manual_seed(0)

    def randomised(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        if size is not None and x.dim():
            x = x[:1].expand(size, *x.shape[1:]).contiguous()
        return torch.randn(x.shape, generator=generator).to(x.dtype) if x.is_floating_point() else x

    batch: Example = tree_map(randomised, example)
    return batch


def relative_difference(net: nn.Module, run: Callable[..., Sequence[Tensor]], example: Example) -> float:
    """Return the largest difference between the outputs of ``net`` and ``run``, relative to the largest output."""
    args, kwargs = example
    expected = [x for x in tree_leaves(net(*args, **kwargs)) if isinstance(x, Tensor)]
    outputs = run(*args, **kwargs)
    if [x.shape for x in expected] != [x.shape for x in outputs]:
        return float("inf")
    differences = torch.cat(
        [(a.double() - b.double()).flatten() for a, b in zip(expected, outputs, strict=True)]
    )
    largest = torch.cat([x.double().flatten() for x in expected]).abs().max()
    return float(differences.abs().max() / largest.clamp(min=1e-12))  # clamp, unlike max(), keeps NaN


def _write_and_compare(net: nn.Module, example: Example, dynamic: bool, path: Path, text: str) -> float:
    """Write the file, and return the largest difference over all batches that were run."""
    args, kwargs = random_batch(example, 2) if dynamic else example
    shapes = _dynamic_shapes(net, args, kwargs) if dynamic else None
    run = WRITERS[path.suffix](net, args, kwargs, shapes, path, text)
    batches = [random_batch(example, size) for size in ((1, 3) if dynamic else (None,))]
    return float(torch.tensor([relative_difference(net, run, batch) for batch in batches]).max())


def _dynamic_shapes(net: nn.Module, args: Any, kwargs: Any) -> Any:
    """Declare the first dimension of every tensor dynamic, by argument name, in the form that torch.export takes."""
    args, kwargs = tree_map(
        lambda x: {0: Dim.AUTO} if isinstance(x, Tensor) and x.dim() else None, (args, kwargs)
    )
    return dict(inspect.signature(net.forward).bind(*args, **kwargs).arguments)


def _write_pt2(
    net: nn.Module, args: Any, kwargs: Any, shapes: Any, path: Path, text: str
) -> Callable[..., Sequence[Tensor]]:
    program = torch.export.export(net, args, kwargs, dynamic_shapes=shapes)
    with path.open("wb") as file:  # given a path, torch would write its random name into the file
        torch.export.save(program, file, extra_files={RECORD_FILE: text})
    loaded = torch.export.load(path).module()
    return lambda *args, **kwargs: [x for x in tree_leaves(loaded(*args, **kwargs)) if isinstance(x, Tensor)]


def _write_onnx(
    net: nn.Module, args: Any, kwargs: Any, shapes: Any, path: Path, text: str
) -> Callable[..., Sequence[Tensor]]:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401 - torch.onnx needs it
    except ImportError as error:
        raise ImportError("export to ONNX needs: pip install lightning-prune[export]") from error
    program = torch.onnx.export(net, args, kwargs=kwargs, dynamo=True, dynamic_shapes=shapes, verbose=False)
    assert program is not None
    program.model.metadata_props[CHECKPOINT_KEY] = text
    if sum(tensor.numel() * tensor.element_size() for tensor in net.state_dict().values()) > MAX_ONNX_BYTES:
        raise OverflowError("an ONNX file can have at most 2 GB; export to .pt2")
    program.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(*args: Any, **kwargs: Any) -> list[Tensor]:
        tensors = [x.numpy() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        names = [node.name for node in session.get_inputs()]
        return [torch.from_numpy(x) for x in session.run(None, dict(zip(names, tensors, strict=True)))]

    return run


def _read_pt2(path: Path) -> str:
    with zipfile.ZipFile(path) as archive:  # without the program, which need not be loaded
        (entry,) = (item for item in archive.infolist() if item.filename.endswith(f"/{RECORD_FILE}"))
        if entry.file_size > MAX_BYTES:
            raise ValueError(f"the record has {entry.file_size} bytes, at most {MAX_BYTES} are read")
        return archive.read(entry).decode()


def _read_onnx(path: Path) -> str:
    import onnx

    properties = onnx.load(path, load_external_data=False).metadata_props
    return {entry.key: entry.value for entry in properties}[CHECKPOINT_KEY]


WRITERS = {".onnx": _write_onnx, ".pt2": _write_pt2}
READERS = {".onnx": _read_onnx, ".pt2": _read_pt2}
