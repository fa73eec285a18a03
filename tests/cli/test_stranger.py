"""What strangers found broken or unclear at the command line: each of it a test."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from lightning.pytorch.trainer.states import TrainerFn
from omegaconf import OmegaConf
from PIL import Image
from torch import nn

from lightning_prune import __version__
from lightning_prune.cli import surroundings
from lightning_prune.cli.arguments import TrainArguments
from lightning_prune.cli.config import UsageError
from lightning_prune.cli.parsers import read
from lightning_prune.cli.preflight import check, composed
from lightning_prune.cli.quoting import quoted
from lightning_prune.cli.run_groups import Group, failures, table
from lightning_prune.data.image_files import read_image
from lightning_prune.graph import picture
from lightning_prune.graph.trace import TraceError, trace
from lightning_prune.reporting.figure import headline
from lightning_prune.reporting.objective import ObjectiveCheck, ObjectiveError
from lightning_prune.reporting.run_folder import Summary
from lightning_prune.serialization.model_card import ModelCard
from tests.cli.test_main import lightning_prune, small_run

__all__ = ["small_run"]  # a fixture
pytestmark = pytest.mark.filterwarnings("ignore:budget .* not met")

LATE = ("torch", "lightning", "nilearn")
RUN_COMMANDS = f"""
import sys
from lightning_prune.cli.commands import run_command
for line in sys.argv[1:]:
    try:
        run_command(*(words := line.split("|"))[:1], words[1:])
    except SystemExit as error:
        print(error)
print([name for name in {LATE} if name in sys.modules])
"""


def refusal(*arguments: str) -> str:
    with pytest.raises(UsageError) as refused:
        check(TrainArguments.parse(arguments))
    return str(refused.value)


def printed_without_torch(*commands: str) -> list[str]:
    """Return what commands, each with its arguments separated by ``|``, print before torch would be imported."""
    done = subprocess.run(
        [sys.executable, "-c", RUN_COMMANDS, *commands], capture_output=True, text=True, check=True
    )
    *lines, late = done.stdout.splitlines()
    assert late == "[]"
    return lines


def test_without_a_test_set_a_run_ends_with_scores_on_the_validation_set(
    small_run: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    lightning_prune(*small_run, "data.test=0", f"hydra.run.dir={run}")
    printed = capsys.readouterr().out
    summary = Summary.load(run)
    assert summary.status == "completed"
    assert summary.test == {}
    assert summary.val["miou"] == pytest.approx(
        float(printed.rpartition("val mIoU ")[2].split()[0]), abs=1e-3
    )
    assert "test    no test set" in printed.replace("\n", " ")
    assert "| val mIoU " in printed
    assert "nan" not in printed
    assert "val mIoU" in table([Group({}, {run: summary})]).markdown()


OWN_DATA = """
import lightning as L
import torch
from torch.utils.data import DataLoader, TensorDataset

class Stripes(L.LightningDataModule):
    def train_dataloader(self):
        images = torch.rand(8, 1, 32, 32, generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(images, (images[:, 0] > 0.5).long()), 4)

    def val_dataloader(self):
        return self.train_dataloader()
"""


def test_data_of_ones_own_need_no_test_loader(
    small_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "stripes_of_my_own.py").write_text(OWN_DATA)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "stripes.yaml").write_text("_target_: stripes_of_my_own.Stripes\n")
    monkeypatch.setattr(sys, "path", list(sys.path))
    own = ["--config-dir", str(tmp_path), "data=stripes"]
    others = [item for item in small_run if not item.startswith("data")]
    run = tmp_path / "run"
    lightning_prune(*own, *others, f"hydra.run.dir={run}")
    summary = Summary.load(run)
    assert (summary.status, summary.test) == ("completed", {})
    assert summary.scores == ("val", summary.val)
    message = refusal(*own, "task.num_classes=2", "task.in_channels=1")
    assert "task.height=...  the height of the images in pixels" in message
    assert "add for example: task.height=256 task.width=256" in message


def test_a_run_that_was_not_tested_says_so_instead_of_nan() -> None:
    assert headline(Summary(status="interrupted", curves=[{"epoch": 0, "val/accuracy": 0.5}])) == "not tested"


def test_a_failure_without_a_message_has_no_empty_one() -> None:
    run = Path("multirun/2")
    assert failures({run: Summary(status="interrupted")}) == ["multirun/2: interrupted"]


def test_a_budget_in_flops_is_answered_with_macs() -> None:
    expected = "did you mean prune.budget.macs=0.5? One MAC is two FLOPs"
    assert expected in refusal("data=fashion_mnist", "prune.budget={flops:0.5}")
    assert expected in refusal("data=fashion_mnist", "prune.budget.flops=0.5")


def test_a_misspelt_key_with_a_value_in_braces_is_answered_with_the_nearest() -> None:
    message = refusal("data=fashion_mnist", "prune.amuont={macs:0.1}")
    assert "did you mean prune.amount={macs:0.1}?" in message


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    message = refusal("data=fashion_mnist", f"hydra.run.dir={tmp_path / 'file' / 'run'}")
    assert f"because {tmp_path / 'file'} is a file: hydra.run.dir=FOLDER" in message
    monkeypatch.setattr(surroundings.os, "access", lambda path, mode: path != tmp_path)
    for flags in ([], ["-m", "seed=1,2"]):
        kind = "sweep" if flags else "run"
        message = refusal("data=fashion_mnist", f"hydra.{kind}.dir={tmp_path / 'new' / 'run'}", *flags)
        assert f"there is no permission to write into {tmp_path}." in message
        assert f"hydra.{kind}.dir=FOLDER" in message
    assert os.listdir(tmp_path) == ["file"]


def test_a_folder_that_cannot_be_entered_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    locked, user = tmp_path / "locked", os.geteuid()
    locked.mkdir(mode=0)
    config = OmegaConf.create({"hydra": {"run": {"dir": str(locked / "new" / "run")}}})
    monkeypatch.setattr(surroundings.os, "access", lambda path, mode: False)
    os.seteuid(user or 65534)  # root may enter any folder
    try:
        with pytest.raises(UsageError, match=r"there is no permission to write into .*\."):
            surroundings.check_writable(config, "run")
    finally:
        os.seteuid(user)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.root=Zellen über alles", "Zellen über alles"),
        ("data.root=日本/写真", "日本/写真"),
        ("data.root=it's", "it's"),
        ("data.root=a&b #2", "a&b #2"),
        ("data.root='Übung, 2'", "Übung, 2"),
        ("data.root=C:/Übung", "C:/Übung"),
        ("task.class_names=[Straße,Bäume am Weg,car]", ["Straße", "Bäume am Weg", "car"]),
    ],
)
def test_letters_of_all_languages_need_no_quotes(override: str, expected: object) -> None:
    own = "'task.class_names=[a,b]'", "data.root=x"
    config = composed(TrainArguments(["data=folder", "task.num_classes=3", *own[1:], override]))
    assert (config.data.root if override.startswith("data") else list(config.task.class_names)) == expected


def test_what_hydra_reads_already_stays_as_it_is() -> None:
    for override in ("net=fpn", "~x", "a={b:1,c:[2,'ä']}", "a=choice(1,2)", 'a="ü"', "-m", "a=[b"):
        assert quoted(override) == override
    assert quoted("a=ä,ö") == "a='ä','ö'"  # a sweep


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    lightning_prune("--version")
    assert capsys.readouterr().out == f"lightning-prune {__version__}\n"


def test_commands_name_missing_runs_before_torch_is_imported(tmp_path: Path) -> None:
    run, sweep = tmp_path / "run", tmp_path / "sweep"
    for folder in (run / "checkpoints", sweep / "0"):
        folder.mkdir(parents=True)
        (
            folder.parent / "config.yaml" if folder.name == "checkpoints" else folder / "config.yaml"
        ).write_text("")
    (sweep / "sweep_state.json").write_text("{}")
    (run / "checkpoints" / "last.ckpt").write_text("")
    gone = tmp_path / "gone"
    assert printed_without_torch(
        f"sensitivity|{gone}", f"export|{sweep}", f"sensitivity|{run}", f"export|{run}",
        f"report|{gone}", f"compare|{gone}", "plan|nowhere", f"prune|{gone}|out",
    ) == [
        f"lightning-prune sensitivity: {gone} holds no run: there is no {gone}/config.yaml",
        f"lightning-prune export: {sweep} is a sweep: give one of its runs, such as {sweep}/0",
        f"lightning-prune sensitivity: there is no {run}/net.pt; the run has not ended, and has no network yet; "
        f"to go on: the command of the run, and ckpt_path={run}/checkpoints/last.ckpt",
        f"lightning-prune export: there is no {run}/net.pt, the run has not ended: "
        f"give --weights {run}/checkpoints/last.ckpt",
        f"lightning-prune report: there is no folder {gone}: give the folder of a run or of a sweep",
        f"lightning-prune compare: there is no folder {gone}: give folders of runs or of sweeps",
        "lightning-prune plan: 'nowhere' is neither the folder of a run, nor KEY=VALUE, nor the import path of a "
        "network",
        f"lightning-prune prune: {gone} holds no run: there is no {gone}/config.yaml",
    ]  # fmt: skip


def test_early_checks_look_for_the_files_that_runs_write() -> None:
    from lightning_prune.cli import early_checks
    from lightning_prune.reporting import run_folder

    assert (early_checks.CONFIG, early_checks.NET) == (run_folder.CONFIG, run_folder.NET)


def test_export_says_what_to_install_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightning_prune.cli import early_checks
    from lightning_prune.cli.commands import run_command

    for name in ("config.yaml", "net.pt"):
        (tmp_path / name).write_text("")
    monkeypatch.setattr(early_checks, "find_spec", lambda name: None)
    for arguments in ([], ["--int8"], [str(tmp_path / "net.onnx")]):
        with pytest.raises(SystemExit, match=r"pip install 'lightning-prune\[export\]'"):
            run_command("export", [str(tmp_path), *arguments])


def test_latency_measures_networks_of_ones_own_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "net").mkdir()
    (tmp_path / "net" / "mine.yaml").write_text("_target_: net_to_measure.build\nwidth: 4\n")
    (tmp_path / "net_to_measure.py").write_text(
        "from torch import nn\n\ndef build(width):\n"
        "    return nn.Sequential(nn.Conv2d(1, width, 3), nn.Conv2d(width, 2, 1))\n"
    )
    monkeypatch.setattr(sys, "path", list(sys.path))
    lightning_prune(
        *("latency", str(tmp_path / "table.json"), "--config-dir", str(tmp_path), "net=mine", "--cuts", "1"),
        *(
            "data=folder",
            "data.root=x",
            "task.num_classes=2",
            "task.height=8",
            "task.width=8",
            "task.in_channels=1",
        ),
    )
    assert "ms, eager on cpu" in capsys.readouterr().out
    assert (tmp_path / "table.json").is_file()


def test_a_transposed_convolution_with_other_channels_is_refused_when_traced() -> None:
    net = nn.Sequential(nn.ConvTranspose2d(16, 8, 4), nn.Conv2d(8, 2, 1))
    with pytest.raises(TraceError, match="reads 16 channels, and its input has 1"):
        trace(net, torch.zeros(1, 1, 8, 8))
    assert trace(net, torch.zeros(1, 16, 8, 8)).cost("macs") == 16 * 8 * 16 * 64 + 8 * 2 * 121
    assert (
        trace(nn.ConvTranspose1d(4, 2, 3), torch.zeros(4, 8)).cost("macs") == 4 * 2 * 3 * 8
    )  # without a batch


def test_channels_that_go_several_at_a_time_are_counted_as_channels() -> None:
    net = nn.Sequential(
        nn.Conv2d(1, 16, 3), nn.GroupNorm(4, 16), nn.Conv2d(16, 16, 3, groups=16), nn.Conv2d(16, 2, 1)
    )
    text = str(trace(net, torch.zeros(1, 1, 16, 16)).summary())
    assert "A 16 channels, 4 at a time, shared by 0, 2" in text


def test_the_legend_of_a_small_network_fits_into_its_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    draw_legend = picture._draw_legend
    monkeypatch.setattr(
        picture, "_draw_legend", lambda figure, layout: (draw_legend(figure, layout), drawn.append(figure))
    )
    trace(nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 2, 1)), torch.zeros(1, 1, 8, 8)).show()
    (figure,) = drawn
    figure.draw_without_rendering()
    assert figure._suptitle.get_window_extent().x1 <= figure.bbox.x1


def test_pixels_that_are_no_numbers_are_named_with_their_file(tmp_path: Path) -> None:
    tifffile = pytest.importorskip("tifffile")
    pixels = np.zeros((8, 8), np.float32)
    pixels[1, 2], pixels[3, 4] = np.nan, np.inf
    tifffile.imwrite(tmp_path / "a.tif", pixels)
    with pytest.raises(ValueError, match=r"a\.tif: 2 of 64 numbers are NaN or infinite"):
        read_image(tmp_path / "a.tif", channels=1)


def test_the_card_of_a_network_of_ones_own_shows_the_call_that_loads_it() -> None:
    own = ModelCard("small").text({"_target_": "nets.mine.Tiny", "width": 8, "name": "a"}, {}, [])
    assert "from nets.mine import Tiny\n" in own
    assert "net = load_pruned(Tiny(width=8, name='a'), \"FOLDER\")" in own
    assert "load_pretrained" not in own
    known = ModelCard("small").text({"_target_": "lightning_prune.segmentation.UNet", "classes": 2}, {}, [])
    assert 'load_pretrained("FOLDER")' in known
    assert "load_pruned(make_dense_network()" in known


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["checkpoint=best", "callbacks.best.monitor=val/mio"], "callbacks.best.monitor=val/miou?"),
        (["stopping=budget", "callbacks.stopping.monitor=val/mio"], "callbacks.stopping.monitor=val/miou?"),
        (["scheduler=plateau", "scheduler.mode=max", "module.monitor=val/mio"], "module.monitor=val/miou?"),
    ],
)
def test_a_monitor_that_nobody_logs_ends_the_first_epoch_with_the_nearest(
    small_run: list[str], tmp_path: Path, settings: list[str], expected: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        lightning_prune(*small_run, "report=false", *settings, f"hydra.run.dir={tmp_path / 'run'}")
    assert "val/mio: nothing logs this metric; there are val/loss, val/miou" in str(ended.value)
    assert f"did you mean {expected}" in str(ended.value)


@pytest.mark.parametrize("stage", [TrainerFn.FITTING, TrainerFn.VALIDATING])
def test_monitors_are_looked_for_in_training_only_not_when_the_final_network_is_scored(
    stage: TrainerFn,
) -> None:
    trainer = Mock(sanity_checking=False, callback_metrics={})
    trainer.state.fn = stage
    during_training = stage == TrainerFn.FITTING
    with pytest.raises(ObjectiveError) if during_training else nullcontext():
        ObjectiveCheck([], {"callbacks.best.monitor": "val/own"}).on_validation_end(trainer, Mock())


def test_values_of_callbacks_and_names_like_numbers_are_answered_in_the_first_second() -> None:
    message = refusal("data=fashion_mnist", "stopping=budget", "callbacks.stopping.patience=x")
    assert "callbacks.stopping.patience is 'x', which is text, and must be a whole number" in message
    message = refusal("data=folder", "task.num_classes=2", "data.root=2024")
    assert """did you mean data.root="'2024'"?""" in message


def test_a_shape_of_letters_is_answered_with_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        read("plan", ["torchvision.models.resnet18", "--shape", "a,b"])
    assert "'a,b' is no shape: whole numbers, batch included, such as 1,3,224,224" in capsys.readouterr().err


def test_the_best_epoch_of_a_classification_is_chosen_by_its_accuracy(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(8):
            pixels = rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{number}.png")
    data = ["data=image_folder", f"data.root={tmp_path / 'images'}", "task.num_classes=2", "task.height=16"]
    small = [
        "task.width=16",
        "net.depth=8",
        "trainer=fast_dev",
        "threads=1",
        "latency_runs=0",
        "report=false",
    ]
    best = ["checkpoint=best", "stopping=budget", "prune.start_epoch=0", "prune.budget.macs=0.95"]
    lightning_prune(*data, *small, *best, f"hydra.run.dir={tmp_path / 'run'}")
    config = OmegaConf.load(tmp_path / "run" / "config.yaml")
    assert {each.monitor for each in config.callbacks.values() if "monitor" in each} == {"val/accuracy"}
    assert Summary.load(tmp_path / "run").status == "completed"
