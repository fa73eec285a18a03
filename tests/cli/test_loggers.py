"""Tests of the loggers of experiment trackers: W&B offline, MLflow on a real local server, Trackio's database."""

from __future__ import annotations

import csv
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lightning_prune.cli import surroundings
from lightning_prune.reporting.run_folder import Summary, find_runs
from tests.cli.test_main import lightning_prune, write_squares

pytestmark = [
    pytest.mark.filterwarnings("ignore:budget .* not met"),
    pytest.mark.filterwarnings("ignore:GPU available but not used"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
START_SECONDS = 90  # of MLflow's server, which imports much


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return overrides for a run of a second."""
    root = write_squares(tmp_path_factory.mktemp("squares"))
    data = ["data=folder", f"data.root={root}", "task.num_classes=2", "task.in_channels=1"]
    net = ["task.height=32", "task.width=32", "net=ritnet", "net.width=4", "prune=l1"]
    quick = ["trainer=fast_dev", "threads=1", "latency_runs=0", "report=false", "prune.start_epoch=0"]
    return [*data, *net, *quick]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Start MLflow's server with a store in files, and yield its address."""
    pytest.importorskip("mlflow", reason="needs lightning-prune[mlflow]")
    folder = tmp_path_factory.mktemp("mlflow")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Not `mlflow server`: it imports SQLAlchemy 2, and Hydra's Optuna sweeper needs 1.4. The application is the same.
    store = {"_MLFLOW_SERVER_FILE_STORE": f"sqlite:///{folder}/mlflow.db"}
    store |= {"_MLFLOW_SERVER_ARTIFACT_ROOT": str(folder / "artifacts")}
    command = [sys.executable, "-m", "flask", "--app", "mlflow.server:app", "run", "--port", str(port)]
    process = subprocess.Popen(
        command, cwd=folder, env=os.environ | store, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        wait_for(f"http://127.0.0.1:{port}/health", process)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


def wait_for(url: str, process: subprocess.Popen[bytes]) -> None:
    for _ in range(2 * START_SECONDS):
        assert process.poll() is None, "the server has ended"
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            time.sleep(0.5)
    raise TimeoutError(url)


def logged(run: Path, key: str) -> list[float]:
    """Return what CSVLogger wrote, epoch by epoch."""
    with (run / "csv" / "metrics.csv").open() as file:
        return [float(row[key]) for row in csv.DictReader(file) if row[key]]


def test_mlflow_has_the_metrics_and_settings_of_a_run(server: str, tiny: list[str], tmp_path: Path) -> None:
    from mlflow.tracking import MlflowClient

    tracked = ["logger=mlflow", f"logger.mlflow.tracking_uri={server}", "logger.mlflow.experiment_name=it"]
    lightning_prune("seed=2", *tiny, *tracked, f"hydra.run.dir={tmp_path}")
    client, summary = MlflowClient(server), Summary.load(tmp_path)
    experiment = client.get_experiment_by_name("it")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    history: list[Any] = client.get_metric_history(run.info.run_id, "train/loss")
    assert [point.value for point in history] == pytest.approx(logged(tmp_path, "train/loss"))
    assert run.data.metrics["test/miou"] == pytest.approx(summary.test["miou"])
    assert (run.data.params["seed"], run.data.params["prune/budget/macs"]) == ("2", "0.5")
    assert (run.info.status, run.info.run_name) == ("FINISHED", str(tmp_path))


def test_wandb_writes_a_run_of_its_own_for_each_run_of_a_sweep(tiny: list[str], tmp_path: Path) -> None:
    """Lightning leaves a run of W&B open; the second run of a sweep was written into the first."""
    wandb = pytest.importorskip("wandb", reason="needs lightning-prune[wandb]")
    tracked = ["logger=wandb", "logger.wandb.offline=true"]
    lightning_prune("-m", "seed=1,2", *tiny, *tracked, f"hydra.sweep.dir={tmp_path}")
    assert wandb.run is None
    runs = find_runs([tmp_path])
    assert [run.status for run in runs.values()] == ["completed"] * 2
    for folder, run in runs.items():
        (written,) = folder.glob("wandb/offline-run-*/run-*.wandb")
        content = written.read_bytes()
        assert all(key.encode() in content for key in run.test)
        assert str(folder).encode() in content
        assert len(logged(folder, "val/miou")) == 2


def test_trackio_gets_each_run_of_a_sweep_with_its_configuration_and_tests(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its database is read back in a process of its own, as its page does."""
    pytest.importorskip("trackio", reason="needs lightning-prune[trackio]")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "database"))
    training = "from lightning_prune.cli.main import main; main()"
    arguments = ["-m", "seed=1,2", *tiny, "logger=trackio", f"hydra.sweep.dir={tmp_path / 'runs'}"]
    subprocess.run([sys.executable, "-c", training, *arguments], check=True)
    for folder, run in find_runs([tmp_path / "runs"]).items():
        read = "import json, sys; from trackio.sqlite_storage import SQLiteStorage as S; "
        read += "print(json.dumps([S.get_logs(*sys.argv[1:]), S.get_run_config(*sys.argv[1:])]))"
        command = [sys.executable, "-c", read, "lightning-prune", str(folder)]
        rows, config = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        assert config["seed"] == run.seed
        assert [row["train/loss"] for row in rows if "train/loss" in row] == pytest.approx(
            logged(folder, "train/loss")
        )
        assert rows[-1]["test/miou"] == pytest.approx(run.test["miou"])


@pytest.mark.parametrize("package", ["mlflow", "wandb", "trackio"])
def test_a_missing_package_of_a_logger_is_named_before_the_training(
    package: str,
    tiny: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(surroundings, "find_spec", lambda name: None if name == package else True)
    with pytest.raises(SystemExit):
        lightning_prune(*tiny, f"logger={package}", f"hydra.run.dir={tmp_path / 'run'}")
    assert f"pip install 'lightning-prune[{package}]'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_server_that_does_not_answer_is_named_before_the_training(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(surroundings, "find_spec", lambda name: True)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        uri = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(SystemExit):
            lightning_prune(
                *tiny,
                "logger=mlflow",
                f"logger.mlflow.tracking_uri={uri}",
                f"hydra.run.dir={tmp_path / 'run'}",
            )
    assert f"no MLflow server answers at {uri}" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
