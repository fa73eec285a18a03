"""The zoo: three small networks with both tools, the tables, resuming, and the limits of a process."""

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch_pruning")
pytest.importorskip("timm")

from benchmarks.speed.scaling import slope
from benchmarks.zoo import __main__ as zoo
from benchmarks.zoo.networks import catalogue
from benchmarks.zoo.ours import verdict
from benchmarks.zoo.report import Summary
from benchmarks.zoo.worker import Limit, context, run

CONVOLUTIONS, TRANSFORMER, SHUFFLE = (
    "torchvision/resnet18",
    "timm/pit_ti_224",
    "torchvision/shufflenet_v2_x0_5",
)


def visit(folder: Path, name: str, *more: str) -> list[dict[str, Any]]:
    results = folder / "zoo.jsonl"
    zoo.main(["--only", name, "--results", str(results), "--docs", str(folder), *more])
    return [json.loads(line) for line in results.read_text().splitlines()]


@pytest.fixture(scope="module")
def visited(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("zoo")
    rows = [visit(folder, name, "--resume") for name in (CONVOLUTIONS, TRANSFORMER, SHUFFLE)][-1]
    return folder, rows


def test_ours_is_proven_and_right(visited: tuple[Path, list[dict[str, Any]]]) -> None:
    ours = [row for row in visited[1] if row["tool"] == "ours"]
    assert [row["network"] for row in ours] == [CONVOLUTIONS, TRANSFORMER, SHUFFLE]
    for row in ours:
        assert (row["status"], row["verdict"]) == ("proven", "right"), row
        assert min(row["dead"], row["zeroed"]) < 1e-4 < row["effect"]
        assert 0 < row["lowest"] < 0.5
        assert {"trace", "plan", "surgery", "proof"} == set(row["cpu"])


def test_torch_pruning_is_checked(visited: tuple[Path, list[dict[str, Any]]]) -> None:
    peer = {row["network"]: row for row in visited[1] if row["tool"] == "torch-pruning"}
    assert peer[CONVOLUTIONS]["status"] == "passed"
    assert min(peer[CONVOLUTIONS]["dead"], peer[CONVOLUTIONS]["zeroed"]) < 1e-4
    assert peer[SHUFFLE]["status"] in ("raised", "broken", "wrong")  # issues 45 and 14 of torch-pruning


def test_tables_start_with_the_summary(visited: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, _ = visited
    page = (folder / "zoo.md").read_text()
    assert "3 of 3 networks pruned with a proof" in page
    assert page.index("pruned with a proof") < page.index(f"| {CONVOLUTIONS} |")
    summary = json.loads((folder / "data" / "zoo.json").read_text())["summary"]
    assert summary["measured"] == summary["right"] == 3
    assert summary["wrong"] == 0


def test_resuming_repeats_nothing_and_only_failed_repeats_failures(tmp_path: Path) -> None:
    success = {
        "network": CONVOLUTIONS,
        "tool": "ours",
        "status": "proven",
        "verdict": "right",
        "at": "",
        "total": 0,
    }
    failure = {**success, "network": SHUFFLE, "status": "refused", "verdict": None, "reason": "made up"}
    (tmp_path / "zoo.jsonl").write_text(f"{json.dumps(success)}\n{json.dumps(failure)}\n")
    for name in (CONVOLUTIONS, SHUFFLE):
        assert len(visit(tmp_path, name, "--tools", "ours", "--resume")) == 2
    assert len(visit(tmp_path, CONVOLUTIONS, "--tools", "ours", "--resume", "--only-failed")) == 2
    rows = visit(tmp_path, SHUFFLE, "--tools", "ours", "--resume", "--only-failed")
    assert rows[2]["status"] == "proven"


@pytest.mark.parametrize(
    ("limit", "status"), [(Limit(0.01, 1e6), "timeout"), (Limit(100, 10), "memory")], ids=["time", "memory"]
)
def test_limits_stop_a_process(limit: Limit, status: str) -> None:
    assert run(context(), "ours", "torchvision/vgg11", limit)["status"] == status


def test_a_network_that_cannot_be_built_is_a_row() -> None:
    row = run(context(), "ours", "no/such network", Limit(60, 1e6))
    assert row["status"] == "unusable"


def test_ratio_is_over_networks_that_both_pass() -> None:
    ours = {name: {"status": "proven", "cpu": {"trace": 1.0}} for name in "abc"}
    peer = {
        "a": {"status": "passed", "cpu": {"build": 4.0}},
        "b": {"status": "passed", "cpu": {"build": 1.0}},
        "c": {"status": "wrong", "cpu": {"build": 100.0}},
    }
    assert Summary(3, ours, peer).facts()["times_faster"] == 2.0


def test_catalogue_has_no_name_twice_and_enough_of_each() -> None:
    names = [network.name for network in catalogue()]
    assert len(set(names)) == len(names)
    libraries = {
        library: [n for n in names if n.startswith(library)] for library in ("torchvision", "smp", "timm")
    }
    assert len(libraries["timm"]) >= 150
    assert len(libraries["torchvision"]) >= 80
    decoders = {name.split("/")[1].split("-")[0] for name in libraries["smp"]}
    assert len(decoders) == 12


def test_slope_of_a_square_is_two() -> None:
    rows = [{"layers": n, "whole": n**2.0} for n in (50, 100, 200)]
    assert slope(rows, "whole") == pytest.approx(2)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"dead": 1e-7, "zeroed": 0.3, "effect": 0.9}, "right"),
        ({"dead": 0.0, "zeroed": 0.0, "effect": 0.0}, "proof only"),
        ({"dead": 0.2, "zeroed": 0.2, "effect": 0.9}, "wrong"),
        ({"dead": 0.2, "zeroed": 0.2, "dead64": 1e-12, "zeroed64": 0.2, "effect": 0.9}, "right"),
    ],
    ids=["one oracle", "no effect", "wrong", "double precision"],
)
def test_verdict(row: dict[str, float], expected: str) -> None:
    assert verdict(row) == expected
