"""Trace, cut and repair networks on the device, and compare with the same on the CPU."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import lightning as L
import numpy as np
import torch
import torchvision
from torch import Tensor, nn

from benchmarks.gpu.checks import Check, Place, Skipped
from benchmarks.gpu.networks import Segmenter, SmallUnet, gradual, images, l2_units, loader, trainer_of, unet
from lightning_prune import L2, PassingFailure, PruningPolicy, one_shot, prune_, trace
from lightning_prune.compensation import cut_and_compensate_
from lightning_prune.criteria import FPGM, IPAD, ActivationMean, OutputTaylor, TaylorGate, TaylorWeight
from lightning_prune.pruning.statistics_pass import collect_statistics
from lightning_prune.pruning.training import Training

__all__ = ["CHECKS"]

NETWORKS = (
    "resnet18", "mobilenet_v3_small", "efficientnet_b0", "densenet121", "googlenet", "shufflenet_v2_x1_0",
    "convnext_tiny", "vit_b_16", "swin_t", "maxvit_t",
)  # fmt: skip


def _bce(net: nn.Module, batch: Any) -> Tensor:
    return nn.functional.binary_cross_entropy_with_logits(net(batch[0]), batch[1])


def _far(a: Tensor, b: Tensor) -> float:
    """Return the largest difference as a share of the largest value."""
    return float((a.cpu() - b.cpu()).abs().max() / a.abs().max().cpu().clamp_min(1e-12))


def repaired(place: Place, matmul: str) -> dict[str, Any]:
    """Cut and repair the same network on the CPU and on the device; the repairs must be equally good."""
    net, (x, _) = unet(place).eval(), images(place.pick(32, 8), place.pick(96, 16))
    units = l2_units(net, x[:1], 0.5)
    torch.set_float32_matmul_precision(matmul)
    outputs, changes, seconds = [], [], []
    for device in (torch.device("cpu"), place.device):
        small, batch = copy.deepcopy(net).to(device), x.to(device)
        timed = _Timer(place)
        _, report = cut_and_compensate_(small, trace(small, batch[:1]), units, [batch])
        seconds.append(timed.seconds())
        changes.append((report.change_before, report.change_after))
        with torch.no_grad():
            outputs.append(small.eval()(batch).cpu())
    (before, on_cpu), (_, on_device) = changes
    figures = {
        "change_unrepaired": before, "change_cpu": on_cpu, "change_device": on_device,
        "outputs_differ_by": _far(*outputs), "seconds_cpu": seconds[0], "seconds_device": seconds[1],
    }  # fmt: skip
    near = abs(on_device - on_cpu) <= 0.1 * on_cpu + 0.001
    return {
        **figures,
        "wrong": [] if near else [f"repaired to {on_cpu:.3g} on the CPU, {on_device:.3g} here"],
    }


class _Timer:
    def __init__(self, place: Place) -> None:
        import time

        self.place, self.clock = place, time.perf_counter
        place.wait()
        self.start = self.clock()

    def seconds(self) -> float:
        self.place.wait()
        return round(self.clock() - self.start, 3)


def in_one_shot(place: Place) -> dict[str, Any]:
    """Prune with batches on the CPU and on the device, in two precisions, and with a default device."""
    x, _ = images(place.pick(32, 8), place.pick(96, 16))
    figures: dict[str, Any] = {}
    for name, batch, dtype in (
        ("batches on the CPU", x, torch.float32),
        ("batches on the device", x.to(place.device), torch.float32),
        ("bfloat16", x.to(place.device, torch.bfloat16), torch.bfloat16),
    ):
        net, timed = unet(place).to(place.device, dtype), _Timer(place)
        one_shot(net, batch[:1], {"macs": 0.5}, batches=[batch])
        figures[name] = timed.seconds()
        net(x.to(place.device, dtype)).sum().backward()
    wrong = []
    torch.set_default_device(place.device)
    try:
        net = unet(place).to(place.device)
        one_shot(net, x[:1].to(place.device), {"macs": 0.5}, batches=[x.to(place.device)])
    except Exception as error:
        wrong.append(f"with a default device: {type(error).__name__}: {error}")
    return {"seconds": figures, "wrong": wrong}


def scored(place: Place) -> dict[str, Any]:
    """Score units by several criteria on the CPU and on the device."""
    net, batch = unet(place), images(8, place.pick(64, 16))
    figures, wrong = {}, []
    for criterion in (
        IPAD(0.5),
        IPAD(0.25, terms="energy"),
        FPGM(),
        ActivationMean(),
        TaylorWeight(),
        TaylorGate(),
        OutputTaylor(),
    ):
        name, scores = str(criterion), []
        for device in (torch.device("cpu"), place.device):
            model = copy.deepcopy(net).to(device)
            graph = trace(model, batch[0][:1].to(device))
            statistics = collect_statistics(
                criterion, model, graph, [batch], Training([], _bce, lambda net: 0.0)
            )
            scores.append(np.nan_to_num(criterion(graph, model, statistics), posinf=0))
        correlation = float(np.corrcoef(*scores)[0, 1])
        figures[name] = round(correlation, 5)
        # Its projections of the outputs are random, and devices draw other numbers.
        least = 0.5 if isinstance(criterion, OutputTaylor) else 0.98
        wrong += [] if correlation > least else [f"{name}: correlation {correlation:.3f}"]
    return {"correlation": figures, "wrong": wrong}


def networks(place: Place) -> dict[str, Any]:
    """Cut networks of torchvision in eval mode on the device by the units chosen on the CPU, and compare outputs."""
    x, figures, wrong = torch.rand(2, 3, 224, 224), {}, []
    for name in place.pick(NETWORKS, ("shufflenet_v2_x1_0",)):
        torch.manual_seed(0)
        net = torchvision.models.get_model(name, weights=None).eval()
        try:
            units = l2_units(net, x[:1], 0.6)
            outputs = [
                _cut_output(net, x.to(device), units) for device in (torch.device("cpu"), place.device)
            ]
            figures[name] = _far(*outputs)
            wrong += [] if figures[name] < 0.02 else [f"{name}: outputs differ by {figures[name]:.2g}"]
        except Exception as error:  # the other networks are tried all the same
            wrong.append(f"{name}: {type(error).__name__}: {error}"[:500])
    return {"outputs_differ_by": figures, "wrong": wrong}


def _cut_output(net: nn.Module, x: Tensor, units: Sequence[int]) -> Tensor:
    small = copy.deepcopy(net).to(x.device)
    prune_(small, trace(small, x[:1]), units)
    with torch.no_grad():
        return small(x)


class Branching(nn.Module):
    """Has a branch on a value, so that it cannot be traced without data; with attention, an LSTM and random depth."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.attention = nn.MultiheadAttention(16, 2, dropout=0.1, batch_first=True)
        self.recurrent = nn.LSTM(16, 12, batch_first=True)
        self.branch, self.head = nn.Linear(12, 12), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (n, 2) of images (n, 3, h, w)."""
        x = nn.functional.relu(self.norm(self.conv(x))).flatten(2).mT
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x, _ = self.recurrent(x)
        x = x * 2 if float(x.abs().max()) > 1e6 else x
        x = x + torchvision.ops.stochastic_depth(self.branch(x), 0.3, "row", self.training)
        return self.head(x.mean(1))


def by_values(place: Place) -> dict[str, Any]:
    """Trace a network that needs values on both devices: the same units, the same cut, no random numbers used up."""
    torch.manual_seed(0)
    net, x, kept, states = Branching(), torch.rand(2, 3, 4, 4), [], []
    for device in (torch.device("cpu"), place.device):
        small, batch = copy.deepcopy(net).to(device), x.to(device)
        state = _random_state(device)
        graph = trace(small, batch)
        prune_(small, graph, l2_units(net, x, 0.7))
        states.append(bool((_random_state(device) == state).all()))
        kept.append({name: tuple(p.shape) for name, p in small.named_parameters()})
        small.train()(batch).sum().backward()
    wrong = [] if kept[0] == kept[1] else ["another cut than on the CPU"]
    wrong += [] if all(states) else ["the trace used up random numbers"]
    return {"parameters": sum(int(np.prod(shape)) for shape in kept[1].values()), "wrong": wrong}


def _random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def detector(place: Place) -> dict[str, Any]:
    """Prune a detector, which needs values, on the device."""
    make = partial(
        torchvision.models.detection.ssdlite320_mobilenet_v3_large, weights=None, weights_backbone=None
    )
    net, x = make().to(place.device).eval(), [torch.rand(3, 320, 320, device=place.device)]
    timed = _Timer(place)
    one_shot(net, (x,), {"macs": 0.6}, L2())
    seconds = timed.seconds()
    with torch.no_grad():
        boxes = net(x)[0]["boxes"]
    return {
        "seconds": seconds,
        "wrong": [] if boxes.device.type == place.device.type else ["boxes elsewhere"],
    }


class _Scarce(L.Callback):
    """Leaves the process hardly any memory at the end of one epoch, before the cut."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Allow as much memory as is used now."""
        if trainer.current_epoch == self.epoch:
            _allow(0)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Allow all memory."""
        _allow(None)


def _allow(more: int | None) -> None:
    """Let the process allocate so many bytes more, or everything."""
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    share = 1.0 if more is None else min((torch.cuda.memory_reserved() + more) / total, 1.0)
    torch.cuda.set_per_process_memory_fraction(share)


def without_memory(place: Place) -> dict[str, Any]:
    """Cut without memory: the failure passes, nothing changes, and the same cut succeeds with memory."""
    wide = nn.Sequential(*(nn.Conv2d(1024, 1024, 3, padding=1) for _ in range(4)), nn.Conv2d(1024, 2, 1)).to(
        place.device
    )
    x = torch.rand(1, 1024, 8, 8, device=place.device)
    graph = trace(wide, x)
    before = {name: value.double().sum().item() for name, value in wide.state_dict().items()}
    remove, wrong = graph.layers["1.weight"][:512], []
    try:
        _allow(0)
        prune_(wide, graph, remove)
        wrong.append("the cut needed no memory: the check shows nothing")
    except PassingFailure:
        pass
    finally:
        _allow(None)
    after = {name: value.double().sum().item() for name, value in wide.state_dict().items()}
    wrong += [] if before == after else ["the failed cut changed the network"]
    if not wrong:
        prune_(wide, graph, remove)
    del wide, graph
    module, pruning = Segmenter(SmallUnet(256)), gradual()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer_of(place, [_Scarce(1), pruning]).fit(module, loader(place, size=64))
    _allow(None)
    messages = [str(w.message) for w in caught if "again" in str(w.message) or "memory" in str(w.message)]
    epochs = [cut.epoch for cut in pruning.history]
    wrong += [] if pruning.history[-1].share["macs"] <= 0.501 else ["the budget was not met in the end"]
    return {
        "cuts_after_epochs": epochs,
        "warnings": messages[:3],
        "losses": module.mean_losses(),
        "wrong": wrong,
    }


def exported(place: Place) -> dict[str, Any]:
    """Export a pruned network from the device to ONNX, where the packages are installed."""
    from importlib.util import find_spec

    from lightning_prune import export

    if not all(map(find_spec, ("onnx", "onnxscript", "onnxruntime"))):
        raise Skipped("onnx, onnxscript or onnxruntime is not installed")
    net, x = SmallUnet().to(place.device), torch.rand(1, 3, 16, 16, device=place.device)
    one_shot(net, x, PruningPolicy({"macs": 0.5}), L2())
    path = place.folder / "small.onnx"
    export(net.eval(), x, path)
    return {"bytes": path.stat().st_size}


def _check(name: str, run: Callable[[Place], dict[str, Any]], gpu_only: str = "") -> Check:
    return Check(name, "correctness", run, gpu_only)


CHECKS = [
    _check("repair on the device and on the CPU", partial(repaired, matmul="highest")),
    _check("repair with TF32", partial(repaired, matmul="high"), "TF32 needs a GPU"),
    _check("one shot on the device", in_one_shot),
    _check("criteria on the device and on the CPU", scored),
    _check("networks of torchvision", networks),
    _check("network that needs values", by_values),
    _check("detector", detector),
    _check("no memory on the device", without_memory, "a processor has no limit of memory"),
    _check("export", exported),
]
