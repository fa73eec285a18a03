"""Pages of runs and sweeps without a browser: what they say, also where something is missing or wrong."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
import pytest
from bs4 import BeautifulSoup

from lightning_prune.reporting.layers import save_layers
from lightning_prune.reporting.model_size import Sizes
from lightning_prune.reporting.pages import render
from lightning_prune.reporting.pages.load_code import load_code
from lightning_prune.reporting.pages.run_files import read_run
from lightning_prune.reporting.pages.run_page import write_run_page
from lightning_prune.reporting.pages.sweep_charts import front
from lightning_prune.reporting.pages.sweep_page import write_sweep_page
from lightning_prune.reporting.pages.sweep_table import SweepRun
from lightning_prune.reporting.run_folder import Summary
from tests.support.run_folders import cut, examples, layers, summary, write_failed, write_run


def page(folder: Path, **options: object) -> BeautifulSoup:
    path = write_run_page(read_run(folder), **options)  # type: ignore[arg-type]
    return BeautifulSoup(path.read_text(), "html.parser")


def notices(soup: BeautifulSoup) -> str:
    return " | ".join(each.text for each in soup.select(".notice"))


def cards(soup: BeautifulSoup) -> dict[str, tuple[str, str]]:
    return {
        card.h2.text: (card.select_one(".big").text, card.select_one(".small").text)
        for card in soup.select(".card")
    }


def charts(soup: BeautifulSoup) -> dict[str, dict]:
    figures = [figure for figure in soup.select("figure.chart") if figure.script]
    return {figure.figcaption.b.text: json.loads(figure.script.string) for figure in figures}


def test_headline_figures_are_those_of_the_summary(tmp_path: Path) -> None:
    assert cards(page(write_run(tmp_path / "run"))) == {
        "test mIoU": ("0.750", "validation 0.400 before the first cut, 0.600 at the end"),
        "MACs": ("500 k", "50 % of 1 M"),
        "parameters": ("25 k", "25 % of 100 k"),
        "latency": ("8 ms", "80 % of 10 ms"),
        "file size": ("100 kB", "25 % of 400 kB"),
    }


def test_charts_hold_the_numbers_of_the_run_and_plotly_accepts_them(tmp_path: Path) -> None:
    drawn = charts(page(write_run(tmp_path / "run")))
    assert list(drawn) == [
        "Score",
        "Loss",
        "Size",
        "Change at each cut",
        "Each class",
        "Learning rate",
        "Channels of each layer",
    ]
    for chart in drawn.values():
        text = json.dumps({key: chart[key] for key in ("data", "layout")})
        go.Figure(
            json.loads(
                text.replace('"$', '"#00000')
                .replace("#00000dense", "#000")
                .replace("#00000pruned", "#000")
                .replace("#00000accent", "#000")
                .replace("#00000soft", "#000")
            )
        )
    score = drawn["Score"]["data"][1]
    assert (score["name"], score["x"]) == ("validation", [1, 2, 3, 4])
    assert np.allclose(score["y"], [0.3, 0.4, 0.5, 0.6])
    assert [shape["x0"] for shape in drawn["Score"]["layout"]["shapes"]] == [2, 3]
    sizes = drawn["Size"]["data"]
    assert sizes[0]["y"] == [1.0, 1.0, 0.8, 0.5, 0.5]
    assert [bars["y"] for bars in drawn["Change at each cut"]["data"]] == [[0.02, 0.02], [0.001, 0.001]]
    assert drawn["Learning rate"]["data"][0]["y"] == [0.001, 0.0005, 0.001 / 3, 0.00025]
    assert [bars["y"] for bars in drawn["Channels of each layer"]["data"]] == [[8, 2], [6, 2]]


def test_the_latency_of_layers_is_shown_with_how_it_was_measured(tmp_path: Path) -> None:
    run, names = write_run(tmp_path / "run"), ["0.weight", "2.weight"]
    assert not page(run).select("#latency h3")
    before, after = [("0.weight", 3e6), ("1", 2e6), ("2.weight", 1e6)], [("0.weight", 1.5e6), ("1", 2e6)]
    timed = layers().with_costs("latency", names, before, after)
    save_layers(replace(timed, measured="Measured so."), run)
    soup = page(run)
    bars = charts(soup)["Latency of each layer"]["data"]
    assert [bar["y"] for bar in bars] == [pytest.approx([3.0, 1.0]), pytest.approx([1.5, 0.0])]
    assert bars[0]["customdata"] == ["0", "2"]
    assert soup.select_one("#latency figcaption span").text == "norms and other operators: 2 ms"
    assert soup.select_one("#latency .soft").text == (
        "Measured so. Together 6 ms → 3.5 ms, without the time that Python takes between operators."
    )
    save_layers(replace(layers(), measured="Not measured: why."), run)
    assert page(run).select_one("#latency .soft").text == "Not measured: why."


def test_images_stand_beside_their_differences_the_most_different_first(tmp_path: Path) -> None:
    soup = page(write_run(tmp_path / "run"))
    rows = soup.select(".example")
    captions = [caption.text.split("\n")[0] for caption in rows[0].select("figcaption")]
    # (12, 24): one of twelve rows differs; (16, 16): one of sixteen.
    assert [text.split(" ")[0] for text in captions] == ["image", "label", "dense,", "pruned", "difference"]
    assert captions[-1] == "difference 8.3% of the pixels"
    assert rows[1].select("figcaption")[-1].text == "difference 6.2% of the pixels"
    assert captions[3].startswith("pruned network 8")


def test_class_numbers_are_shown_as_the_most_probable_classes(tmp_path: Path) -> None:
    pictures = examples(((8, 8),))
    probabilities = [np.array([0.1, 0.7, 0.2], np.float32)]
    other = [np.array([0.6, 0.3, 0.1], np.float32)]
    labelled = type(pictures)(
        pictures.images, [np.array(1)], {"dense": probabilities, "final": other}, ["cat", "dog", "owl"]
    )
    soup = page(write_run(tmp_path / "run", labelled))
    guesses = soup.select(".guess")
    texts = [[line.get_text(" ", strip=True) for line in guess.select("p")] for guess in guesses]
    assert texts == [["dog 70 %", "owl 20 %", "cat 10 %"], ["cat 60 %", "dog 30 %", "owl 10 %"]]
    assert [line["class"] for line in guesses[0].select("p.right")] == [["right"]]


def test_names_are_never_markup(tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script>"
    run = write_run(tmp_path / "run", curves=[{"epoch": 0, f"val/iou_{evil}": 0.5, "val/miou": 0.5}])
    soup = page(run)
    assert not [
        script for script in soup.select("script") if script.string and script.string.startswith("alert")
    ]
    assert charts(soup)["Each class"]["data"][0]["name"] == evil


def test_a_baseline_stands_beside_the_run(tmp_path: Path) -> None:
    dense = read_run(write_run(tmp_path / "dense", cuts=[], test={"miou": 0.8}))
    soup = page(write_run(tmp_path / "run"), baseline=dense)
    assert cards(soup)["test mIoU"] == ("0.750", "-0.050 from the dense run's 0.800")
    assert charts(soup)["Score"]["data"][0]["name"] == "dense run"
    assert "The dense network is that of the dense run." in soup.select_one("#examples p").text
    others = read_run(write_run(tmp_path / "others", examples(((8, 8),)), cuts=[]))
    assert "its outputs are not shown" in notices(page(tmp_path / "run", baseline=others))


def test_the_shown_code_loads_the_network(tmp_path: Path) -> None:
    code = page(write_run(tmp_path / "run")).select_one("#load code").text
    names: dict[str, object] = {}
    exec(code, names)
    assert tuple(names["net"].weight.shape) == (3, 1, 1, 1)  # type: ignore[attr-defined]
    nested = {"_target_": "torch.nn.Sequential", "_args_": [{"_target_": "torch.nn.Conv2d"}]}
    assert "instantiate(OmegaConf.load" in load_code(nested, tmp_path / "run")


# Bad input.


def test_a_folder_that_is_half_there_gives_a_page_of_what_is_there(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    for name in ("summary.json", "net.pt", "layers.json", "examples.npz"):
        (run / name).unlink()
    (run / "csv").mkdir()
    lines = ["epoch,step,train/loss,val/miou", "0,5,,0.25", "0,5,1.5,", "1,11,,0.5", "1,11,0."]
    (run / "csv" / "metrics.csv").write_text("\n".join(lines))
    soup = page(run)
    assert "There is no summary.json: the run was killed, or is not finished." in notices(soup)
    assert notices(soup).count("finished") == 1
    drawn = charts(soup)
    assert drawn["Score"]["data"][0]["y"] == [0.25, 0.5]
    assert drawn["Loss"]["data"][0]["y"] == [1.5]  # without the number of which only "0." was written
    assert drawn["Score"]["layout"]["xaxis"]["dtick"] == 1
    assert soup.select_one("#load") is None
    assert soup.h1.text == "Conv2d on BrainSlices"


@pytest.mark.parametrize("name", ["summary.json", "config.yaml", "layers.json", "examples.npz"])
def test_a_damaged_file_is_named_and_the_rest_is_shown(tmp_path: Path, name: str) -> None:
    run = write_run(tmp_path / "run")
    content = (run / name).read_bytes()
    (run / name).write_bytes(b"{" + content[: len(content) // 2])
    soup = page(run)
    assert f"{name} cannot be read" in notices(soup) or f"{name} is damaged" in soup.text
    assert soup.select("section")


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"holds no run: there is neither summary\.json nor config\.yaml"
    ):
        read_run(tmp_path)


def test_metrics_that_are_not_numbers_are_named_and_left_out(tmp_path: Path) -> None:
    curves = [
        {"epoch": 0, "val/miou": 0.5, "train/loss": 1.0},
        {"epoch": 1, "val/miou": math.nan, "train/loss": math.inf},
    ]
    write_run(
        tmp_path / "run",
        curves=[{**curves[0]}, {**curves[1], "train/loss": math.nan}],
        test={"miou": math.nan},
    )
    soup = page(tmp_path / "run")
    assert (
        "Not a number, and left out of the curves: val/miou (from epoch 2), train/loss (from epoch 2)"
        in notices(soup)
    )
    assert charts(soup)["Score"]["data"][0]["y"] == [0.5, None]
    assert cards(soup)["validation mIoU"] == ("0.500", "in epoch 1, the last with a number")
    assert "NaN" not in (tmp_path / "run" / "report.html").read_text().split('id="plotly"')[0]


def test_a_metric_that_nobody_logged_is_answered_with_the_nearest(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run"))
    with pytest.raises(
        ValueError, match=r"nobody logged 'val/mioo'; did you mean 'miou'\? Logged were: miou, loss"
    ):
        write_run_page(run, metric="val/mioo")
    assert "test loss" in cards(page(tmp_path / "run", metric="test/loss"))


def test_without_plotly_the_page_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "plotly"] + ["plotly"]:
        monkeypatch.setitem(sys.modules, name, None)
    render.plotly_script.cache_clear()
    try:
        soup = page(write_run(tmp_path / "run"))
    finally:
        render.plotly_script.cache_clear()
    assert "pip install plotly" in notices(soup)
    assert cards(soup)["MACs"] == ("500 k", "50 % of 1 M")
    assert not soup.select(".chart")
    assert (tmp_path / "run" / "report.html").stat().st_size < 100_000


def test_what_a_run_did_not_achieve_comes_first(tmp_path: Path) -> None:
    cuts = [cut(1, 0.8, change=None, not_repaired="no batches"), cut(2, 0.6)]
    text = notices(page(write_run(tmp_path / "run", cuts=cuts)))
    assert "The budget of MACs is not met: 60.0% are left, 50.0% were asked for." in text
    assert "1 of 2 cuts was not repaired: no batches" in text
    failed = write_failed(tmp_path / "failed", "ValueError: omega")
    soup = page(failed)
    assert notices(soup).startswith("The run failed: ValueError: omega")
    assert "Traceback" in soup.select_one("#error code").text


def sweep(tmp_path: Path, *summaries: Summary, **options: object) -> BeautifulSoup:
    runs = [
        SweepRun(tmp_path / str(number), run, {"prune.criterion.omega": str(number)})
        for number, run in enumerate(summaries)
    ]
    path = write_sweep_page(runs, tmp_path / "sweep.html", "sweep", **options)  # type: ignore[arg-type]
    return BeautifulSoup(path.read_text(), "html.parser")


def scored(macs: int, validation: float, test: float) -> Summary:
    curves = [{"epoch": 0, "val/miou": validation}]
    return summary(final=Sizes(macs, 10, 40, None), curves=curves, test={"miou": test})


def test_runs_are_chosen_by_validation_and_reported_on_the_test_set(tmp_path: Path) -> None:
    soup = sweep(tmp_path, scored(100, 0.6, 0.9), scored(100, 0.7, 0.5), scored(200, 0.65, 0.99))
    assert [row["data-run"] for row in soup.select("tr.front")] == ["1"]
    assert "Best mIoU by validation: 0.700 of run 1 (on the test set 0.500)." in soup.select_one(".lead").text
    variants = json.loads(soup.select_one(".variants script").string)
    assert list(variants) == [
        f"{size}/{stage}" for size in ("macs", "params", "bytes") for stage in ("test", "validation")
    ]
    assert [trace["y"] for trace in variants["macs/test"]["data"]] == [[0.9, 0.99], [0.5]]


def test_a_single_run_is_in_the_middle_of_axes_that_can_be_read(tmp_path: Path) -> None:
    soup = sweep(tmp_path, scored(200, 0.6, 0.8))
    axes = json.loads(soup.select_one(".variants script").string)["macs/test"]["layout"]
    assert axes["xaxis"]["range"] == [100, 300]
    assert axes["yaxis"]["range"] == pytest.approx([0.4, 1.2])


@pytest.mark.parametrize("higher", [True, False])
def test_the_front_is_that_of_all_pairs(higher: bool) -> None:
    rng = np.random.default_rng(3)
    sizes, scores = rng.integers(0, 8, 40).astype(float), rng.integers(0, 8, 40).astype(float)
    sizes[3], scores[5] = math.nan, math.nan
    sign = 1 if higher else -1

    def beats(a: int, b: int) -> bool:
        gain = sign * (scores[a] - scores[b])
        return bool(sizes[a] <= sizes[b] and gain >= 0 and (sizes[a] < sizes[b] or gain > 0))

    known = [n for n in range(40) if n not in (3, 5)]
    expected = {b for b in known if not any(beats(a, b) for a in known)}
    assert set(front(sizes.tolist(), scores.tolist(), higher)) == expected


def test_a_sweep_whose_runs_all_failed_lists_their_errors(tmp_path: Path) -> None:
    failed = Summary(status="failed", error="ValueError: first\n" + "line\n" * 50)
    soup = sweep(tmp_path, failed, Summary(status="failed", error="OSError: second"))
    assert "No run was completed" in notices(soup)
    errors = [each.pre.text for each in soup.select(".failure")]
    assert errors[0].startswith("ValueError: first")
    assert errors[0].endswith("... and 39 more lines")
    assert errors[1] == "OSError: second"
    assert not soup.select("table")


def test_runs_with_scores_that_are_no_numbers_are_named(tmp_path: Path) -> None:
    soup = sweep(tmp_path, scored(100, 0.6, 0.9), scored(100, math.nan, math.nan))
    assert "Without a mIoU, or with one that is not a number: 1." in notices(soup)
    cells = [cell.text for cell in soup.select("tbody tr")[1].select("td")]
    assert cells[:5] == ["1", "1", "1", "-", "-"]


def test_a_sweep_by_an_unknown_metric_or_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nobody logged 'dice'"):
        sweep(tmp_path, scored(100, 0.6, 0.9), metric="dice")
    with pytest.raises(
        ValueError, match="against must be one of macs, params, latency_ms, bytes, got 'time'"
    ):
        sweep(tmp_path, scored(100, 0.6, 0.9), against="time")


def test_reading_folders_imports_no_plotly_before_a_page_is_written() -> None:
    code = "import sys, lightning_prune.reporting.pages.run_page; assert 'plotly' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
