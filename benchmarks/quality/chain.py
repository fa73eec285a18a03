"""One chain: a dense network cut to 50, 26, 10 and 5 % of its MACs, trained and scored at each stage."""

from __future__ import annotations

import copy
import json
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.quality.methods import METHODS, Cutter, Method, Setting
from benchmarks.quality.networks import floors_of, macs_of, renewed, thinner
from benchmarks.quality.plan import DENSE, SCRATCH, STAGES
from benchmarks.quality.tasks import STAGE_RATES, Task, dense, score
from benchmarks.quality.training import cross_entropy, distilled, fit, recalibrate
from lightning_prune.utils.atomic import atomic_write

__all__ = ["NAMES", "run"]

NAMES = (DENSE, *SCRATCH, *METHODS)
Row = dict[str, Any]


def run(task: Task, method: str, seed: int, repair: bool, folder: Path) -> Row:
    """Return the scores of one method at all stages.

    Args:
        task: the task.
        method: one of ``NAMES``.
        seed: of the dense network and of all that is drawn.
        repair: whether each cut is repaired.
        folder: of the dense networks.
    """
    net = dense(task, seed, folder)
    start = time.process_time()
    before = _dense_scores(net, task, folder / f"{task.name}-{seed}.json")
    if method in SCRATCH:
        stages = [_from_scratch(net, task, share, seed, SCRATCH[method]) for share in STAGES[1:]]
    elif method == DENSE:
        stages = _trained_on(net, task, seed)
    else:
        stages = _chain(net, Setting(task, seed, floors_of(net, task.example), repair), METHODS[method])
    row = {"task": task.name, "method": method, "seed": seed, "repair": repair, "dense": before}
    return {**row, "stages": stages, "seconds": round(time.process_time() - start, 1)}


def _chain(net: nn.Module, setting: Setting, method: Method) -> list[Row]:
    """Cut and train, stage by stage."""
    task, dense_macs = setting.task, macs_of(net, setting.task.example)
    loss = distilled(copy.deepcopy(net), method.distil) if method.distil else cross_entropy
    cutter = method.make(net, setting)
    if cutter.needs_sparsity:
        _fit(net, task, task.stage_steps[0], setting.seed, -1, before_step=cutter.before_step)
    rows = []
    for stage, share in enumerate(STAGES):
        if share >= method.last:
            rows.append(_stage(net, setting, cutter, share, stage, share * dense_macs, loss, method))
    return rows


def _stage(
    net: nn.Module,
    setting: Setting,
    cutter: Cutter,
    share: float,
    stage: int,
    macs: float,
    loss: Any,
    method: Method,
) -> Row:
    """Cut once, score, train, score."""
    task, start = setting.task, time.process_time()
    with warnings.catch_warnings(record=True) as raised:
        warnings.simplefilter("always")
        used = cutter.cut(macs, stage)
    undone = sum("not repaired" in str(warning.message) for warning in raised)
    if not setting.repair:
        recalibrate(net, task.data.train, task.batch)
    cut_seconds = time.process_time() - start
    after_cut = _scores(net, task, task.after_cut)
    last = share == max(STAGES[-1], method.last)
    penalty = cutter.before_step if cutter.needs_sparsity and not last else None
    _fit(net, task, max(task.stage_steps[stage] - used, 1), setting.seed, stage, loss, penalty)
    return {
        **_sizes(net, task, share),
        "cut": after_cut,
        "trained": _scores(net, task),
        "undone": undone,
        "cut_seconds": round(cut_seconds, 2),
    }


def _trained_on(net: nn.Module, task: Task, seed: int) -> list[Row]:
    """Train the dense network for the steps of all stages; it shows whether it was at a plateau."""
    rows = []
    for stage, share in enumerate(STAGES):
        _fit(net, task, task.stage_steps[stage], seed, stage)
        rows.append({**_sizes(net, task, share), "trained": _scores(net, task)})
    return rows


def _from_scratch(net: nn.Module, task: Task, share: float, seed: int, depth: int) -> Row:
    """Train a new small network for as many steps as the dense network and the stages up to ``share`` had."""
    macs, like = share * macs_of(net, task.example), task.build(depth).to(task.example.device)
    floors = floors_of(like, task.example)
    small = macs_of(like, task.example) <= macs
    new = renewed(like, seed) if small else thinner(like, task.example, macs, floors, seed)
    new = new.to(memory_format=torch.channels_last)
    stage = STAGES.index(share)
    steps = task.dense_steps + sum(task.stage_steps[: 1 + stage])
    fit(new, task.data.train, steps, task.batch, task.scratch_rates[stage], seed)
    recalibrate(new, task.data.train, task.batch)
    return {**_sizes(new, task, share), "trained": _scores(new, task)}


def _fit(
    net: nn.Module,
    task: Task,
    steps: int,
    seed: int,
    stage: int,
    loss: Any = cross_entropy,
    before_step: Callable[[], None] | None = None,
) -> None:
    """Train one stage, the samples in the same order for every method, and estimate the norms' statistics."""
    order = 1000 * seed + stage + 1
    fit(net, task.data.train, steps, task.batch, STAGE_RATES[max(stage, 0)], order, loss, before_step)
    recalibrate(net, task.data.train, task.batch)


def _dense_scores(net: nn.Module, task: Task, path: Path) -> Row:
    """Return the scores of the dense network, which are kept in a file."""
    if not path.is_file():
        scores = _scores(net, task)
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(scores))
    return dict(json.loads(path.read_text()))


def _scores(net: nn.Module, task: Task, count: int | None = None) -> Row:
    """Return the scores on the first ``count`` images of both sets, or on all."""
    parts = {"val": task.data.val, "test": task.data.test}
    chosen = {name: part if count is None else part.first(count) for name, part in parts.items()}
    return {name: asdict(score(net, task, part)) for name, part in chosen.items()}


def _sizes(net: nn.Module, task: Task, share: float) -> Row:
    params = sum(parameter.numel() for parameter in net.parameters())
    return {"share": share, "macs": macs_of(net, task.example), "params": params}
