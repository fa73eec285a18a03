"""Latency tables, and the speed-up of pruned networks against their share of MACs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any

import segmentation_models_pytorch as smp
import torch
import torchvision
from torch import Tensor, nn

from benchmarks.gpu.checks import Check, Place, Skipped
from benchmarks.gpu.networks import SmallUnet, l2_units, pruned, unet
from lightning_prune import LatencyTable, trace
from lightning_prune.latency.backends import EXECUTIONS, ExecutionName
from lightning_prune.latency.timing import time_against_reference, time_calls

__all__ = ["CHECKS"]

DENSE, MULTIPLE = 1.0, 8
SHARES = (0.5, 0.26)
#: name -> (function that returns the network, size of its images)
NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "smp.Unet(resnet34)": (lambda: smp.Unet("resnet34", encoder_weights=None, in_channels=3, classes=1), 256),
    "torchvision ResNet-50": (lambda: torchvision.models.resnet50(weights=None), 224),
}
#: name -> (autocast to bfloat16, channels last)
MODES = {"fp32": (False, False), "bf16": (True, False), "bf16 channels last": (True, True)}
#: networks by name, share of the MACs and multiple of channels: pruned once for all checks
_pruned: dict[tuple[str, float, int], tuple[nn.Module, float]] = {}


def table(place: Place, execution: ExecutionName) -> dict[str, Any]:
    """Build a latency table, and compare the latency that it predicts for a cut with the measured one."""
    if execution == "onnx":
        _need_onnxruntime(place)
    net = unet(place) if execution == "eager" else SmallUnet(place.pick(32, 8))
    net, x = (
        net.to(place.device).eval(),
        torch.rand(1, 3, place.pick(96, 16), place.pick(96, 16), device=place.device),
    )
    latency = LatencyTable(
        execution=execution, device=str(place.device), threads=1, cuts=2 if place.small else 4
    )
    graph = trace(net, x)
    info = latency.build(graph).info
    graph = graph.with_resources({"latency": latency})
    units = l2_units(net, x, 0.5)
    predicted = graph.cost("latency", units) / graph.cost("latency")
    networks, make_call = (net, pruned(net, x, 0.5)), EXECUTIONS[execution].network
    with latency.place.active():
        calls = [make_call(each, (x,), {}, 1) for each in networks]
        dense, small = time_against_reference(calls[0], calls[1:], place.device, 1)
    return {
        "dense_ms": dense / 1e6, "predicted": predicted, "measured": small / dense, "build_seconds": info["seconds"],
        "points": info["points"],
    }  # fmt: skip


def _need_onnxruntime(place: Place) -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise Skipped(f"{error.name} is not installed") from error
    provider = "CUDAExecutionProvider" if place.device.type == "cuda" else "CPUExecutionProvider"
    if provider not in onnxruntime.get_available_providers():
        raise Skipped(f"this onnxruntime has no {provider}")


def _network(place: Place, name: str, share: float, multiple: int) -> tuple[nn.Module, float]:
    """Return a network with a share of the MACs, on the device, and the share that was reached."""
    if (name, share, multiple) not in _pruned:
        torch.manual_seed(0)
        make, size = NETWORKS[name]
        net, x = (SmallUnet(32) if place.small else make()).eval(), torch.rand(1, 3, size, size)
        x = x[..., :16, :16] if place.small else x
        small = pruned(net, x, share, multiple).eval()
        reached = trace(small, x).cost("macs") / trace(net, x).cost("macs")
        _pruned[name, share, multiple] = small.to(place.device), reached
    return _pruned[name, share, multiple]


def speed_up(place: Place, name: str) -> dict[str, Any]:
    """Time the dense and the pruned network in eager mode, and one at a time as a CUDA graph."""
    rows = []
    for share, multiple in (
        (DENSE, 1),
        *((share, multiple) for share in SHARES for multiple in (1, MULTIPLE)),
    ):
        net, reached = _network(place, name, share, multiple)
        for batch in place.pick((1, 64), (1,)):
            for mode in MODES:
                x, context = _inputs(place, name, net, batch, mode)
                with torch.inference_mode(), context:
                    times = {"ms": _milliseconds(partial(net, x), place)}
                    if batch == 1 and place.device.type == "cuda":
                        times["graph_ms"] = _milliseconds(_cuda_graph(net, x), place)
                rows.append({"macs": reached, "multiple": multiple, "batch": batch, "mode": mode, **times})
    return {"rows": rows}


def compiled(place: Place, name: str) -> dict[str, Any]:
    """Time the dense and the pruned network compiled by inductor, with large batches."""
    rows = []
    for share, multiple in ((DENSE, 1), *((share, MULTIPLE) for share in SHARES)):
        net, reached = _network(place, name, share, multiple)
        batch, mode = place.pick(64, 1), "bf16 channels last"
        x, context = _inputs(place, name, net, batch, mode)
        with torch.inference_mode(), context:
            call = partial(torch.compile(net, dynamic=False), x)
            rows.append(
                {
                    "macs": reached,
                    "multiple": multiple,
                    "batch": batch,
                    "mode": mode,
                    "ms": _milliseconds(call, place),
                }
            )
    return {"rows": rows}


def _inputs(
    place: Place, name: str, net: nn.Module, batch: int, mode: str
) -> tuple[Tensor, contextlib.AbstractContextManager[Any]]:
    """Set the network's memory format; return random images, and the context of the mode."""
    half, channels_last = MODES[mode]
    size = place.pick(NETWORKS[name][1], 16)
    form = torch.channels_last if channels_last else torch.contiguous_format
    net.to(memory_format=form)
    x = torch.rand(batch, 3, size, size, device=place.device).contiguous(memory_format=form)
    return x, torch.autocast(place.device.type, torch.bfloat16) if half else contextlib.nullcontext()


def _cuda_graph(net: nn.Module, x: Tensor) -> Callable[[], object]:
    """Return a call that replays one forward without launching its kernels one by one."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            net(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        net(x)
    return graph.replay


def _milliseconds(call: Callable[[], object], place: Place) -> float:
    """Return the median of 15 times, each of several calls, by CUDA events on a GPU."""
    for _ in range(place.pick(5, 1)):
        call()
    if place.device.type != "cuda":
        return round(time_calls([call], place.device, 1, times=3)[0] / 1e6, 4)
    times = []
    for _ in range(15):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(4):
            call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 4)
    return round(sorted(times)[7], 4)


SLOW = "inductor is slow on a processor"
CHECKS = [
    Check("latency table, eager", "latency", partial(table, execution="eager")),
    *(Check(f"speed-up of {name}", "latency", partial(speed_up, name=name)) for name in NETWORKS),
    *(
        Check(f"speed-up of {name}, compiled", "compiled", partial(compiled, name=name), SLOW)
        for name in NETWORKS
    ),
    Check("latency table, compiled", "compiled", partial(table, execution="compiled"), SLOW),
    Check("latency table, ONNX Runtime", "latency", partial(table, execution="onnx")),
]
