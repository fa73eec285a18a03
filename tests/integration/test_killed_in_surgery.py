"""Tests of processes that are killed during surgery: the files on disk still load, and pruning again works."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_prune import PruningRecord, prune_, trace
from lightning_prune.serialization import record as records
from lightning_prune.surgery import optimizer_state as optimizers
from lightning_prune.surgery import proof as proving
from lightning_prune.surgery import prune as surgery
from lightning_prune.testing import randomise_
from tests.support.nets import Attention, Small, assert_same, random_units

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(5))
ROOT = Path(__file__).parents[2]


class Mixed(nn.Module):
    """Convolutions, and heads whose number is an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.embed = Small(), nn.Conv2d(3, 12, 4, 4)
        self.attention, self.head = Attention(12, 4), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x).flatten(2).transpose(1, 2)
        return self.body(x) + self.head(self.attention(tokens).sum(1))


def build() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = randomise_(Mixed())
    return model, torch.optim.Adam(model.parameters(), lr=0.01)


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model.train()(X).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def save(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, record: PruningRecord) -> None:
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, folder / "state.part")
    (folder / "state.part").replace(folder / "state.pt")
    record.save(folder / "record.json")


def load(folder: Path) -> tuple[nn.Module, torch.optim.Optimizer, PruningRecord]:
    model, optimizer = build()
    record = PruningRecord.load(folder / "record.json")
    record.apply_(model)
    states = torch.load(folder / "state.pt", weights_only=True)
    model.load_state_dict(states["model"])
    optimizer.load_state_dict(states["optimizer"])
    return model, optimizer, record


def prune_once(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> PruningRecord:
    graph = trace(model, X)
    remove = random_units(graph, seed, 0.3, among=graph.prunable)
    return prune_(model, graph, remove, [optimizer])


def start(folder: Path) -> None:
    """Save a network that was cut once, and trained before and after."""
    model, optimizer = build()
    step(model, optimizer)
    record = prune_once(model, optimizer, seed=0)
    step(model, optimizer)
    save(folder, model, optimizer, record)


# Where it stops: the function that does the step, and after how many calls of it.
POINTS: dict[str, tuple[Any, str, int]] = {
    "half of the tensors are cut": (surgery, "set_data", 8),
    "half of the optimizer's state is cut": (optimizers, "_cut_entry", 8),
    "one attribute is set": (surgery, "set_attribute", 1),
    "the smaller network is traced": (proving, "analyse", 1),
    "the record is half written": (records.Path, "write_text", 0),
}

NIGHTLY = ("half of the optimizer's state is cut", "one attribute is set")  # seconds each


def stopping(function: Callable[..., Any], after: int) -> Callable[..., Any]:
    """Return ``function`` that prints and then waits to be killed, once it was called ``after`` times."""
    calls = 0

    def stop(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        result = None if after == 0 else function(*args, **kwargs)
        if after == 0:
            args[0].write_bytes(b'{"version": 1, "kept": {"bo')  # the part that was written in time
        if (calls := calls + 1) >= after:
            print("here", flush=True)
            time.sleep(600)
        return result

    return stop


def continue_run(folder: Path, point: str | None) -> None:
    """Load, cut and save, as the process does that is killed, and as is done again afterwards."""
    model, optimizer, before = load(folder)
    if point is not None:
        owner, name, after = POINTS[point]
        setattr(owner, name, stopping(getattr(owner, name), after))
    later = prune_once(model, optimizer, seed=1)
    step(model, optimizer)
    both = before.then(later)
    if point is None:
        save(folder, model, optimizer, both)
    else:
        both.save(folder / "record.json")


def killed(folder: Path, point: str) -> int:
    call = f"t.continue_run(t.Path({str(folder)!r}), {point!r})"
    command = f"from tests.integration import test_killed_in_surgery as t; {call}"
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    process = subprocess.Popen(
        [sys.executable, "-c", command],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    with process, process.stdout:
        reached = process.stdout.readline()
        process.kill()
    assert reached == "here\n"
    return process.returncode


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders with the files before, and with those written if nothing goes wrong."""
    before, after = tmp_path_factory.mktemp("before"), tmp_path_factory.mktemp("after")
    start(before)
    start(after)
    continue_run(after, None)
    return before, after


@pytest.mark.parametrize(
    "point", [pytest.param(p, marks=[pytest.mark.slow] if p in NIGHTLY else []) for p in POINTS]
)
def test_files_on_disk_still_load_and_are_cut_as_without_interruption(point, folders, tmp_path):
    before, after = folders
    shutil.copytree(before, tmp_path, dirs_exist_ok=True)
    assert killed(tmp_path, point) == -9
    model, optimizer, record = load(tmp_path)
    expected, its_optimizer, its_record = load(before)
    assert record == its_record
    assert_same(model.state_dict(), expected.state_dict())
    assert_same(optimizer.state_dict()["state"], its_optimizer.state_dict()["state"])
    continue_run(tmp_path, None)
    model, _, record = load(tmp_path)
    expected, _, its_record = load(after)
    assert record == its_record
    assert record.kept["body.stem.weight"] != load(before)[2].kept["body.stem.weight"]
    assert torch.equal(model.eval()(X), expected.eval()(X))
    names = sorted(path.name for path in tmp_path.iterdir())
    half_written = [name for name in names if name.endswith(".part")]  # the killed process did not remove it
    assert len(half_written) == (point == "the record is half written")
    assert [name for name in names if name not in half_written] == ["record.json", "state.pt"]


def test_the_network_of_these_tests_needs_every_step_that_is_interrupted(folders):
    record = PruningRecord.load(folders[1] / "record.json")
    assert record.attributes["attention.num_heads"] < 4
    assert len(record.kept) > 16
