"""Tests of sweeps: what runs return, Optuna and joblib, and sweeps that go on after they were interrupted."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from lightning_prune import load_pruned
from lightning_prune.cli.sweep_state import SweepState
from lightning_prune.reporting.examples import Examples
from lightning_prune.reporting.run_folder import NET, Summary, find_runs
from tests.cli.test_main import lightning_prune, tiny_run, write_squares
from tests.support.heard_signals import heard  # noqa: F401

pytestmark = [
    pytest.mark.filterwarnings("ignore:budget .* not met"),
    pytest.mark.filterwarnings("ignore:GPU available but not used"),
    pytest.mark.filterwarnings(
        "ignore::DeprecationWarning:(optuna|sqlalchemy|alembic|hydra_plugins|joblib).*"
    ),
    pytest.mark.filterwarnings("ignore:.*SQLAlchemy 2.0"),
    pytest.mark.filterwarnings("ignore:.*(multi-threaded|fork)"),
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return overrides for a run of a second."""
    return [*tiny_run(write_squares(tmp_path_factory.mktemp("squares"))), "prune.start_epoch=0"]


def failing(*arguments: str) -> int | str:
    with pytest.raises(SystemExit) as ended:
        lightning_prune(*arguments)
    return ended.value.code


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / NET, weights_only=True)["state_dict"]


def score_by_hand(run: Path) -> float:
    """Return the mIoU of the written network on the validation set."""
    config = OmegaConf.load(run / "config.yaml")
    assert isinstance(config, DictConfig)
    net = load_pruned(instantiate(config.net, _convert_="all"), run / NET).eval()
    data = instantiate(config.data, _convert_="all")
    images, masks = next(iter(data.val_dataloader()))
    with torch.no_grad():
        classes = net(images).argmax(1)
    ious = [((classes == c) & (masks == c)).sum() / ((classes == c) | (masks == c)).sum() for c in (0, 1)]
    return float(sum(ious)) / 2


def test_optuna_maximises_the_score_of_the_final_network_in_val(tiny: list[str], tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    search = ["sweep=optuna", "hydra.sweeper.n_trials=3", f"hydra.sweep.dir={tmp_path}"]
    lightning_prune("-m", *search, "optimizer.lr=interval(0.01,0.05)", "seed=2", *tiny)
    runs = find_runs([tmp_path])
    scores = {run: summary.objective["val/miou"] for run, summary in runs.items()}
    assert len(set(scores.values())) > 1
    for run, score in scores.items():
        assert score == pytest.approx(score_by_hand(run), abs=1e-5)
    last = {run: summary.curves[-1]["val/miou"] for run, summary in runs.items()}  # before the last cut
    assert last != pytest.approx(scores)
    best = OmegaConf.load(tmp_path / "optimization_results.yaml")
    assert best.best_value == max(scores.values())
    winner = max(scores, key=lambda run: scores[run])
    assert runs[winner].overrides["optimizer.lr"] == str(best.best_params["optimizer.lr"])


def test_optuna_finds_the_pareto_front_of_two_objectives(tiny: list[str], tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    both = ["objective=[val/miou,macs]", "hydra.sweeper.direction=[maximize,minimize]"]
    search = ["sweep=optuna", "hydra.sweeper.n_trials=3", f"hydra.sweep.dir={tmp_path}"]
    lightning_prune(
        "-m", *search, *both, "optimizer.lr=interval(0.001,0.1)", "net.width=4,8", *without_width(tiny)
    )
    points = [tuple(summary.objective.values()) for summary in find_runs([tmp_path]).values()]
    front = [p for p in points if not any(q[0] >= p[0] and q[1] <= p[1] and q != p for q in points)]
    found = OmegaConf.load(tmp_path / "optimization_results.yaml").solutions
    assert sorted(tuple(each["values"]) for each in found) == sorted(set(front))
    assert all(set(run.objective) == {"val/miou", "macs"} for run in find_runs([tmp_path]).values())


def without_width(overrides: list[str]) -> list[str]:
    return [item for item in overrides if not item.startswith("net.width=")]


def test_optuna_marks_runs_that_fail_and_goes_on(
    tiny: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    search = ["sweep=optuna", "hydra.sweeper.n_trials=4", f"hydra.sweep.dir={tmp_path}"]
    assert failing("-m", *search, "prune.limits.layers=0.5,2", *tiny) == 1
    assert {run.status for run in find_runs([tmp_path]).values()} == {"completed", "failed"}
    assert OmegaConf.load(tmp_path / "optimization_results.yaml").best_value > 0
    text = capfd.readouterr().out
    assert re.search(r"\d of \d runs not completed:", text)
    assert "limit layers=2 must be a share" in text


def test_a_sweep_that_was_interrupted_goes_on_with_the_run_in_which_it_was(
    tiny: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    mark = tmp_path / "mark"
    stop = f"+callbacks.stop={{_target_:tests.support.signals.SignalOnce,name:SIGTERM,epoch:1,mark:{mark},seed:2}}"
    command = ["-m", "seed=1,2,3", *(word for word in tiny if word != "logger=none"), "logger=csv", stop]
    assert failing(*command, f"hydra.sweep.dir={tmp_path / 'sweep'}") == 143
    state = SweepState.load(tmp_path / "sweep")
    assert state is not None
    assert (state.status, state.runs) == ("interrupted", 3)
    assert f"to go on: {state.command(tmp_path / 'sweep')}" in capfd.readouterr().err
    runs = find_runs([tmp_path / "sweep"])
    assert [run.status for run in runs.values()] == ["completed", "interrupted"]
    before = (tmp_path / "sweep" / "0" / NET).stat().st_mtime_ns
    lightning_prune(*command, f"hydra.sweep.dir={tmp_path / 'sweep'}")
    text = capfd.readouterr().out
    assert f"1/3 │ finished before: {tmp_path / 'sweep' / '0'}" in text
    assert "2/3 │ goes on from" in text
    assert (tmp_path / "sweep" / "0" / NET).stat().st_mtime_ns == before
    lightning_prune(*command, f"hydra.sweep.dir={tmp_path / 'whole'}")
    for number in "012":
        expected, got = (Summary.load(tmp_path / name / number) for name in ("whole", "sweep"))
        assert (got.status, got.test, got.objective) == ("completed", expected.test, expected.objective)
        assert [row["epoch"] for row in got.curves] == [0, 1]
        assert (got.val_confusion, got.dense_epoch) == (expected.val_confusion, 1)
        assert list(got.val_confusion) == ["dense", "final"]
        pictures = [Examples.load(tmp_path / name / number) for name in ("sweep", "whole")]
        assert pictures[0].dense_epoch == pictures[1].dense_epoch == 1
        for network in ("dense", "final"):
            assert all(map(np.array_equal, *(each.outputs[network] for each in pictures)))
        mine, theirs = (weights(tmp_path / name / number) for name in ("sweep", "whole"))
        assert all(torch.equal(mine[key], value) for key, value in theirs.items())
        logs = [(tmp_path / name / number / "csv" / "metrics.csv").read_text() for name in ("sweep", "whole")]
        assert logs[0] == logs[1]


@pytest.mark.parametrize("stored", [True, False])
def test_a_search_that_was_interrupted_makes_the_trials_that_are_left(
    stored: bool, tiny: list[str], tmp_path: Path
) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    mark, sweep = tmp_path / "mark", tmp_path / "sweep"
    stop = f"+callbacks.stop={{_target_:tests.support.signals.SignalOnce,name:SIGINT,epoch:1,mark:{mark},seed:2}}"
    storage = [f"hydra.sweeper.storage=sqlite:///{tmp_path}/study.db", "hydra.sweeper.study_name=it"]
    search = [
        "sweep=optuna",
        "hydra.sweeper.n_trials=3",
        f"hydra.sweep.dir={sweep}",
        *(storage if stored else []),
    ]
    grid = ["hydra.sweeper.sampler.seed=3", "seed=1,2", "optimizer.lr=interval(0.001,0.1)"]
    command = ["-m", *search, *grid, *tiny, stop]
    assert failing(*command) == 130
    first = find_runs([sweep])
    assert [run.status for run in first.values()][-1] == "interrupted"
    lightning_prune(*command)
    runs = find_runs([sweep])
    assert [run.status for run in runs.values()] == ["completed"] * 3
    interrupted = list(first.values())[-1].overrides
    assert sum(run.overrides == interrupted for run in runs.values()) == 1
    best = OmegaConf.load(sweep / "optimization_results.yaml").best_value
    assert best == max(run.objective["val/miou"] for run in runs.values())
    made = [(folder, (folder / NET).stat().st_mtime_ns) for folder in runs]
    lightning_prune(*command)  # finished: nothing is left to do
    assert [(folder, (folder / NET).stat().st_mtime_ns) for folder in find_runs([sweep])] == made


def test_a_folder_with_another_sweep_is_refused(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lightning_prune("-m", "seed=1,2", *tiny, f"hydra.sweep.dir={tmp_path}")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    for other in (["seed=1,2,3", *tiny], ["seed=1,2", *tiny, "optimizer.lr=0.5"]):
        capsys.readouterr()
        assert failing("-m", *other, f"hydra.sweep.dir={tmp_path}") == 1
        assert f"{tmp_path} holds another sweep" in capsys.readouterr().err
    own = tmp_path.with_name("own")
    (own / "experiment").mkdir(parents=True)
    for text in ("0.01", "0.02"):
        (own / "experiment" / "e.yaml").write_text(f"# @package _global_\noptimizer:\n  lr: {text}\n")
        command = ["--config-dir", str(own), "-m", "experiment=e", *tiny, f"hydra.sweep.dir={own / 'sweep'}"]
        if text == "0.01":
            lightning_prune(*command)
        else:
            assert failing(*command) == 1
    assert "optimizer.lr: 0.01, now 0.02" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["objective=test/miou"], "the test set must not decide; choose by val/miou"),
        (["objective=latency"], "did you mean objective=latency_ms?"),
        (["objective=latency_ms", "latency_runs=0"], "set latency_runs=30"),
    ],
)
def test_a_wrong_objective_is_refused_before_anything_is_started(
    overrides: list[str], message: str, tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert failing("-m", "seed=1,2", *tiny, *overrides, f"hydra.sweep.dir={tmp_path / 'no'}") == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_objectives_and_directions_must_be_equally_many(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    command = ["-m", "sweep=optuna", "objective=[val/miou,macs]", *tiny, f"hydra.sweep.dir={tmp_path / 'no'}"]
    assert failing(*command) == 1
    assert "hydra.sweeper.direction=[maximize,minimize]" in capsys.readouterr().err


def test_a_metric_that_nobody_logs_ends_the_sweep_in_its_first_run(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert failing("-m", "seed=1,2", "objective=val/mio", *tiny, f"hydra.sweep.dir={tmp_path}") == 1
    text = capsys.readouterr().err
    assert "nothing logs this metric" in text
    assert "did you mean objective=val/miou?" in text
    assert [run.name for run in find_runs([tmp_path])] == ["0"]


def test_runs_of_joblib_give_the_same_results_as_one_after_another(tiny: list[str], tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    for name, launcher in (("one", []), ("two", ["sweep=joblib"])):
        lightning_prune("-m", *launcher, "seed=1,2", *tiny, f"hydra.sweep.dir={tmp_path / name}")
    for number in "01":
        one, two = (weights(tmp_path / name / number) for name in ("one", "two"))
        assert all(torch.equal(one[key], value) for key, value in two.items())
    groups = json.loads((tmp_path / "two" / "sweep.json").read_text())
    assert groups[0]["completed"] == 2


def test_runs_of_submitit_give_the_same_results_as_one_after_another(tiny: list[str], tmp_path: Path) -> None:
    """The local executor starts processes as that of Slurm does, with pickled functions and results."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    for name, launcher in (("one", []), ("two", ["sweep=submitit"])):
        lightning_prune("-m", *launcher, "seed=1,2", *tiny, f"hydra.sweep.dir={tmp_path / name}")
    for number in "01":
        one, two = (weights(tmp_path / name / number) for name in ("one", "two"))
        assert all(torch.equal(one[key], value) for key, value in two.items())
    assert json.loads((tmp_path / "two" / "sweep.json").read_text())[0]["completed"] == 2


def test_runs_of_ray_give_the_same_results_as_one_after_another(
    tiny: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its workers begin in the folder where the cluster was started, not in that of the sweep."""
    pytest.importorskip("hydra_plugins.hydra_ray_launcher")
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("RAY_worker_niceness", "0")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    ray.init(num_cpus=2, include_dashboard=False)  # which the launcher then uses
    monkeypatch.chdir(tmp_path / "here")
    try:
        for name, launcher in (("one", []), ("two", ["sweep=ray"])):
            lightning_prune("-m", *launcher, "seed=1,2", *tiny, f"hydra.sweep.dir={name}")
    finally:
        ray.shutdown()
    for number in "01":
        one, two = (weights(tmp_path / "here" / name / number) for name in ("one", "two"))
        assert all(torch.equal(one[key], value) for key, value in two.items())
    assert json.loads((tmp_path / "here" / "two" / "sweep.json").read_text())[0]["completed"] == 2
    text = capfd.readouterr().out
    assert all(re.search(rf"\(run pid=\d+\) {number}/2 │ epoch 2/2", text) for number in "12")


def test_a_missing_launcher_is_answered_with_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    if __import__("importlib.util").util.find_spec("hydra_plugins.hydra_ray_launcher"):
        pytest.skip("the launcher is installed")
    assert failing("-m", "sweep=ray", "seed=1,2") == 1
    assert "pip install 'lightning-prune[ray]'" in capsys.readouterr().err
