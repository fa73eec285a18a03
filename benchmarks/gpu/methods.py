"""NetAdapt, slimming, distillation, and two ranks on one device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.checks import Check, Place
from benchmarks.gpu.networks import Segmenter, SmallUnet, gradual, loader, trainer_of, unet
from benchmarks.robustness.combinations import free_port
from lightning_prune import Distillation, NetAdaptCallback, SlimmingCallback
from lightning_prune.netadapt import Rounds, Workers

__all__ = ["CHECKS"]

RANKS_SECONDS = 100


def rounds(place: Place) -> dict[str, Any]:
    """Search by NetAdapt with two candidates at a time on one device, and with one."""
    figures: dict[str, Any] = {}
    records, wrong = [], []
    for number in (2, 1):
        workers = Workers(devices=[str(place.device)] * number)
        search = NetAdaptCallback(
            {"macs": 0.6}, start_epoch=1, rounds=Rounds(rounds=2, decay=1.0, steps=2), workers=workers,
            metric="val/loss", submodule="net", verbose=False,
        )  # fmt: skip
        torch.manual_seed(0)
        module = Segmenter(SmallUnet(place.pick(32, 8)))
        trainer_of(place, [search], epochs=3).fit(module, loader(place))
        shares = [round(cut.share["macs"], 3) for cut in search.history]
        figures[f"macs with {number} at a time"] = shares
        figures[f"seconds with {number} at a time"] = [round(cut.seconds, 1) for cut in search.history]
        records.append(search.record)
        wrong += [] if shares and shares[-1] <= 0.61 else [f"{number} at a time: MACs {shares}"]
    return {**figures, "same_network": records[0] == records[1], "wrong": wrong}


def slimming(place: Place) -> dict[str, Any]:
    """Train with the penalty, in mixed precision with a scaler and a fused optimizer on a GPU."""
    pruning = SlimmingCallback({"macs": 0.5}, rho=0.01, threshold=0.3, submodule="net", verbose=False)
    precision: Any = "16-mixed" if place.device.type == "cuda" else "32-true"
    module = Segmenter(unet(place))
    trainer_of(place, [pruning], epochs=4, precision=precision).fit(module, loader(place))
    share = pruning.history[-1].share["macs"]
    losses = module.mean_losses()
    wrong = [] if share <= 0.501 else [f"MACs {share:.3f}"]
    wrong += [] if losses[-1] < losses[0] else [f"the loss did not fall: {losses}"]
    return {"losses": losses, "macs": share, "wrong": wrong}


def distilled(place: Place) -> dict[str, Any]:
    """Train with the network before its first cut as the teacher, by its logits and features."""
    module, pruning = Segmenter(unet(place)), gradual(cuts=2, start_epoch=2)
    module.distillation = Distillation(
        "before_cut", alpha=0.1, cwd_features=0.1, submodule="net", precision="bf16"
    )
    trainer = trainer_of(place, [pruning], epochs=6, precision="bf16-mixed")
    trainer.fit(module, loader(place))
    losses = module.mean_losses()
    terms = {name: float(x) for name, x in trainer.callback_metrics.items() if name.startswith("distill/")}
    wrong = [] if losses[-1] < losses[0] else [f"the loss did not fall: {losses}"]
    wrong += [] if len(terms) >= 3 else [f"distillation losses: {terms}"]
    return {"losses": losses, "terms": terms, "macs": pruning.history[-1].share["macs"], "wrong": wrong}


def ranks(place: Place) -> dict[str, Any]:
    """Train in two processes on one device over gloo, with SyncBatchNorm on a GPU; both must have the same bits."""
    port = str(free_port())
    command = [
        sys.executable,
        "-m",
        "benchmarks.gpu.rank",
        str(place.folder),
        str(int(place.small)),
        place.device.type,
    ]
    base = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
    }
    logs = [place.folder / f"rank{rank}.log" for rank in (0, 1)]
    workers = []
    for rank, log in enumerate(logs):
        with log.open("w") as output:
            environment = {**base, "NODE_RANK": str(rank), "GROUP_RANK": str(rank)}
            workers.append(
                subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
            )
    try:
        codes = [worker.wait(RANKS_SECONDS) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    if any(codes):
        raise RuntimeError("a rank failed: " + "\n".join(log.read_text()[-3000:] for log in logs))
    states = [json.loads(_result(place.folder, rank).read_text()) for rank in (0, 1)]
    wrong = [
        f"{name} differs between the ranks"
        for name in ("bits", "record")
        if states[0][name] != states[1][name]
    ]
    wrong += [] if states[0]["macs"][-1] <= 0.501 else [f"MACs {states[0]['macs']}"]
    figures = {name: states[0][name] for name in ("macs", "losses", "synchronised_norms")}
    return {**figures, "losses_of_rank_1": states[1]["losses"], "wrong": wrong}


def _result(folder: Path, rank: int) -> Path:
    return folder / f"rank{rank}.json"


CHECKS = [
    Check("NetAdapt, two candidates on one device", "correctness", rounds),
    Check("slimming", "correctness", slimming),
    Check("distillation", "correctness", distilled),
    Check("two ranks on one device, SyncBatchNorm", "correctness", ranks),
]
