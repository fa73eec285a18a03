"""``lightning-prune plan``: of a configuration, of any network, and of runs."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf

from lightning_prune import LatencyTable, PruningRecord, one_shot, trace
from lightning_prune.cli.config import conf_dir
from lightning_prune.cli.plan import main, plan_of_run
from lightning_prune.reporting.run_folder import CONFIG, NET, RECORD, save_net

SMALL = ["net=ritnet", "net.width=4", "task.height=32", "task.width=32"]


@pytest.fixture
def run(tmp_path: Path) -> tuple[Path, PruningRecord]:
    """Write what a pruned run leaves."""
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        config = compose("config", overrides=[*SMALL, "logger=none", "checkpoint=none"])
    (tmp_path / CONFIG).write_text(OmegaConf.to_yaml(config, resolve=True))
    net = instantiate(config.net, _convert_="all")
    record = one_shot(net, torch.zeros(1, 1, 32, 32), {"macs": 0.5})
    record.save(tmp_path / RECORD)
    save_net(tmp_path / NET, net, record)
    return tmp_path, record


def test_a_configuration_is_planned_to_its_budget(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    page, data, picture = (tmp_path / name for name in ("p.html", "p.json", "p.png"))
    files = ["--html", str(page), "--json", str(data), "--picture", str(picture)]
    main([*SMALL, "prune=l1", "prune.budget.macs=0.6", "--width", "70", *files])
    text = capsys.readouterr().out
    plain = json.loads(data.read_text())
    before, after = plain["totals"]["macs"].values()
    assert 0.5 * before < after <= 0.6 * before
    assert max(map(len, text.splitlines())) <= 70
    assert "budget met" in text
    assert "predicted" not in text  # L1 needs weights only
    assert page.read_text().count("<tr") > len(plain["layers"])
    assert picture.stat().st_size > 1000


def test_a_criterion_that_observes_training_is_said_to_be_predicted(
    capsys: pytest.CaptureFixture[str],
) -> None:
    main([*SMALL, "prune/criterion=taylor_gate"])
    assert "predicted from the weights alone" in " ".join(capsys.readouterr().out.split())


def test_any_network_is_planned_by_its_import_path(capsys: pytest.CaptureFixture[str]) -> None:
    main(["torchvision.models.squeezenet1_1", "--shape", "1,3,64,64", "prune=l2", "--json", "-"])
    plain = json.loads(capsys.readouterr().out)
    assert plain["layers"][0]["name"] == "features.0"
    assert plain["cut"]


OWN_NETWORK = """
from torch import nn

def tiny():
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 2, 1))
"""


def test_measured_latency_is_shown_per_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "nets_to_time.py").write_text(OWN_NETWORK)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    net = importlib.import_module("nets_to_time").tiny()
    table = LatencyTable(tmp_path / "table.json", threads=1, cuts=0)
    table.build(trace(net, torch.zeros(1, 3, 24, 24)))
    words = ["nets_to_time.tiny", "--shape", "1,3,24,24", "prune=l2", "--config-dir", str(tmp_path)]
    main([*words, "--latency", str(tmp_path / "table.json"), "--json", "-"])
    plain = json.loads(capsys.readouterr().out)
    times = [layer["costs"]["latency"] for layer in plain["layers"]]
    parts = sum(each["before"] for each in times) + plain["others"]["latency"]["before"]
    assert parts == plain["totals"]["latency"]["before"] > 0
    assert times[0]["before"] > 0
    in_time = ["--latency", str(tmp_path / "table.json"), "~prune.budget.macs", "+prune.budget.latency=0.99"]
    main([*words, *in_time, "--json", "-"])
    total = json.loads(capsys.readouterr().out)["totals"]["latency"]
    assert total["after"] < total["before"]
    with pytest.raises(SystemExit, match="this network was traced on"):
        main(["nets_to_time.tiny", "--shape", "1,3,32,32", "--latency", str(tmp_path / "table.json")])


def test_a_pruned_run_shows_what_it_has_cut(run: tuple[Path, PruningRecord]) -> None:
    folder, record = run
    cut = plan_of_run(folder)
    net = instantiate(OmegaConf.load(folder / CONFIG).net, _convert_="all")
    small = trace(record.apply_(net), torch.zeros(1, 1, 32, 32))
    widths = {layer.name: layer.channels.after for layer in cut.summary.layers}
    assert {f"{name}.weight": width for name, width in widths.items()} == dict(small.widths())
    assert cut.summary.totals["macs"].after == small.cost("macs")
    with pytest.raises(ValueError, match="is pruned already"):
        plan_of_run(folder, ["prune.budget.macs=0.3"])


def test_a_dense_run_shows_what_would_be_cut(run: tuple[Path, PruningRecord]) -> None:
    folder, _ = run
    (folder / RECORD).unlink()
    (folder / NET).unlink()
    cut = plan_of_run(folder, ["prune=l2", "prune.budget.macs=0.7"])
    totals = cut.summary.totals["macs"]
    assert totals.after <= 0.7 * totals.before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["prune=none"], "with prune=none nothing is cut"),
        (["no_such_run"], "neither the folder of a run"),
        (["net=fpnn"], "did you mean net=fpn"),
        (["torchvision.models.resnet1800"], "resnet1800"),
        ([*SMALL, "--latency", "none.json"], "measure it: lightning-prune latency none.json"),
        ([*SMALL, "prune=l2", "prune.budget.macs=0.0001"], "budget"),
    ],
)
def test_what_cannot_be_planned_is_said_in_a_line(words: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message) as ended:
        main(words)
    assert str(ended.value.code).startswith("lightning-prune plan: ")
