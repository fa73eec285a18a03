"""The confusion of the classes: kept by a training for the dense and the final network, and shown on its page."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from bs4 import BeautifulSoup
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn
from torchmetrics.functional.classification import multiclass_confusion_matrix

from lightning_prune.classification import ClassificationModule
from lightning_prune.reporting.pages.run_files import read_run
from lightning_prune.reporting.pages.run_page import write_run_page
from lightning_prune.reporting.run_observer import RunObserver
from tests.support.browser import DESKTOP, PHONE, browser, opened
from tests.support.run_folders import write_run

__all__ = ["browser"]  # a fixture

DENSE = [[90, 10, 0], [0, 0, 0], [40, 0, 60]]
FINAL = [[70, 30, 0], [0, 0, 0], [20, 0, 80]]
NAMES = ["sky", "sea", "sand"]


def page(folder: Path, **changes: Any) -> BeautifulSoup:
    run = write_run(
        folder, **{"class_names": NAMES, "val_confusion": {"dense": DENSE, "final": FINAL}, **changes}
    )
    return BeautifulSoup(write_run_page(read_run(run)).read_text(), "html.parser")


def plain(cell: Any) -> str:
    return str(cell.text.replace("\N{MINUS SIGN}", "-"))


def cells(soup: BeautifulSoup) -> dict[str, list[list[str]]]:
    """Return title -> the texts of each row of a table."""
    return {
        table.figcaption.b.text: [
            [plain(cell) for cell in row.select("td")] for row in table.select("tbody tr")
        ]
        for table in soup.select(".matrix")
    }


def test_tables_are_shares_of_the_true_classes_with_their_differences(tmp_path: Path) -> None:
    soup = page(tmp_path / "run", dense_epoch=2)
    assert cells(soup) == {
        "dense network": [["90.0", "10.0", "", "100"], ["no pixels", "0"], ["40.0", "", "60.0", "100"]],
        "pruned network": [["70.0", "30.0", "", "100"], ["no pixels", "0"], ["20.0", "", "80.0", "100"]],
        "difference": [["-20.0", "+20.0", "", "100"], ["no pixels", "0"], ["-20.0", "", "+20.0", "100"]],
    }
    kinds = [
        [cell.get("class")[0] for cell in row.select("td[style]")]
        for row in soup.select(".matrix")[2].select("tr")
    ]
    assert [kinds[2][:2], [kinds[4][0], kinds[4][2]]] == [["worse", "worse"], ["better", "better"]]
    intro = soup.select_one("#classes p").text
    assert intro.startswith("Of the pixels of each true class in the validation set, the share")
    assert "right before its first cut after 2 epochs of training" in intro
    assert [cell.text for cell in soup.select("#classes .plain td")] == ["sky", "sea", "10.0 %", "30.0 %"]
    titles = [cell["title"] for cell in soup.select(".matrix")[1].select("td[title]")]
    assert titles[:2] == ["sky, right: 70.00 % (70)", "sky, taken for sea: 30.00 % (30)"]


def test_a_class_that_occurs_in_one_of_two_validations_has_no_difference(tmp_path: Path) -> None:
    final = [FINAL[0], [0, 40, 0], FINAL[2]]
    found = cells(page(tmp_path / "run", val_confusion={"dense": DENSE, "final": final}))
    assert found["dense network"][1] == ["no pixels", "0"]
    assert found["pruned network"][1] == ["", "100.0", "", "40"]
    assert found["difference"][1] == ["no pixels", "0"]


def test_the_test_set_is_shown_where_there_is_no_dense_network_or_a_dense_run(tmp_path: Path) -> None:
    soup = page(tmp_path / "run", val_confusion={"final": FINAL}, confusion=DENSE)
    assert list(cells(soup)) == ["pruned network"]
    assert "in the test set" in soup.select_one("#classes p").text
    dense = read_run(write_run(tmp_path / "dense", class_names=NAMES, confusion=DENSE, cuts=[]))
    pruned = read_run(write_run(tmp_path / "pruned", class_names=NAMES, confusion=FINAL))
    both = BeautifulSoup(write_run_page(pruned, baseline=dense).read_text(), "html.parser")
    assert list(cells(both)) == ["dense run", "pruned network", "difference"]
    assert cells(both)["difference"][0] == ["-20.0", "+20.0", "", "100"]
    others = read_run(write_run(tmp_path / "others", class_names=NAMES, confusion=[[1, 0, 0]] * 3, cuts=[]))
    alone = BeautifulSoup(write_run_page(pruned, baseline=others).read_text(), "html.parser")
    assert list(cells(alone)) == ["pruned network"]


def test_runs_from_before_have_no_section(tmp_path: Path) -> None:
    soup = page(tmp_path / "run", val_confusion={}, confusion=[])
    assert soup.select_one("#classes") is None
    assert "classes" not in [link.text for link in soup.select("nav a")]


def test_a_class_that_is_ignored_is_said_not_to_count(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", class_names=NAMES, val_confusion={"final": FINAL}, cuts=[])
    with (run / "config.yaml").open("a") as file:
        file.write("module:\n  ignore_index: 1\n")
    soup = BeautifulSoup(write_run_page(read_run(run)).read_text(), "html.parser")
    assert cells(soup) == {
        "network": [["70.0", "30.0", "", "100"], ["not counted", "0"], ["20.0", "", "80.0", "100"]]
    }


def test_of_many_classes_the_most_frequent_mistakes_are_listed(tmp_path: Path) -> None:
    dense = np.eye(100, dtype=int) * 50
    final = dense.copy()
    final[7, [7, 3]], final[8, [8, 9]] = (40, 10), (45, 5)
    soup = page(
        tmp_path / "run",
        class_names=[],
        val_confusion={"dense": dense.tolist(), "final": final.tolist()},
    )
    assert not soup.select(".matrix")
    assert [[cell.text for cell in row.select("td")] for row in soup.select(".plain tbody tr")] == [
        ["7", "3", "0.0 %", "20.0 %"],
        ["8", "9", "0.0 %", "10.0 %"],
    ]


@pytest.mark.parametrize("width", [DESKTOP, PHONE])
@pytest.mark.parametrize("number", [2, 19])
def test_tables_fit_the_page_and_stand_in_one_place_if_they_are_large(
    browser: Any,
    tmp_path: Path,
    number: int,
    width: int,
) -> None:
    matrix = (np.eye(number, dtype=int) * 90 + 10).tolist()
    names = [f"a class with a long name {n}" for n in range(number)]
    page(tmp_path / "run", class_names=names, val_confusion={"dense": matrix, "final": matrix})
    with opened(browser, tmp_path / "run" / "report.html", width) as visit:
        tables, shown = visit.page.locator(".matrix"), visit.page.locator(".matrix:visible figcaption b")
        assert tables.count() == 3
        expected = ["dense network", "pruned network", "difference"]
        assert shown.all_inner_texts() == (expected if number == 2 else ["pruned network"])
        if number > 2:
            visit.page.locator(".tabs label").first.click()
            assert shown.all_inner_texts() == ["dense network"]
        assert visit.overflow() == 0
        assert visit.errors == []


def test_classification_keeps_the_confusion_of_each_validation() -> None:
    torch.manual_seed(0)
    module = ClassificationModule(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)), 3)
    module.log = module.log_dict = lambda *_, **__: None  # type: ignore[method-assign,assignment]
    images, targets = torch.rand(12, 1, 2, 2), torch.arange(12) % 3
    for _ in range(2):  # of the last one only
        module.on_validation_epoch_start()
        for start in (0, 6):
            module.validation_step((images[start : start + 6], targets[start : start + 6]), 0)
        module.on_validation_epoch_end()
    expected = multiclass_confusion_matrix(module(images).argmax(1), targets, 3)
    assert torch.equal(module.val_confusion, expected)
    assert module.confusion is None
    module.on_test_epoch_start()
    module.test_step((images[:6], targets[:6]), 0)
    module.on_test_epoch_end()
    tested = multiclass_confusion_matrix(module(images[:6]).argmax(1), targets[:6], 3)
    assert torch.equal(module.confusion, tested)  # not added to that of the validation
    assert torch.equal(module.val_confusion, expected)


@pytest.mark.parametrize("classes", [256, 257])
def test_validations_of_many_classes_do_not_count_their_confusion(classes: int) -> None:
    module = ClassificationModule(nn.Sequential(nn.Flatten(), nn.Linear(4, classes)), classes)
    module.log = module.log_dict = lambda *_, **__: None  # type: ignore[method-assign,assignment]
    batch = (torch.rand(6, 1, 2, 2), torch.arange(6))
    module.on_validation_epoch_start()
    module.validation_step(batch, 0)
    assert int(module.matrix.confmat.sum()) == (6 if classes == 256 else 0)
    module.on_validation_epoch_end()
    assert (module.val_confusion is None) == (classes == 257)
    module.on_test_epoch_start()
    module.test_step(batch, 0)
    module.on_test_epoch_end()
    assert int(module.confusion.sum()) == 6


@pytest.mark.parametrize("classes", [256, 257])
def test_checkpoints_keep_the_confusion_of_a_few_hundred_classes_at_most(classes: int) -> None:
    trainer = Mock(sanity_checking=False, current_epoch=4)
    trainer.state.fn = TrainerFn.FITTING
    observer = RunObserver(Mock(record=None))
    matrix = torch.eye(classes, dtype=torch.int64)
    observer.on_validation_end(trainer, Mock(val_confusion=matrix))
    kept = observer.state_dict()
    assert kept["confusion_epoch"] == 5
    assert kept["confusion"] is (matrix if classes == 256 else None)
