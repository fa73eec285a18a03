"""Communication between processes, of which the others are simulated."""

from __future__ import annotations

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
