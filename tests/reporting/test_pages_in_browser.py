"""The pages of runs and sweeps in a real browser: charts are drawn, tables sort, nothing is loaded, nothing fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lightning_prune.graph.summary import Change, LayerSummary, NetworkSummary
from lightning_prune.reporting.layers import save_layers
from lightning_prune.reporting.model_size import Sizes
from lightning_prune.reporting.pages.run_files import read_run
from lightning_prune.reporting.pages.run_page import write_run_page
from lightning_prune.reporting.pages.sweep_page import write_sweep_page
from lightning_prune.reporting.pages.sweep_table import SweepRun
from lightning_prune.reporting.run_folder import Summary
from tests.support.browser import DESKTOP, PHONE, browser, opened
from tests.support.run_folders import summary, write_failed, write_run

__all__ = ["browser"]  # a fixture


@pytest.fixture(scope="module")
def run_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run_page(read_run(write_run(tmp_path_factory.mktemp("runs") / "it")))


@pytest.fixture(scope="module")
def sweep_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    runs = []
    for number, (macs, score, omega) in enumerate(
        [(900, 0.8, 0), (500, 0.7, 0.5), (600, 0.6, 1), (100, 0.2, 10)]
    ):
        curves = [{"epoch": 0, "val/miou": score}]
        done = summary(final=Sizes(macs, 10 + number, 40, 5.0), curves=curves, test={"miou": score - 0.05})
        write_run(folder / str(number))
        write_run_page(read_run(folder / str(number)))
        runs.append(SweepRun(folder / str(number), done, {"prune.criterion.omega": str(omega)}))
    failed = write_failed(folder / "4", "ValueError: omega must lie in [0, 1], got 20")
    runs.append(SweepRun(failed, Summary.load(failed), {"prune.criterion.omega": "20"}))
    return write_sweep_page(runs, folder / "sweep.html", "A sweep", "lightning-prune -m")


def charts(page: Any) -> int:
    """Return the number of charts in which something is drawn."""
    drawn = ".scatterlayer .js-line, .scatterlayer .point, .barlayer .point path"
    plots = page.locator(".plot.js-plotly-plot")
    return int(plots.evaluate_all(f"all => all.filter(each => each.querySelector('{drawn}')).length"))


@pytest.mark.parametrize("width", [DESKTOP, PHONE])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_of_a_run_draws_its_charts_without_errors_and_without_network(
    browser: Any, run_page: Path, width: int, scheme: str
) -> None:
    with opened(browser, run_page, width, scheme) as visit:
        assert visit.page.locator(".chart").count() == 7
        assert charts(visit.page) == 7
        assert visit.page.locator(".example img").count() == 10
        assert visit.page.locator(".example img").evaluate_all(
            "all => all.every(each => each.naturalWidth > 0)"
        )
        assert visit.overflow() == 0
        assert (visit.errors, visit.requests) == ([], [])


def test_charts_follow_the_colours_of_the_device(browser: Any, run_page: Path) -> None:
    colours = []
    for scheme in ("light", "dark"):
        with opened(browser, run_page, scheme=scheme) as visit:
            fill = "getComputedStyle(document.querySelector('.xtick text')).fill"
            colours.append(
                (visit.page.evaluate(fill), visit.page.evaluate("getComputedStyle(document.body).color"))
            )
    assert all(drawn == text for drawn, text in colours)
    assert colours[0] != colours[1]


@pytest.mark.parametrize("width", [DESKTOP, PHONE])
def test_the_page_of_a_sweep_draws_front_and_lines(browser: Any, sweep_page: Path, width: int) -> None:
    with opened(browser, sweep_page, width) as visit:
        assert charts(visit.page) == 2
        assert visit.page.locator(".plot").nth(1).locator(".trace.scatter").count() == 4
        assert visit.page.locator(".failure").inner_text().startswith("run 4 failed")
        assert visit.overflow() == 0
        assert (visit.errors, visit.requests) == ([], [])


def column(page: Any, number: int) -> list[str]:
    return list(page.locator(f"tbody tr td:nth-child({number})").all_inner_texts())


def test_the_table_sorts_by_numbers_in_both_directions(browser: Any, sweep_page: Path) -> None:
    with opened(browser, sweep_page) as visit:
        heads = visit.page.locator("th button").all_inner_texts()
        omega = heads.index("omega")
        assert column(visit.page, omega + 1) == ["0", "0.5", "1", "10"]
        visit.page.locator("th button").nth(omega).click()
        visit.page.locator("th button").nth(omega).click()
        assert column(visit.page, omega + 1) == ["10", "1", "0.5", "0"]  # as texts, 10 would be before 1 too
        visit.page.locator("th button").nth(heads.index("MACs")).click()
        assert column(visit.page, 1) == ["3", "1", "2", "0"]
        assert visit.page.locator("th[aria-sort=ascending]").inner_text().startswith("MACs")


def test_another_axis_shows_the_front_of_that_size(browser: Any, sweep_page: Path) -> None:
    with opened(browser, sweep_page) as visit:
        names = "document.querySelector('.variants .plot').data.at(-1).text"
        assert visit.page.evaluate(names) == ["3", "1", "0"]
        visit.page.locator("select[data-part='0']").select_option("params")
        visit.page.wait_for_function(f"{names}.length === 1")
        assert visit.page.evaluate(names) == ["0"]
        title = visit.page.locator(".variants .xtitle").text_content()
        assert title == "parameters"


def test_links_lead_to_the_pages_of_the_runs(browser: Any, sweep_page: Path) -> None:
    with opened(browser, sweep_page) as visit:
        visit.page.locator("tbody a").nth(2).click()
        visit.page.wait_for_url("**/2/report.html")
        assert visit.page.locator("h1").inner_text() == "Conv2d on BrainSlices"


def test_two_thousand_layers_stay_usable(browser: Any, tmp_path: Path) -> None:
    write_run(tmp_path / "deep")
    layers = [
        LayerSummary(f"blocks.{n // 10}.conv{n % 10}", "Conv2d", Change(64, 32), {"macs": Change(100, 50)})
        for n in range(2000)
    ]
    save_layers(
        NetworkSummary(layers, {"macs": Change(0, 0)}, {"macs": Change(200_000, 100_000)}), tmp_path / "deep"
    )
    path = write_run_page(read_run(tmp_path / "deep"))
    assert path.stat().st_size < 4_000_000
    with opened(browser, path, PHONE) as visit:
        height = visit.page.evaluate("document.querySelector('.layers').clientHeight")
        assert height < 900
        folds = visit.page.locator(".layers > .lp-summary > details")
        assert 2 <= folds.count() <= 60
        folds.nth(1).locator("summary").click()
        assert folds.nth(1).locator("tr").nth(1).is_visible()
        assert visit.overflow() == 0
        assert visit.errors == []


def test_code_is_copied_or_selected(browser: Any, run_page: Path) -> None:
    with opened(browser, run_page) as visit:
        button = visit.page.locator("#load button").first
        button.click()
        visit.page.wait_for_function("document.querySelector('#load button').textContent !== 'copy'")
        assert button.inner_text() in ("copied", "selected: Ctrl+C")
