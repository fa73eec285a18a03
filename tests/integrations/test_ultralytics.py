"""Tests the recipe for Ultralytics; skipped where that package (AGPL) is absent."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks.trainers.yolo import write_data

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "trainers.md"


@pytest.mark.filterwarnings("ignore")  # of that package
def test_the_recipe_prunes_to_half_and_exports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ultralytics")
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path, segment=False)
    recipes = re.findall(r"```py\n(.*?)```", GUIDE.read_text(), flags=re.DOTALL)
    (recipe,) = [each for each in recipes if "ultralytics" in each]
    scope: dict[str, Any] = {}
    exec(compile(recipe, "guide", "exec"), scope)
    trainer = scope["yolo"].trainer
    assert trainer.pruner.metrics["prune/macs_share"] <= 0.5
    smaller = scope["YOLO"](trainer.best).model
    own = dict(trainer.model.named_parameters())
    assert all(parameter.shape == own[name].shape for name, parameter in smaller.named_parameters())
    assert list(Path(trainer.save_dir).rglob("*.onnx"))
