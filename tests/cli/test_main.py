"""Tests of the application: the files of runs and sweeps, and the messages for wrong input."""

from __future__ import annotations

import csv
import json
import shlex
import statistics
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from torch import nn

from lightning_prune import PruningRecord, trace
from lightning_prune.cli import demo as demo_module
from lightning_prune.cli.main import main
from lightning_prune.cli.sweep import main as sweep_main
from lightning_prune.reporting.layers import load_layers
from lightning_prune.reporting.run_folder import NET, Summary
from lightning_prune.serialization.saving import load_pruned

pytestmark = [
    pytest.mark.filterwarnings("ignore:budget .* not met"),
    pytest.mark.filterwarnings("ignore:GPU available but not used"),
]
RUN_FILES = {"config.yaml", "summary.json", "record.json", "net.pt", "report.png", "csv/metrics.csv"}
PAGE_FILES = {"report.html", "layers.json", "examples.npz"}


def write_squares(folder: Path, count: int = 14, size: int = 32) -> Path:
    """Write images of bright squares on noise, and their masks."""
    rng = np.random.default_rng(0)
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True)
    for number in range(count):
        mask = np.zeros((size, size), np.uint8)
        top, left = rng.integers(0, size // 2, 2)
        mask[top : top + size // 2, left : left + size // 2] = 1
        image = (120 * mask + rng.integers(0, 80, mask.shape)).astype(np.uint8)
        Image.fromarray(image).save(folder / "images" / f"{number}.png")
        Image.fromarray(mask).save(folder / "masks" / f"{number}.png")
    return folder


def tiny_run(root: Path) -> list[str]:
    """Return overrides for a run of seconds on images that :func:`write_squares` wrote."""
    data = ["data=folder", f"data.root={root}", "task.num_classes=2", "task.in_channels=1"]
    net = [
        "task.height=32",
        "task.width=32",
        "net=ritnet",
        "net.width=4",
        "prune=l1",
        "prune.compensate=false",
    ]
    return [*data, *net, "trainer=fast_dev", "threads=1", "latency_runs=0", "logger=none"]


@pytest.fixture(scope="module")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return overrides for a run of seconds."""
    root = write_squares(tmp_path_factory.mktemp("squares"))
    data = ["data=folder", f"data.root={root}", "task.num_classes=2", "task.in_channels=1"]
    size = ["task.height=32", "task.width=32", "net.encoder_depth=3", "net.decoder_channels=[32,16,8]"]
    return [*data, *size, "trainer=fast_dev", "threads=1", "prune.start_epoch=0", "latency_runs=2"]


def lightning_prune(*arguments: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["lightning-prune", *arguments])
        main()


@pytest.fixture(scope="module")
def sweep(small_run: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run a sweep with two good runs and two that fail; the command fails, but writes its table."""
    folder = tmp_path_factory.mktemp("sweep")
    varied = ["prune.criterion.omega=0.5,2", "seed=1,2"]
    with pytest.raises(SystemExit) as ended:
        lightning_prune("-m", *small_run, *varied, f"hydra.sweep.dir={folder}")
    assert ended.value.code == 1
    return folder


@pytest.fixture(scope="module")
def completed(sweep: Path) -> Path:
    """Return the folder of a completed run."""
    return sweep / "0"


def dense_net(run: Path) -> nn.Module:
    config = OmegaConf.load(run / "config.yaml")
    assert isinstance(config, DictConfig)
    net: nn.Module = instantiate(config.net, _convert_="all")
    return net


def test_a_run_writes_its_files(completed: Path) -> None:
    names = {path.relative_to(completed).as_posix() for path in completed.rglob("*") if path.is_file()}
    assert names >= RUN_FILES
    assert any(name.startswith("tensorboard/events") for name in names)
    assert "${" not in (completed / "config.yaml").read_text()


def test_metrics_are_logged_for_every_epoch(completed: Path) -> None:
    with (completed / "csv" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    for metric in ("val/miou", "prune/macs"):
        assert [row["epoch"] for row in rows if row[metric]] == ["0", "1"]
    logged = [float(row["prune/macs"]) for row in rows if row["prune/macs"]]
    assert logged == [row["prune/macs"] for row in Summary.load(completed).curves]


def test_the_checkpoint_is_the_pruned_network_and_scores_as_reported(completed: Path) -> None:
    summary, net = Summary.load(completed), load_pruned(dense_net(completed), completed / NET).eval()
    graph = trace(net, torch.zeros(1, 1, 32, 32))
    assert summary.final is not None
    assert summary.dense is not None
    assert graph.cost("macs") == summary.final.macs < summary.dense.macs
    data = instantiate(OmegaConf.load(completed / "config.yaml").data, _convert_="all")
    images, masks = next(iter(data.test_dataloader()))
    with torch.no_grad():
        classes = net(images).argmax(1)
    ious = [((classes == c) & (masks == c)).sum() / ((classes == c) | (masks == c)).sum() for c in (0, 1)]
    assert len(images) == len(data.samples("test"))
    assert summary.test["miou"] == pytest.approx(float(sum(ious)) / 2, abs=1e-5)


def test_the_confusion_of_both_networks_has_their_scores(completed: Path) -> None:
    def miou(matrix: list[list[int]]) -> float:
        counts = np.array(matrix)
        hits = counts.diagonal()
        return float((hits / (counts.sum(0) + counts.sum(1) - hits)).mean())

    summary = Summary.load(completed)
    assert summary.dense_epoch == 1
    assert miou(summary.val_confusion["dense"]) == pytest.approx(summary.curves[0]["val/miou"], abs=1e-5)
    assert miou(summary.val_confusion["final"]) == pytest.approx(summary.val["miou"], abs=1e-5)


def test_record_widths_and_cuts_agree(completed: Path) -> None:
    summary, record = Summary.load(completed), PruningRecord.load(completed / "record.json")
    assert record == PruningRecord.from_dict(torch.load(completed / "net.pt", weights_only=True)["record"])
    for layer, (before, after) in summary.widths.items():
        dims = record.kept.get(f"{layer}.weight", {})
        assert after == len(dims.get(0, range(before)))
    removed = sum(before - after for before, after in summary.widths.values())
    assert removed == sum(cut["filters"] for cut in summary.cuts) > 0


def test_a_failed_run_reports_its_error_and_the_other_runs_continue(sweep: Path) -> None:
    statuses = {run.name: Summary.load(run).status for run in sweep.iterdir() if run.is_dir()}
    assert statuses == {"0": "completed", "1": "completed", "2": "failed", "3": "failed"}
    assert Summary.load(sweep / "2").error == "prune.criterion: ValueError: omega must lie in [0, 1], got 2"
    assert "Traceback" in (sweep / "2" / "error.txt").read_text()


def test_the_table_has_mean_and_spread_over_seeds(sweep: Path) -> None:
    good, bad = json.loads((sweep / "sweep.json").read_text())
    scores = [Summary.load(sweep / run).test["miou"] for run in "01"]
    assert good["settings"] == {"prune.criterion.omega": "0.5"}
    assert good["mean"]["miou"] == pytest.approx(statistics.mean(scores))
    assert good["spread"]["miou"] == pytest.approx(statistics.stdev(scores))
    assert (good["completed"], bad["completed"], bad["mean"]) == (2, 0, {})
    text = (sweep / "sweep.md").read_text()
    assert f"{statistics.mean(scores):.4f} ± {statistics.stdev(scores):.4f}" in text
    assert "prune.criterion.omega=0.5,2 seed=1,2" in text
    with (sweep / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["seed"] for row in rows] == ["1", "2", "1", "2"]


def test_a_table_from_several_folders(
    sweep: Path, small_run: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense = [key for key in small_run if not key.startswith("prune.")]
    lightning_prune(*dense, "prune=none", "seed=1", f"hydra.run.dir={tmp_path / 'dense'}")
    output = capsys.readouterr().out
    assert "epoch 2/2" in output
    assert "| MACs " in output
    sweep_main([str(sweep / "0"), str(sweep / "1"), str(tmp_path / "dense"), "--out", str(tmp_path)])
    pruned, baseline = json.loads((tmp_path / "sweep.json").read_text())
    assert pruned["settings"] == {"prune.criterion.omega": "0.5", "prune.start_epoch": "0", "prune": "ipad"}
    assert baseline["settings"] == {"prune.criterion.omega": "-", "prune.start_epoch": "-", "prune": "none"}
    assert baseline["mean"]["macs"] == 100
    assert not PruningRecord.load(tmp_path / "dense" / "record.json")


def rows_of(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line[:1] == "|"]


def test_runs_are_compared_and_a_report_is_drawn_again(
    sweep: Path, completed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lightning_prune("compare", str(sweep), "--out", str(tmp_path))
    written = (tmp_path / "sweep.md").read_text()
    assert "| 0.5 " in written
    assert rows_of(written) == rows_of(capsys.readouterr().out)
    assert [row[0].strip(":-") for row in rows_of(written)] == ["run", "", "0, 1", "2, 3"]
    lightning_prune("compare", str(sweep / "0"), str(sweep / "2"))
    assert "Comparison of 2 runs" in (sweep / "compare.html").read_text()
    shown = capsys.readouterr().out
    named = [line.split("|")[1].strip() for line in shown.splitlines() if line.startswith("| ")]
    assert [named[0], *named[2:]] == ["run", "0", "2"]
    assert f"{Summary.load(sweep / '0').test['miou']:.4f}" in shown
    assert "failed: prune.criterion: ValueError: omega" in shown
    lightning_prune("report", str(completed), str(sweep / "1"), "--out", str(tmp_path / "again.png"))
    assert (tmp_path / "again.png").read_bytes().startswith(b"\x89PNG")
    assert str(tmp_path / "again.png") in capsys.readouterr().out
    picture = ["--out", str(tmp_path / "failed.png")]
    for words, message in (
        (["report", str(sweep / "2"), *picture], "is failed, there is nothing to draw: prune.criterion"),
        (["report", str(tmp_path)], "holds no run"),
        (["report", str(completed), "--metric", "val/mio"], "nobody logged 'val/mio'; did you mean 'miou'"),
        (["compare", str(tmp_path / "none")], "there is no folder .*none"),
    ):
        with pytest.raises(SystemExit, match=message):
            lightning_prune(*words)


def test_runs_and_sweeps_have_pages_and_get_them_again(
    sweep: Path, completed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert {path for path in PAGE_FILES if (completed / path).is_file()} == PAGE_FILES
    page = (completed / "report.html").read_text()
    assert "right before its first cut after 1 epoch of training" in page
    assert '"name":"repaired"' in page
    layers = load_layers(completed)
    assert all(layer.costs["latency"].before > 0 for layer in layers.layers)
    assert "(float32) on the CPU with 1 thread" in layers.measured
    assert layers.measured in page
    assert "0/report.html" in (sweep / "sweep.html").read_text()
    for path in PAGE_FILES:
        (completed / path).unlink()
    lightning_prune("report", str(sweep))
    assert {path for path in PAGE_FILES if (completed / path).is_file()} == PAGE_FILES
    assert "No dense network is there to compare with" in (completed / "report.html").read_text()
    lightning_prune("report", str(completed), str(sweep / "1"))
    assert "The dense network is that of the dense run." in (completed / "report.html").read_text()
    lightning_prune("report", str(sweep / "2"))
    assert "is failed: prune.criterion: ValueError: omega" in capsys.readouterr().out
    assert "The run failed: prune.criterion: ValueError" in (sweep / "2" / "report.html").read_text()


def test_a_page_that_cannot_be_written_is_one_warning_and_the_run_succeeds(
    small_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no room for pages")

    monkeypatch.setattr("lightning_prune.cli.pages.layers_of", fail)
    with pytest.warns(
        UserWarning, match=r"no page was written: RuntimeError: no room for pages; the results are"
    ):
        lightning_prune(*small_run, f"hydra.run.dir={tmp_path}")
    assert Summary.load(tmp_path).status == "completed"
    assert {path for path in RUN_FILES if (tmp_path / path).is_file()} == RUN_FILES
    assert not (tmp_path / "report.html").is_file()


OWN_NETWORK = """
from torch import nn

def tiny(width, classes):
    return nn.Sequential(nn.Conv2d(1, width, 3, 1, 1), nn.ReLU(), nn.Conv2d(width, classes, 1))
"""


def test_a_network_and_an_experiment_of_ones_own_folder(
    small_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "mine"
    for group in ("net", "experiment"):
        (own / group).mkdir(parents=True)
    (own / "net" / "tiny.yaml").write_text(
        "_target_: nets_of_my_own.tiny\nwidth: 16\nclasses: ${task.num_classes}\n"
    )
    (own / "experiment" / "first.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /net: tiny\nnet:\n  width: 24\n"
    )
    (own / "nets_of_my_own.py").write_text(OWN_NETWORK)
    monkeypatch.setattr(sys, "path", list(sys.path))
    data = [item for item in small_run if not item.startswith("net.")]
    run = tmp_path / "run"
    lightning_prune("--config-dir", str(own), "experiment=first", *data, "prune=l2", f"hydra.run.dir={run}")
    assert Summary.load(run).widths["0"][0] == 24
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != str(own)])
    monkeypatch.delitem(sys.modules, "nets_of_my_own")
    capsys.readouterr()
    lightning_prune("plan", str(run))  # the run remembers where its network is
    assert f"24 → {Summary.load(run).widths['0'][1]}" in capsys.readouterr().out


def test_a_run_resumed_from_its_last_checkpoint_ends_with_the_same_weights(
    small_run: list[str], tmp_path: Path
) -> None:
    more = ["prune.every_n_epochs=2", "scheduler=plateau", "checkpoint=last", "trainer.max_epochs=4"]
    whole, half, rest = (tmp_path / name for name in ("whole", "half", "rest"))
    lightning_prune(*small_run, *more, f"hydra.run.dir={whole}")
    lightning_prune(*small_run, *more, "trainer.max_epochs=2", f"hydra.run.dir={half}")
    lightning_prune(
        *small_run,
        *more,
        f"ckpt_path={half / 'checkpoints' / 'last.ckpt'}",
        "seed=7",
        f"hydra.run.dir={rest}",
    )
    expected, resumed = (torch.load(run / "net.pt", weights_only=True) for run in (whole, rest))
    assert resumed["record"] == expected["record"]
    assert len(Summary.load(rest).cuts) == 2
    assert all(torch.equal(resumed["state_dict"][name], w) for name, w in expected["state_dict"].items())


def test_a_run_with_checkpoint_best_tests_and_writes_the_best(small_run: list[str], tmp_path: Path) -> None:
    lightning_prune(
        *small_run,
        "checkpoint=best",
        "callbacks.best.monitor=val/loss",
        "prune.amount={macs:1}",
        "trainer.max_epochs=4",
        f"hydra.run.dir={tmp_path}",
    )
    (best,) = (tmp_path / "checkpoints").glob("best-epoch=*.ckpt")
    checkpoint = torch.load(best, weights_only=True)["state_dict"]
    written = torch.load(tmp_path / "net.pt", weights_only=True)["state_dict"]
    assert all(torch.equal(checkpoint[f"net.{name}"], w) for name, w in written.items())


@pytest.mark.filterwarnings("ignore:the teacher is worse than its student")  # after two epochs of two batches
def test_the_teacher_is_trained_once_and_reused(
    small_run: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("one", "two"):
        more = ["distill=all", f"teachers={tmp_path / 'teachers'}", f"hydra.run.dir={tmp_path / name}"]
        lightning_prune(*small_run, *more)
        summary = Summary.load(tmp_path / name)
        assert {"distill/hinton", "distill/attention", "distill/fsp"} <= set(summary.curves[-1])
        assert summary.cuts
    (teacher,) = (tmp_path / "teachers").iterdir()
    dense = Summary.load(teacher)
    assert not dense.cuts
    assert summary.curves[0]["teacher/miou"] == pytest.approx(dense.curves[-1]["val/miou"])
    assert capsys.readouterr().out.count("training the teacher") == 1
    assert json.loads((tmp_path / "one" / "record.json").read_text())["kept"]


def test_a_table_without_runs_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        sweep_main([str(tmp_path)])
    assert "holds no run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("traner=cpu", "Could not override 'traner'"),
        ("prune.criterion.omegga=1", "did you mean prune.criterion.omega=1?"),
        ("prune=ipadd", "Could not find prune='ipadd'"),
        ("seed", "settings have the form KEY=VALUE"),
    ],
)
def test_a_misspelt_override_is_named_without_a_traceback(
    override: str, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    with pytest.raises(SystemExit) as ended:
        lightning_prune(override)
    text = capsys.readouterr().err
    assert ended.value.code == 1
    assert message in text
    assert "Traceback" not in text


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data=folder", "data.root=.", "task.num_classes=2"], "there is no folder images"),
        (["prune.limits.min_channels=0"], "prune.limits: ValueError: "),
        (["net.encoder_name=resnet17"], "did you mean net.encoder_name=resnet18"),
    ],
)
def test_a_wrong_value_is_named_without_a_traceback(
    overrides: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    with pytest.raises(SystemExit, match=message) as ended:
        lightning_prune(*overrides, "trainer=fast_dev", f"hydra.run.dir={tmp_path}")
    assert str(tmp_path / "error.txt") in str(ended.value)
    assert ended.value.__suppress_context__
    assert Summary.load(tmp_path).status == "failed"


def test_the_command_in_the_table_of_a_sweep_can_be_repeated(sweep: Path) -> None:
    words = shlex.split((sweep / "sweep.md").read_text().splitlines()[0].strip("`"))
    assert words[:2] == ["lightning-prune", "-m"]
    assert "net.decoder_channels=[32,16,8]" in words


def test_the_demo_compares_dense_and_pruned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    small = ["net=ritnet", "net.width=4", "data.size=32", "data.slices_per_axis=8", "data.gap=0"]
    demo_module.main([*small, "trainer.max_epochs=2", "logger=none"])
    (folder,) = (tmp_path / "outputs" / "demo").iterdir()
    dense, pruned = Summary.load(folder / "dense"), Summary.load(folder / "pruned")
    assert dense.final is not None
    assert pruned.dense is not None
    assert dense.final.macs == pruned.dense.macs
    assert (dense.epochs, dense.pruned, pruned.epochs, pruned.pruned) == (2, False, 2, True)
    text = capfd.readouterr().out
    assert " dense │ epoch 2/2" in text
    assert "pruned │ epoch 2/2" in text
    assert f"| {dense.test['miou']:.4f} | {pruned.test['miou']:.4f} |" in " ".join(text.split())
    assert (folder / "report.png").is_file()
    assert "from the dense run" in (folder / "report.html").read_text()


def test_a_failing_demo_stops_both_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    wrong = [sys.executable, "-c", "raise SystemExit(3)"]
    waiting = [sys.executable, "-c", "import time; time.sleep(600)"]  # until it is stopped
    monkeypatch.setattr(demo_module, "command", lambda kind, *_: wrong if kind == "pruned" else waiting)
    with pytest.raises(SystemExit, match="the pruned run failed"):
        demo_module.main()
