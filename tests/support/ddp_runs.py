"""Distributed runs, one after the other: ``test_ddp.py`` runs ``python ddp_runs.py FOLDER`` in each process."""

from __future__ import annotations

import faulthandler
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from lightning_prune import (
    IPAD,
    DepthSettings,
    FinalPhase,
    LatencyError,
    LatencyTable,
    Linear,
    SlimmingCallback,
    SurgeryError,
)
from lightning_prune.criteria import ActivationMean, TaylorGate, TaylorWeight
from lightning_prune.distillation.config import Distillation
from lightning_prune.latency.calibration import Correction
from lightning_prune.latency.store import Measurements
from lightning_prune.pruning import cut_repair
from lightning_prune.utils.hashing import network_digest
from tests.support.ddp_modules import (
    Branching,
    Checkpointed,
    Found,
    Learner,
    Manual,
    Net,
    Noisy,
    Normless,
    Residual,
    Save,
    SaveBeforeCut,
    Slimmed,
    Spy,
    Vanishing,
    fit,
    prune,
    rank,
    rank_before,
)
from tests.support.latency_networks import steadily_rising
from tests.support.slimming_runs import loader

HANGS = 600  # seconds; a guard against a run that never ends, far above what a busy machine needs


def plain(optimizer: str = "carry") -> Found:
    spy, module, sums = Spy(), Net(), []

    def keep(layer: nn.Module, args: Any, out: Tensor) -> None:
        if type(out) is Tensor and not out.is_meta and layer.training:
            sums.append(out.detach().sum(0))

    module.net[0].register_forward_hook(keep)
    found = fit(module, prune(criterion=spy, start_epoch=0, optimizer=optimizer))
    return {**found, "seen": spy.seen, "first epoch": torch.stack(sums[:4]).sum(0)}


#: criteria that look at training itself
LOOKING = {"weight": TaylorWeight(), "gate": TaylorGate(), "activation": ActivationMean()}


def scored(name: str, batch: int = 4, module: Callable[[], Net] = Normless, **options: Any) -> Found:
    """Train one epoch; return the statistics that a criterion gets."""
    spy = Spy(LOOKING[name])
    pruning = prune(criterion=spy, start_epoch=0, statistics=options.pop("statistics", "epoch"))
    data = loader(batch=batch)
    if options.get("devices") != 1:  # Lightning's own sampler would shuffle
        whole, options["use_distributed_sampler"] = data.dataset, False
        data = DataLoader(Subset(whole, range(rank_before(), len(whole), 2)), batch)
    return {**fit(module(), pruning, data=data, epochs=3, **options), "seen": spy.seen}


def steps(**options: Any) -> Found:
    """Cut three times within epochs of four batches, then train a final phase."""
    final = FinalPhase(partial(torch.optim.SGD, lr=0.01), epochs=2)
    schedule: dict[str, Any] = {"amount": None, "schedule": Linear(3), "every_n_steps": 3}
    pruning = prune(criterion=Spy(), final_phase=final, **schedule)
    found = fit(Net(), pruning, data=loader(64), epochs=9, **options)
    return {**found, "steps": [cut.step for cut in pruning.history]}


def settings(module: Callable[[], Net], **wanted: bool) -> Found:
    strategy = DDPStrategy(process_group_backend="gloo", **wanted)
    return fit(module(), prune(), strategy=strategy)


def uneven(**options: Any) -> Found:
    """Train on four batches of four on one rank, three of two on the other; a cut at the end renews the norms."""
    data = loader(16, batch=4) if rank_before() == 0 else loader(6, batch=2)
    pruning = prune(criterion=IPAD(omega=0.5), recalibrate_batches=4, statistics="pass", start_epoch=3)
    return fit(Net(), pruning, data=data, use_distributed_sampler=False, **options)


def refused() -> Found:
    try:
        uneven()
    except ValueError as error:
        return {"error": str(error)}
    return {"error": ""}


def unseen() -> Found:
    spy = Spy()
    strategy = DDPStrategy(process_group_backend="gloo", find_unused_parameters=True)
    return {**fit(Branching(), prune(criterion=spy), strategy=strategy), "seen": spy.seen}


def sizes() -> Found:
    data = loader(size=12 if rank_before() == 0 else 16)
    return fit(Net(), prune(criterion=IPAD(omega=0.5)), data=data, use_distributed_sampler=False)


def resumed() -> Found:
    """Train without interruption, and from two checkpoints of that run with other random numbers at the start."""
    ends = []
    for resume in (None, "6.ckpt", "11.ckpt"):
        torch.manual_seed(rank_before() + len(ends))
        path = resume and Path(sys.argv[1]) / resume
        pruning = prune(criterion=IPAD(omega=0.5))
        ends.append(fit(Noisy(), pruning, *([] if resume else [Save()]), resume=path))
    return {"ends": ends}


def averaged() -> Found:
    averaging = EMAWeightAveraging(decay=0.9)
    found = fit(Net(), prune(), averaging)
    return {**found, "average": averaging._average_model.module.state_dict()}


def repaired() -> Found:
    """Repair cuts of a network and its average; without interruption, and from just before the first cut."""
    ends = []
    for resume in (None, "before cut 1.ckpt"):
        torch.manual_seed(rank_before() + len(ends))
        pruning, averaging = prune(compensate=True), EMAWeightAveraging(decay=0.9)
        path = resume and Path(sys.argv[1]) / resume
        saving = [] if resume else [SaveBeforeCut()]
        found = fit(Noisy(), pruning, averaging, first=saving, resume=path)
        changes = [(cut.change_unrepaired, cut.change) for cut in pruning.history]
        average = averaging._average_model.module.state_dict()
        ends.append(
            {**found, "changes": changes, "average": {name: x.clone() for name, x in average.items()}}
        )
    return {**ends[0], "ends": ends}


def slimmed() -> Found:
    """Train with the penalty in the loss, with the same one from the callback, and with cuts to half of the MACs."""
    written, added = Slimmed(), Slimmed()
    written.rho = 0.05
    keep = SlimmingCallback(rho=0.05, submodule="net", end_epoch=9, verbose=False)
    fit(written, prune(submodule="net", start_epoch=9), epochs=1)
    fit(added, keep, epochs=1)
    cutting = SlimmingCallback(
        {"macs": 0.5}, rho=0.3, threshold=0.3, end_epoch=3, submodule="net", verbose=False
    )
    found = fit(Slimmed(), cutting, EMAWeightAveraging(decay=0.5), epochs=4)
    ends = [dict(module.net.named_parameters()) for module in (written, added)]
    return {**found, "ends": ends, "changes": cutting.changes}


def vanished(**wanted: bool) -> Found:
    """Remove two branches after the first epoch; train to the end, and again from a checkpoint written after that."""
    ends, averages = [], []
    for resume in (None, "6.ckpt"):
        path = resume and Path(sys.argv[1]) / resume
        callback = SlimmingCallback(rho=1e-3, threshold=5e-3, shrink_at=0.01, submodule="net", verbose=False)
        averaging = EMAWeightAveraging(decay=0.5)
        strategy = DDPStrategy(process_group_backend="gloo", **wanted)
        more = [averaging] if resume else [averaging, Save()]
        ends.append(fit(Vanishing(), callback, *more, strategy=strategy, epochs=3, resume=path))
        averages.append(averaging._average_model.module.state_dict())
    return {**ends[0], "ends": ends, "averages": averages}


def shallower() -> Found:
    """Let whole residual blocks vanish from a network and its average; each rank has images of its own."""
    averaging = EMAWeightAveraging(decay=0.5)
    pruning = prune(depth=DepthSettings(max_depth_ratio=1, images=8), start_epoch=0)
    found = fit(Residual(), pruning, averaging)
    vanished = pruning.record.vanished if pruning.record else {}
    return {**found, "vanished": vanished, "average": averaging._average_model.module.state_dict()}


def distilled(submodule: str | None, width: int) -> Found:
    """Distil from a teacher, which has the student's architecture if ``width`` is 8."""
    module, teacher = Learner(), Net()
    if width != 8:
        teacher.net[0], teacher.net[1] = nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width)
        teacher.net[3] = nn.Conv2d(width, 12, 3, padding=1, stride=2)
        module.example_input_array = torch.zeros(1, 1, 12, 12)
    source = teacher.net if submodule else teacher
    before = network_digest(source)
    module.distillation = Distillation(source, 1.0, 1.0, 1.0, submodule=submodule)
    found = fit(module, prune(submodule=submodule))
    return {**found, "teacher": [before, network_digest(module.distillation.callback.teacher.net)]}


def distilled_from_its_own() -> Found:
    """Distil from the network just before the first cut; the statistics of its norms differ between ranks.

    Without interruption, and from checkpoints of that run before and after the cut.
    """
    ends = []
    for resume in (None, "6.ckpt", "11.ckpt"):
        module, path = Learner(), resume and Path(sys.argv[1]) / resume
        module.distillation = Distillation("before_cut", 1.0)
        saving = [] if resume else [Save()]
        found = fit(module, prune(), *saving, resume=path, default_root_dir=sys.argv[1])
        teacher = module.distillation.callback.teacher
        ends.append({**found, "teacher": [teacher.checksum, network_digest(teacher.net)]})
    return {**ends[0], "ends": ends}


def apart() -> Found:
    """Make the proof of the cut fail on the second rank."""
    own = cut_repair.prune_

    def refusing(*args: Any) -> Any:
        if rank() == 1:
            raise SurgeryError("no proof here", np.array([0]))
        return own(*args)

    cut_repair.prune_ = refusing
    try:
        fit(Net(), prune())
    except RuntimeError as error:
        return {"error": str(error)}
    finally:
        cut_repair.prune_ = own
    return {"error": ""}


class Rank(LatencyTable):
    """Measures, and then replaces the times by artificial ones that differ between ranks."""

    builds = 0

    def build(self, *args: Any) -> Measurements:
        """Return times that grow with the channels, and are twice as long on the second rank."""
        self.builds += 1
        found = steadily_rising(super().build(*args))
        self.measured = replace(found, correction=Correction(1e6 * rank(), 1.0 + rank(), 1.0 + rank()))
        return self.measured


def timed() -> Found:
    """Prune to a share of the latency; then use a table that is damaged on the first rank."""
    table, damaged = Rank(threads=1, cuts=1), Path(sys.argv[1]) / f"damaged {rank_before()}.json"
    pruning = prune(budget={"latency": 0.6}, amount={"latency": 0.2}, resources={"latency": table})
    found = fit(Net(), pruning)
    if rank() == 0:
        damaged.write_text("{")
    refused = ""
    try:
        fit(Net(), prune(budget={"latency": 0.6}, amount=None, resources={"latency": LatencyTable(damaged)}))
    except LatencyError as error:
        refused = str(error)
    return {**found, "builds": table.builds, "table": table.measured, "error": refused}


RUNS: dict[str, Callable[[], Found]] = {
    "carry": plain,
    "reset": partial(plain, "reset"),
    "find_unused_parameters": partial(
        settings, Branching, find_unused_parameters=True, gradient_as_bucket_view=True
    ),
    "static_graph": partial(settings, Checkpointed, static_graph=True),
    "static_graph by hand": partial(settings, Manual, static_graph=True),
    "uneven": partial(uneven, limit_train_batches=3),
    "uneven and not limited": refused,
    "unseen": unseen,
    "sizes": sizes,
    "averaged": averaged,
    "repaired": repaired,
    "slimmed": slimmed,
    "vanished": vanished,
    "vanished and found unused": partial(vanished, find_unused_parameters=True, gradient_as_bucket_view=True),
    "vanished in a static graph": partial(vanished, static_graph=True),
    "shallower": shallower,
    "distilled": partial(distilled, None, 8),
    "distilled from another": partial(distilled, "net", 6),
    "distilled from its own": distilled_from_its_own,
    "timed": timed,
    "steps": steps,
    "accumulated steps": partial(steps, accumulate_grad_batches=2),
    **{name: partial(scored, name) for name in LOOKING},
    "resumed": resumed,
    "apart": apart,
}


def main(folder: Path) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    for name, run in RUNS.items():
        faulthandler.dump_traceback_later(HANGS, exit=True)
        torch.save(run(), folder / f"{name} {rank_before()}.pt")
    # Gloo is not shut down by Lightning; a process that exits while its peer is still connected may abort.
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
