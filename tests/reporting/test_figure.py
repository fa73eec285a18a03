"""The figure of a run, the tables of sizes and scores, and the summary file they are made from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from PIL import Image

from lightning_prune.cli.run_groups import group_runs, table, write
from lightning_prune.reporting.comparison import comparison
from lightning_prune.reporting.figure import draw_report, figure, headline, main
from lightning_prune.reporting.model_size import Sizes
from lightning_prune.reporting.run_folder import Summary, find_runs

WIDTHS = {"encoder.conv1": (64, 24), "encoder.layer1.0.conv1": (128, 128), "head": (3, 3)}


def summary(**changes: object) -> Summary:
    shares = [1.0, 0.8, 0.5, 0.5]
    rows = [{"epoch": e, "val/miou": 0.1 * e + 0.3, "prune/macs_share": s} for e, s in enumerate(shares)]
    values = {
        "status": "completed",
        "seed": 1,
        "epochs": 4,
        "device": "cpu",
        "threads": 2,
        "dense": Sizes(1000, 100, 4000, 10.0),
        "final": Sizes(500, 25, 1000, 8.0),
        "test": {"loss": 0.1, "miou": 0.75, "iou_grey": 0.7},
        "curves": rows,
        "widths": WIDTHS,
        "cuts": [{"epoch": 1, "filters": 30}, {"epoch": 2, "filters": 10}],
    }
    return Summary(**(values | changes))  # type: ignore[arg-type]


def panels(run: Summary, baseline: Summary | None = None) -> tuple[Axes, Axes, Axes]:
    left, top, bottom = figure(run, baseline).axes
    return left, top, bottom


def test_bars_show_the_widths_in_the_order_of_the_layers() -> None:
    left, _, _ = panels(summary())
    dense, pruned = ([bar.get_width() for bar in bars] for bars in left.containers)  # type: ignore[union-attr]
    assert dense == [64, 128, 3]
    assert pruned == [24, 128, 3]
    assert [label.get_text() for label in left.get_yticklabels()] == list(WIDTHS)
    assert left.yaxis_inverted()
    assert [text.get_text() for text in left.texts] == ["24/64", "128/128", "3/3"]


def test_macs_fall_after_the_epochs_with_cuts() -> None:
    _, _, bottom = panels(summary())
    cuts, steps = bottom.lines[:-1], bottom.lines[-1]
    assert steps.get_drawstyle() == "steps-post"
    assert list(steps.get_xdata()) == [0, 1, 2, 3, 4]
    assert list(steps.get_ydata()) == [1.0, 1.0, 0.8, 0.5, 0.5]
    assert [line.get_xdata()[0] for line in cuts] == [2, 3]  # type: ignore[index]


def test_miou_of_run_and_baseline() -> None:
    dense = summary(curves=[{"epoch": 0, "val/miou": 0.9}], cuts=[])
    _, top, _ = panels(summary(), dense)
    curves = {str(line.get_label()): line for line in top.lines}
    assert list(curves["dense"].get_ydata()) == [0.9]
    assert np.allclose(np.asarray(curves["pruned"].get_ydata()), [0.3, 0.4, 0.5, 0.6])
    assert list(curves["pruned"].get_xdata()) == [1, 2, 3, 4]


def test_a_dense_run_has_a_flat_line_of_macs() -> None:
    rows = [{"epoch": e, "val/miou": 0.5} for e in range(4)]
    _, _, bottom = panels(summary(curves=rows, cuts=[]))
    (steps,) = bottom.lines
    assert list(steps.get_ydata()) == [1.0, 1.0]


def test_many_layers_keep_readable_labels() -> None:
    left, _, _ = panels(summary(widths={f"layer{i}": (8, 4) for i in range(200)}))
    assert len(left.containers[0]) == 200  # type: ignore[arg-type]
    assert len(left.get_yticklabels()) <= 70


def test_headline_states_shares_and_scores() -> None:
    text = headline(summary(), summary(test={"miou": 0.8}))
    assert text == "50.0 % of the MACs and 25.0 % of the parameters left · test mIoU 0.750 (dense 0.800)"


def test_the_figure_is_written_and_not_blank(tmp_path: Path) -> None:
    draw_report(summary(), tmp_path / "report.png")
    pixels = np.asarray(Image.open(tmp_path / "report.png").convert("L"))
    assert min(pixels.shape) > 500
    assert 0.02 < (pixels < 250).mean() < 0.6


def test_a_figure_is_drawn_again_from_the_summary(tmp_path: Path) -> None:
    summary(test={"miou": float("nan")}).save(tmp_path)
    main([str(tmp_path)])
    assert (tmp_path / "report.png").is_file()
    assert "NaN" not in (tmp_path / "summary.json").read_text()


def test_a_summary_is_the_same_after_saving_and_loading(tmp_path: Path) -> None:
    summary().save(tmp_path)
    assert Summary.load(tmp_path) == summary()
    (tmp_path / "summary.json").write_text('{"status": "completed", "shape": 1}')
    with pytest.raises(ValueError, match=r"summary\.json is damaged"):
        Summary.load(tmp_path)


def test_comparison_of_dense_and_pruned() -> None:
    run = summary()
    assert run.dense is not None
    assert run.final is not None
    rows = comparison(run.dense, run.final, {"miou": 0.8}, run.test, "2 threads").rows
    assert rows == [
        ("MACs", "1 k", "500", "50.0 %"),
        ("parameters", "100", "25", "25.0 %"),
        ("file size", "4 kB", "1 kB", "25.0 %"),
        ("latency, 1 image, 2 threads", "10.00 ms", "8.00 ms", "80.0 %"),
        ("test mIoU", "0.8000", "0.7500", "-0.0500"),
        ("test IoU, grey", "-", "0.7000", "-"),
    ]


def test_runs_are_grouped_by_all_overrides_except_the_seed(tmp_path: Path) -> None:
    for number, (criterion, seed) in enumerate([("l2", 1), ("l2", 2), ("random", 1), ("random", 2)]):
        folder = tmp_path / str(number)
        folder.mkdir()
        overrides = {"prune/criterion": criterion, "net": "unet", "seed": str(seed)}
        scores = {"miou": 0.5 + 0.1 * number}
        summary(overrides=overrides, seed=seed, test=scores).save(folder)
    (tmp_path / "10" / ".hydra").mkdir(parents=True)
    groups = group_runs(find_runs([tmp_path]))
    assert [dict(group.settings)["prune/criterion"] for group in groups] == ["l2", "random", "-"]
    result = table(groups)
    assert list(result.header) == [
        "prune/criterion",
        "net",
        "seeds",
        "MACs %",
        "params %",
        "file %",
        "latency %",
        "test mIoU",
    ]
    assert result.rows[0][-1] == "0.5500 ± 0.0707"
    assert result.rows[1][-1] == "0.7500 ± 0.0707"
    assert result.rows[2][2:] == ["0 of 1", "-", "-", "-", "-", "-"]


def test_the_table_of_a_search_has_the_objectives_that_no_other_column_shows(tmp_path: Path) -> None:
    objective = {"val/miou": 0.6, "val/iou_grey": 0.512345, "latency_ms": 8.0}
    (tmp_path / "0").mkdir()
    summary(overrides={"optimizer.lr": "0.1"}, objective=objective).save(tmp_path / "0")
    groups = group_runs(find_runs([tmp_path]))
    result = table(groups)
    assert list(result.header)[-4:] == ["latency %", "test mIoU", "val mIoU", "val/iou_grey"]
    assert list(result.rows[0])[-2:] == ["0.6000", "0.5123"]
    write(groups, tmp_path)
    assert "val/iou_grey" in (tmp_path / "sweep.md").read_text()
    row = (tmp_path / "sweep.csv").read_text().splitlines()
    assert dict(zip(row[0].split(","), row[1].split(","), strict=True))["val/iou_grey"] == "0.512345"


@pytest.mark.parametrize(("sweeper", "shown"), [("basic", False), ("optuna", True)])
def test_the_score_on_the_validation_set_is_in_the_table_if_a_search_went_by_it(
    sweeper: str, shown: bool, tmp_path: Path
) -> None:
    (tmp_path / "0").mkdir()
    choices = {"hydra/sweeper": sweeper}
    summary(objective={"val/miou": 0.6}, choices=choices).save(tmp_path / "0")
    assert ("val mIoU" in table(group_runs(find_runs([tmp_path]))).header) == shown


@pytest.mark.parametrize("sweeper", ["basic", "optuna"])
def test_an_objective_that_is_not_the_default_is_in_the_table(sweeper: str, tmp_path: Path) -> None:
    (tmp_path / "0").mkdir()
    summary(objective={"val/loss": 0.3}, choices={"hydra/sweeper": sweeper}).save(tmp_path / "0")
    assert "val/loss" in table(group_runs(find_runs([tmp_path]))).header
