"""Tests of the study of other trainers that need none of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from PIL import Image

from benchmarks.common.pages import ReportFiles
from benchmarks.trainers.__main__ import main, page
from benchmarks.trainers.yolo import NETWORKS, SIZE, write_data


@pytest.mark.parametrize("segment", [False, True])
def test_the_data_have_the_format_of_coco8(tmp_path: Path, segment: bool) -> None:
    path = write_data(tmp_path, segment, images=(3, 2))
    data = yaml.safe_load(path.read_text())
    assert data["names"] == {0: "disc", 1: "bar"}
    for part, number in (("train", 3), ("val", 2)):
        images = sorted((Path(data["path"]) / data[part]).glob("*.png"))
        assert len(images) == number
        for image in images:
            with Image.open(image) as drawn:
                assert drawn.size == (SIZE, SIZE)
            lines = (tmp_path / "labels" / part / f"{image.stem}.txt").read_text().splitlines()
            for line in lines:
                kind, *numbers = line.split()
                assert kind in "01"
                assert all(0 <= float(value) <= 1 for value in numbers)
                assert len(numbers) == (4 if not segment else 32 if kind == "0" else 8)


def test_the_page_is_written_from_its_numbers(tmp_path: Path) -> None:
    content = ReportFiles("trainers").load()
    assert {run["network"] for run in content["runs"]} == NETWORKS.keys()
    assert all(run["macs_share"] <= 0.501 and run["same_after_loading"] for run in content["runs"])
    files = ReportFiles("trainers", tmp_path)
    files.save(content)
    main(["--report", "--docs", str(tmp_path)])
    assert files.page.read_text() == page(content) == ReportFiles("trainers").page.read_text()
