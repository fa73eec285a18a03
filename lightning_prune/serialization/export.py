"""Pruned networks for elsewhere, checked against eager, with the record inside: ONNX, torch.export (level 3)."""

from __future__ import annotations

import copy
import inspect
import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.utils._pytree import tree_leaves, tree_map

from lightning_prune.serialization.record import PruningRecord, RecordError
from lightning_prune.serialization.saving import CHECKPOINT_KEY
from lightning_prune.utils.example_inputs import Example, as_example
from lightning_prune.utils.modules import switched

__all__ = ["ExportError", "export", "exported_record"]

LARGEST_ONNX = 1_800_000_000
RECORD_FILE = f"{CHECKPOINT_KEY}.json"


class ExportError(RuntimeError):
    """The exported network does not compute what the eager one does; nothing was written."""


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

    The network is exported in eval mode. Before the file gets its name it is read back and run, by onnxruntime
    or torch, on random inputs of the example's shapes (whole-numbered inputs stay as they are), and with a batch
    of three if the batch is dynamic.

    Args:
        model: the pruned network; it is left as it is.
        example: input as ``example_input_array`` means it: a tensor, a tuple of positional ones, or a dictionary.
        path: ends in ``.onnx`` or ``.pt2``.
        record: what was removed, to travel in the file; see :func:`exported_record`.
        dynamic_batch: whether the first dimension of all inputs and outputs may vary.
        tolerance: the largest difference allowed, as a share of the largest output.

    Returns:
        The largest difference found, as a share of the largest output.

    Raises:
        ValueError: ``path`` has another ending.
        ExportError: the outputs differ.
        OverflowError: the file would be larger than the 2 GB that ONNX keeps in one.
        ImportError: ``pip install lightning-prune[export]`` is missing.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     export(nn.Conv2d(1, 2, 3), torch.zeros(1, 1, 8, 8), folder + "/net.pt2")
        0.0
    """
    path = Path(path)
    if path.suffix not in WRITERS:
        raise ValueError(f"{path} must end in {' or '.join(WRITERS)}")
    net, given = _on_cpu(model, as_example(example))
    text = json.dumps({"record": record.to_dict() if record else None})
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_stem(path.stem + ".part")
    try:
        with torch.no_grad(), switched(net, lambda module: False), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the exporter's inside
            found = _write_and_compare(net, given, dynamic_batch, beside, text)
        if not found <= tolerance:
            raise ExportError(
                f"the exported network differs from the eager one by {found:.2g} of its largest output"
            )
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    return found


def _on_cpu(model: nn.Module, example: Example) -> tuple[nn.Module, Example]:
    """Both where exporters want them; a model that is elsewhere is copied."""
    there = all(tensor.device.type == "cpu" for tensor in model.state_dict().values())
    given: Example = tree_map(lambda x: x.cpu() if isinstance(x, Tensor) else x, example)
    return model if there else copy.deepcopy(model).cpu(), given


def exported_record(path: str | Path) -> PruningRecord | None:
    """The record in a file that :func:`export` wrote; None if nothing had been pruned.

    Raises:
        RecordError: the file holds none, or a damaged one.
    """
    path = Path(path)
    try:
        held = json.loads(READERS[path.suffix](path))
        record = held["record"]
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise RecordError(f"{path} holds no pruning record that can be read: {error}") from error
    return None if record is None else PruningRecord.from_dict(record)


def batch_of(example: Example, number: int | None) -> Example:
    """Random inputs of the example's shapes and dtypes, ``number`` samples of them; whole numbers are repeated.

    Example:
        >>> (x,), _ = batch_of(((torch.zeros(1, 4),), {}), 3)
        >>> x.shape
        torch.Size([3, 4])
    """
    generator = torch.Generator().manual_seed(0)

    def filled(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        if number is not None and x.dim():
            x = x[:1].expand(number, *x.shape[1:]).contiguous()
        return torch.randn(x.shape, generator=generator).to(x.dtype) if x.is_floating_point() else x

    found: Example = tree_map(filled, example)
    return found


def difference(net: nn.Module, run: Callable[..., Sequence[Tensor]], example: Example) -> float:
    """The largest difference between the outputs of ``net`` and ``run``, as a share of the largest output."""
    args, kwargs = example
    wanted = [x for x in tree_leaves(net(*args, **kwargs)) if isinstance(x, Tensor)]
    found = run(*args, **kwargs)
    if [x.shape for x in wanted] != [x.shape for x in found]:
        return float("inf")
    apart = torch.cat([(a.double() - b.double()).flatten() for a, b in zip(wanted, found, strict=True)])
    largest = torch.cat([x.double().flatten() for x in wanted]).abs().max()
    return float(apart.abs().max() / largest.clamp(min=1e-12))  # NaN stays NaN


def _write_and_compare(net: nn.Module, given: Example, dynamic: bool, path: Path, text: str) -> float:
    """The largest difference, over all batches tried."""
    args, kwargs = batch_of(given, 2) if dynamic else given
    run = WRITERS[path.suffix](
        net, args, kwargs, _dynamic(net, args, kwargs) if dynamic else None, path, text
    )
    numbers = (1, 3) if dynamic else (None,)
    return float(torch.tensor([difference(net, run, batch_of(given, number)) for number in numbers]).max())


def _dynamic(net: nn.Module, args: Any, kwargs: Any) -> Any:
    """The first dimension of every tensor, as torch.export takes it: by the name of the argument."""
    args, kwargs = tree_map(
        lambda x: {0: Dim.AUTO} if isinstance(x, Tensor) and x.dim() else None, (args, kwargs)
    )
    return dict(inspect.signature(net.forward).bind(*args, **kwargs).arguments)


def _write_pt2(
    net: nn.Module, args: Any, kwargs: Any, shapes: Any, path: Path, text: str
) -> Callable[..., Sequence[Tensor]]:
    program = torch.export.export(net, args, kwargs, dynamic_shapes=shapes)
    torch.export.save(program, path, extra_files={RECORD_FILE: text})
    loaded = torch.export.load(path).module()
    return lambda *args, **kwargs: [x for x in tree_leaves(loaded(*args, **kwargs)) if isinstance(x, Tensor)]


def _write_onnx(
    net: nn.Module, args: Any, kwargs: Any, shapes: Any, path: Path, text: str
) -> Callable[..., Sequence[Tensor]]:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401 - what torch.onnx needs
    except ImportError as error:
        raise ImportError("export to ONNX needs: pip install lightning-prune[export]") from error
    program = torch.onnx.export(net, args, kwargs=kwargs, dynamo=True, dynamic_shapes=shapes, verbose=False)
    assert program is not None
    program.model.metadata_props[CHECKPOINT_KEY] = text
    if sum(tensor.numel() * tensor.element_size() for tensor in net.state_dict().values()) > LARGEST_ONNX:
        raise OverflowError("ONNX keeps at most 2 GB in one file; export to .pt2")
    program.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(*args: Any, **kwargs: Any) -> list[Tensor]:
        tensors = [x.numpy() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        names = [held.name for held in session.get_inputs()]
        return [torch.from_numpy(x) for x in session.run(None, dict(zip(names, tensors, strict=True)))]

    return run


def _read_pt2(path: Path) -> str:
    extra = {RECORD_FILE: ""}
    torch.export.load(path, extra_files=extra)
    return extra[RECORD_FILE]


def _read_onnx(path: Path) -> str:
    import onnx

    return {held.key: held.value for held in onnx.load(path, load_external_data=False).metadata_props}[
        CHECKPOINT_KEY
    ]


WRITERS = {".onnx": _write_onnx, ".pt2": _write_pt2}
READERS = {".onnx": _read_onnx, ".pt2": _read_pt2}
