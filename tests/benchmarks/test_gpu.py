"""The checks of ``python -m benchmarks.gpu``, in their small form on the CPU; all of them take a minute or two."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import __main__ as command
from benchmarks.gpu.checks import Check, Place, Skipped, run_check

WORDS = ("train in 32-true", "shrinking", "repair on the device", "speed-up of torchvision ResNet-50")


def run(tmp_path: Path, *options: str) -> dict[str, Any]:
    """Run the command on the CPU, and return what it wrote."""
    command.main(["--small", "--device", "cpu", "--out", str(tmp_path), *options])
    return json.loads((tmp_path / "gpu.json").read_text())


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(torch.device("cpu"), True, tmp_path / "files")


def test_small_checks_are_right_on_the_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    content = run(tmp_path, "--checks", *WORDS)
    outcomes = {row["name"]: (row["outcome"], row["reason"]) for row in content["rows"]}
    slow = outcomes.pop("speed-up of torchvision ResNet-50, compiled")
    assert slow[0] == "skipped"
    assert set(outcomes.values()) == {("ok", "")}
    assert len(outcomes) == len(WORDS)
    text = capsys.readouterr().out
    for part in (
        "4 checks are right, 0 failed, 1 were skipped",
        "## Speed-up",
        "## Training dense and shrinking",
    ):
        assert part in text


def test_names_of_checks_are_unique_and_correctness_comes_first():
    names = [check.name for check in command.CHECKS]
    assert len(set(names)) == len(names)
    groups = list(dict.fromkeys(check.group for check in command.CHECKS))
    assert groups == ["correctness", "latency", "memory", "compiled"]


def test_a_check_that_fails_is_recorded_and_the_next_one_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(place: Place) -> dict[str, Any]:
        # What is on disk now is what is left if this check ends the process.
        assert json.loads((tmp_path / "gpu.json").read_text())["rows"][0]["reason"] == "the process died"
        raise RuntimeError("no such kernel")

    checks = [
        Check("raises", "correctness", fail),
        Check("is wrong", "correctness", lambda place: {"loss": 1.0, "wrong": ["loss 1.0"]}),
        Check("is right", "latency", lambda place: {"ms": 2.0}),
    ]
    monkeypatch.setattr(command, "CHECKS", checks)
    with pytest.raises(SystemExit, match="1"):
        run(tmp_path)
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert [row["outcome"] for row in rows] == ["failed", "failed", "ok"]
    assert rows[0]["reason"] == "RuntimeError: no such kernel"
    assert "in fail" in rows[0]["traceback"]
    assert (rows[1]["reason"], rows[1]["figures"], rows[2]["figures"]) == (
        "loss 1.0",
        {"loss": 1.0},
        {"ms": 2.0},
    )


def test_no_check_is_started_after_the_limit_and_a_resume_makes_those_without_a_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    made: list[str] = []
    checks = [
        Check(name, "correctness", lambda place, name=name: made.append(name) or {})
        for name in ("first", "second", "third")
    ]
    monkeypatch.setattr(command, "CHECKS", checks)
    late = run(tmp_path, "--limit", "-1")
    assert [(row["outcome"], row["reason"]) for row in late["rows"]] == [("skipped", "no time was left")] * 3
    assert not made
    run(tmp_path, "--checks", "second")
    content = run(tmp_path, "--resume", "--skip", "third")
    assert made == ["second", "first"]
    assert [row["name"] for row in content["rows"]] == ["second", "first"]


def test_a_check_that_hangs_fails_after_its_time(place: Place):
    row = run_check(Check("hangs", "correctness", lambda place: time.sleep(30)), place, seconds=1)
    assert (row["outcome"], row["reason"]) == ("failed", "TimeoutError: not finished after 1 s")
    assert row["seconds"] < 10


def test_settings_of_the_process_are_restored_after_a_check(place: Place):
    def change(place: Place) -> dict[str, Any]:
        torch.set_float32_matmul_precision("medium")
        torch.use_deterministic_algorithms(True)
        raise Skipped("for a reason")

    row = run_check(Check("changes", "correctness", change), place)
    assert (row["outcome"], row["reason"]) == ("skipped", "for a reason")
    assert torch.get_float32_matmul_precision() == "highest"
    assert not torch.are_deterministic_algorithms_enabled()
