"""Measure one network with both tools in turn, in one process: trace, plan, surgery and proof against torch-pruning.

Both make the network as small as the other: torch-pruning removes half of every group, and ours gets a budget of the
parameters that this leaves. Times are of the processor; each repeat starts from a copy of the same network.
"""

from __future__ import annotations

import copy
import gc
import os
import statistics
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import segmentation_models_pytorch as smp
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.common.pages import ReportFiles
from benchmarks.zoo import peer
from benchmarks.zoo.networks import Network, catalogue
from benchmarks.zoo.ours import NO_LIMITS, Seconds, awake_, proof_timed, warm_up, without_refused
from lightning_prune import SurgeryError, prune_, trace
from lightning_prune.criteria import L2
from lightning_prune.selection.dense_sizes import DenseSizes
from lightning_prune.selection.select import select
from lightning_prune.testing import randomise_

__all__ = ["NAMED", "PARTS", "compared", "cut_timed", "measure", "networks"]

NAMED = (
    *("torchvision/resnet18", "torchvision/resnet50", "torchvision/efficientnet_b0"),
    *("torchvision/mobilenet_v2", "torchvision/mobilenet_v3_small", "smp/Unet-resnet34"),
    *("torchvision/vit_b_16", "torchvision/vgg16", "torchvision/densenet121"),
    *("torchvision/convnext_tiny", "torchvision/swin_t", "torchvision/regnet_y_400mf"),
)
PARTS = ("trace", "plan", "surgery", "proof")
PEER_PARTS = ("build", "step")
REPEATS = 3
#: Networks for which torch-pruning takes more than the limit of 10 GB; only ours is measured.
TOO_LARGE_FOR_PEER = ("torchvision/swin_t",)


def networks() -> dict[str, Network]:
    """Return all networks of the zoo and those of ``NAMED``, by name."""
    unet = Network(
        "smp/Unet-resnet34", partial(smp.Unet, "resnet34", encoder_weights=None, classes=21), 128, 21
    )
    return {network.name: network for network in (*catalogue(), unet)}


def compared() -> list[str]:
    """Return the names of the networks that both tools pass, by the stored results of the zoo."""
    rows = ReportFiles("zoo").load()["rows"]
    status = {(row["network"], row["tool"]): row["status"] for row in rows}
    names = dict.fromkeys(row["network"] for row in rows)
    return [
        name
        for name in names
        if status.get((name, "ours")) == "proven" and status.get((name, "torch-pruning")) == "passed"
    ]


def measure(network: Network) -> dict[str, Any]:
    """Return the medians of the seconds of each part, by tool; ``peer`` is missing where torch-pruning fails.

    ``load`` is the number of tasks per processor in the last minute: figures of a machine that others use too are
    less sure.
    """
    warm_up()
    peer.warm_up()
    torch.manual_seed(0)
    model = awake_(randomise_(network.build())).eval()
    example = torch.randn(1, 3, network.size, network.size)
    runs: dict[str, list[dict[str, float]]] = {"ours": [], "peer": []}
    share, row = 0.5, dict[str, Any]()
    if network.name in TOO_LARGE_FOR_PEER:
        row["peer_failed"] = "more than 10 GB"
    for _ in range(REPEATS):
        gc.collect()
        if "peer_failed" not in row:
            try:
                seconds, share = _peer(copy.deepcopy(model), example, network.classes)
                runs["peer"].append(seconds)
            except Exception as failure:
                row["peer_failed"] = f"{type(failure).__name__}: {failure}"[:200]
        gc.collect()
        seconds, row["share"] = _ours(copy.deepcopy(model), example, share)
        runs["ours"].append(seconds)
    row |= {**_floor(model, example), "load": os.getloadavg()[0] / (os.cpu_count() or 1)}
    return {**row, "peer_share": share, **{tool: _medians(each) for tool, each in runs.items() if each}}


class _Empty(TorchDispatchMode):
    """Receives every operator and does nothing but run it: the least that a recording could take."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def _floor(model: nn.Module, example: Tensor) -> dict[str, float]:
    """Return the seconds of two forwards without data under an empty mode: for the trace and for the proof."""
    seconds = []
    try:
        empty, x = copy.deepcopy(model).to("meta"), example.to("meta")
        for _ in range(REPEATS):
            start = time.process_time()
            with torch.no_grad(), _Empty():
                empty(x)
            seconds.append(time.process_time() - start)
    except Exception:  # the code makes tensors with data, which do not meet those without
        return {}
    return {"floor": 2 * statistics.median(seconds)}


def _medians(runs: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return the median of each part; of whole runs as ``total``."""
    medians = {part: statistics.median(run[part] for run in runs) for part in runs[0]}
    return {**medians, "total": statistics.median(sum(run.values()) for run in runs)}


def _peer(model: nn.Module, example: Tensor, classes: int) -> tuple[dict[str, float], float]:
    dense, seconds = _parameters(model), Seconds()
    peer.prune(model, example, classes, seconds, logged=False)
    return {part: seconds.cpu[part] for part in PEER_PARTS}, _parameters(model) / dense


def _ours(model: nn.Module, example: Tensor, share: float) -> tuple[dict[str, float], float]:
    dense, seconds = _parameters(model), Seconds()
    with proof_timed(seconds):
        cut_timed(model, example, share, seconds)
        seconds.of_rest("surgery", "cut", "proof")
    return {part: seconds.cpu[part] for part in PARTS}, _parameters(model) / dense


def cut_timed(model: nn.Module, example: Tensor, share: float, seconds: Seconds) -> None:
    """Trace, plan and cut; plan again without the units that surgery refuses, as the callback does."""
    with seconds.of("trace"):
        graph = trace(model, example)
    while True:
        with seconds.of("plan"):
            scores, dense = L2()(graph, model, {}), DenseSizes.of(graph)
            plan = select(graph, scores, {"params": share}, limits=NO_LIMITS, dense=dense)
        try:
            with seconds.of("cut"):
                prune_(model, graph, plan)
            return
        except SurgeryError as refusal:
            if not len(refusal.units):
                raise
            graph = without_refused(graph, refusal)


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
