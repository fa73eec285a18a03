"""Tests of sensitivity: scores equal those of cutting copies by hand; its figure, table and command."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor, nn

from lightning_prune import ChannelGraph, PruningRecord, SurgeryError, prune_, trace
from lightning_prune.cli.config import conf_dir
from lightning_prune.cli.sensitivity import figure, main, table, weight_criterion
from lightning_prune.criteria import L1
from lightning_prune.pruning.sensitivity import Row, Sensitivity, sensitivity
from lightning_prune.reporting.run_folder import CONFIG, NET, save_net
from lightning_prune.testing import randomise_

EXAMPLE = ((torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(0)),), {})


class Residual(nn.Module):
    """Two layers that are coupled by an addition, and one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.inner = nn.Conv2d(8, 10, 3, padding=1)
        self.outer = nn.Conv2d(10, 8, 3, padding=1)
        self.head = nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(x + self.outer(self.inner(x).relu()))


def model() -> nn.Module:
    torch.manual_seed(0)
    return randomise_(Residual())


@torch.no_grad()
def mean_magnitude(net: nn.Module) -> float:
    return float(net(*EXAMPLE[0]).abs().mean())


def test_scores_equal_those_of_cutting_copies_and_the_model_is_not_changed() -> None:
    net = model().train()
    before = copy.deepcopy(net.state_dict())
    result = sensitivity(net, EXAMPLE, mean_magnitude, criterion=L1(), shares=[0.25, 0.5])
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert all(module.training for module in net.modules())
    coupled, single = result.rows
    assert (len(coupled.layers), coupled.units, single.layers, single.units) == (2, 8, ("inner.weight",), 10)
    for row in result.rows:
        for share, score in zip(result.shares, row.scores, strict=True):
            twin = copy.deepcopy(net).eval()
            graph = trace(twin, *EXAMPLE[0])
            units, importance = graph.layers[row.layers[0]], L1()(graph, twin)
            removed = sorted(units.tolist(), key=lambda unit: importance[unit])[: round(share * len(units))]
            prune_(twin, graph, removed)
            assert score == mean_magnitude(twin) != result.dense
    assert result.dense == mean_magnitude(net.eval())


def test_norms_are_recalibrated_on_request_and_one_filter_always_stays() -> None:
    raw, renewed = (
        sensitivity(model(), EXAMPLE, mean_magnitude, shares=[0.99], recalibrate=examples)
        for examples in ([], [EXAMPLE])
    )
    assert raw.dense == renewed.dense
    assert raw.rows[0].scores == pytest.approx(renewed.rows[0].scores, rel=0.9)
    stay = sensitivity(model(), EXAMPLE, lambda net: float(net.inner.out_channels), shares=[0.99])  # type: ignore[union-attr,arg-type]
    assert stay.rows[1].scores == (1.0,)


def test_the_network_is_traced_once_and_each_cut_starts_from_the_dense_network(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A regression: each cut was made on a copy that was traced again."""
    trace_mock, sizes = Mock(side_effect=trace), []

    def score(net: nn.Module) -> float:
        sizes.append(sum(p.numel() for p in net.parameters()))
        return mean_magnitude(net)

    monkeypatch.setattr("lightning_prune.pruning.sensitivity.trace", trace_mock)
    many = sensitivity(model(), EXAMPLE, score, shares=[0.5, 0.25, 0.5], recalibrate=[EXAMPLE])
    assert trace_mock.call_count == 1
    alone = sensitivity(model(), EXAMPLE, mean_magnitude, shares=[0.5], recalibrate=[EXAMPLE])
    for row, single in zip(many.rows, alone.rows, strict=True):
        assert row.scores[0] == row.scores[2] == single.scores[0] != row.scores[1]
    whole, half, most, again = sizes[:4]
    assert half == again < most < whole


def test_units_of_infinite_importance_stay() -> None:
    """A regression: they were removed if the share required as many units."""

    def keeps_half(graph: ChannelGraph, net: nn.Module, statistics: Any = None) -> np.ndarray:
        importance = np.asarray(L1()(graph, net))
        importance[graph.layers["inner.weight"][::2]] = np.inf
        importance[graph.layers["outer.weight"]] = np.inf
        return importance

    result = sensitivity(
        model(), EXAMPLE, lambda net: float(net.inner.out_channels), criterion=keeps_half, shares=[0.9]
    )  # type: ignore[union-attr,arg-type]
    (row,) = result.rows
    assert (row.name, row.units, row.scores) == ("inner", 5, (6.0,))


def test_invalid_arguments_are_refused() -> None:
    for shares in ([], [0.0], [1.0]):
        with pytest.raises(ValueError, match="within"):
            sensitivity(model(), EXAMPLE, mean_magnitude, shares=shares)
    with pytest.raises(ValueError, match="nothing to prune"):
        sensitivity(model(), EXAMPLE, mean_magnitude, exclude=["*"])
    for option in ("taylor_weight", "activation_mean", "ipad_activations"):
        with pytest.raises(ValueError, match="needs statistics of activations or gradients"):
            sensitivity(model(), EXAMPLE, mean_magnitude, criterion=weight_criterion(option))


@pytest.mark.parametrize("rows", [1, 20, 60])
def test_the_figure_grows_with_the_number_of_layers(rows: int) -> None:
    shares = tuple(n / 10 for n in range(1, 10))
    result_rows = tuple(Row(f"encoder.layer{n}.conv1", ("a",) * (1 + n % 3), 64, shares) for n in range(rows))
    result = Sensitivity(0.9, shares, result_rows, 1.0)
    plot = figure(result)
    plot.draw_without_rendering()
    axes = plot.axes[0]
    heights = [label.get_window_extent().height for label in axes.get_yticklabels()]
    assert len(heights) == rows
    assert axes.get_window_extent().height / rows > max(heights)  # labels do not overlap
    assert len(table(result).rows) == rows


def test_a_refused_cut_is_a_gap_with_a_warning_that_names_layer_and_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(net: nn.Module, graph: ChannelGraph, remove: np.ndarray) -> PruningRecord:
        if len(remove) == 5:
            raise SurgeryError("nothing for five")
        return prune_(net, graph, remove)

    monkeypatch.setattr("lightning_prune.pruning.sensitivity.prune_", refuse)
    reason = "inner without 5 of 10 filters is refused: nothing for five"
    with pytest.warns(UserWarning, match=reason) as warned:
        result = sensitivity(model(), EXAMPLE, mean_magnitude, shares=[0.25, 0.5])
    assert [[math.isnan(score) for score in row.scores] for row in result.rows] == [
        [False] * 2,
        [False, True],
    ]
    assert [warning.filename for warning in warned] == [__file__]
    assert result.to_dict()["rows"][1]["scores"][1] is None
    assert table(result).rows[1][-1] == "-"
    texts = [text.get_text() for text in figure(result).axes[0].texts]
    assert texts[-1] == "\N{EN DASH}"
    assert "nan" not in texts


SMALL = {
    "_target_": "torch.nn.Sequential",
    "_args_": [
        {"_target_": "torch.nn.Conv2d", "in_channels": 1, "out_channels": 6, "kernel_size": 3, "padding": 1},
        {"_target_": "torch.nn.ReLU"},
        {"_target_": "torch.nn.Conv2d", "in_channels": 6, "out_channels": 3, "kernel_size": 1},
    ],
}


def test_the_command_writes_table_json_and_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        config = compose("config", overrides=["data.size=48", "data.slices_per_axis=6"])
    node = OmegaConf.create({"net": SMALL, "data": OmegaConf.to_container(config.data)})
    node.module = {"num_classes": 3, "ignore_index": None, "example_input_shape": [1, 1, 48, 48]}
    OmegaConf.save(node, tmp_path / CONFIG)
    save_net(tmp_path / NET, instantiate(node.net), PruningRecord())
    main([str(tmp_path), "--criterion", "l2", "--batches", "1", "--device", "cpu"])
    result = json.loads((tmp_path / "sensitivity.json").read_text())
    shown = capsys.readouterr()
    (row,) = result["rows"]
    assert (row["name"], row["units"], len(row["scores"])) == ("0", 6, 9)
    assert min(row["scores"]) >= 0
    assert shown.err.startswith("1/1 0: ")
    assert all(f"{share:.0%}" in shown.out for share in result["shares"])
    assert (tmp_path / "sensitivity.png").stat().st_size > 10_000
    for arguments, message in (
        (["--criterion", "taylor_gate"], "needs statistics"),
        (["--device", "gpus"], "gpus"),
    ):
        with pytest.raises(SystemExit, match=message):
            main([str(tmp_path), *arguments])
