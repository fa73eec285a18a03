"""Communication between processes, of which the others are simulated."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torch import distributed

from lightning_prune.utils.distributed import from_first, gather_all, world_size
from lightning_prune.utils.passing import on_all


def refuse(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("the other process waits for the end of from_first")


@pytest.fixture
def _first_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {
        "is_initialized": lambda: True,
        "get_world_size": lambda: 2,
        "get_rank": lambda: 0,
        "broadcast_object_list": lambda values, src: None,
        "all_gather_object": refuse,
    }
    for name, change in changes.items():
        monkeypatch.setattr(distributed, name, change)


@pytest.mark.usefixtures("_first_of_two")
def test_what_the_first_process_runs_alone_does_not_wait_for_the_others():
    assert from_first(lambda: (gather_all(3), on_all(lambda: 4))) == ([3], 4)
    assert world_size() == 2


@pytest.mark.usefixtures("_first_of_two")
def test_an_error_of_the_first_process_ends_its_time_alone():
    with pytest.raises(ZeroDivisionError):
        from_first(lambda: 1 / 0)
    assert world_size() == 2


ROOT = Path(__file__).parents[2]
_TRACE_IN_A_GROUP = """
import sys
from torch import distributed, randn
from lightning_prune import trace
from tests.support.nets import Small

distributed.init_process_group("gloo", init_method=f"file://{sys.argv[1]}/store", rank=0, world_size=1)
before = sys.getrefcount(distributed.group.WORLD)
trace(Small(), randn(2, 3, 12, 12))
assert sys.getrefcount(distributed.group.WORLD) == before, "tracing holds the process group"
distributed.destroy_process_group()
"""


def test_tracing_does_not_hold_the_process_group(tmp_path: Path):
    """A group that outlives its end has threads that can abort the process when the interpreter ends."""
    subprocess.run([sys.executable, "-c", _TRACE_IN_A_GROUP, str(tmp_path)], check=True, cwd=ROOT)
