"""``lightning-prune sensitivity``: mIoU of a run's network against the share removed, layer by layer (level 5)."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from matplotlib.figure import Figure
from omegaconf import OmegaConf
from torch import nn
from torchmetrics.classification import MulticlassJaccardIndex

from lightning_prune.cli.config import conf_dir
from lightning_prune.criteria.activation_deviation import ActivationDeviation
from lightning_prune.criteria.base import Criterion
from lightning_prune.pruning.sensitivity import Row, Sensitivity, sensitivity
from lightning_prune.reporting import run_folder as runs
from lightning_prune.reporting.figure import INK
from lightning_prune.segmentation.metrics import mean_iou
from lightning_prune.serialization.saving import load_pruned
from lightning_prune.utils.example_inputs import Example
from lightning_prune.utils.tables import Table, show

__all__ = ["figure", "main", "sensitivity_run", "table"]

REFUSED = "#d9d9d9"


def sensitivity_run(
    folder: Path,
    criterion: str = "ipad",
    batches: int = 0,
    recalibrate: int = 0,
    progress: Callable[[int, int, Row], None] | None = None,
    device: str = "cpu",
) -> Sensitivity:
    """:func:`~lightning_prune.pruning.sensitivity.sensitivity` of a run's network, by mIoU on its validation set.

    Args:
        folder: of the run.
        criterion: an option of ``prune/criterion`` that looks at weights alone.
        batches: of the validation set to score on; 0: all.
        recalibrate: training batches on which batch norms are estimated anew after each cut.
        progress: as there.
        device: to compute on, as torch names it.

    Raises:
        ValueError: the criterion looks at activations or gradients.
        FileNotFoundError: the folder holds no finished run.
    """
    config: Any = OmegaConf.load(folder / runs.CONFIG)
    net = load_pruned(instantiate(config.net, _convert_="all"), folder / runs.NET).to(device)
    chosen, data = weight_criterion(criterion), instantiate(config.data, _convert_="all")
    data.prepare_data()
    data.setup("fit")
    held = [batch[:2] for batch in islice(data.val_dataloader(), batches or None)]
    images: list[Example] = [
        ((batch[0].to(device),), {}) for batch in islice(data.train_dataloader(), recalibrate)
    ]
    classes, ignored = config.module.num_classes, config.module.ignore_index
    example: Example = (torch.zeros(tuple(config.module.example_input_shape), device=device),), {}
    score = lambda model: miou(model, held, classes, ignored, device)  # noqa: E731
    return sensitivity(net, example, score, criterion=chosen, recalibrate=images, progress=progress)


def weight_criterion(option: str) -> Criterion:
    """A criterion of ``conf/``, by its name.

    Raises:
        ValueError: it looks at more than weights.
    """
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        config = compose("config", overrides=[f"prune/criterion={option}"])
    criterion: Criterion = instantiate(config.prune.criterion, _convert_="all")
    if hasattr(criterion, "gather") or getattr(criterion, "statistic", ActivationDeviation) is not None:
        raise ValueError(
            f"{option} looks at training, and nothing is trained here: choose l1, l2, fpgm or ipad"
        )
    return criterion


def miou(
    model: nn.Module, batches: Sequence[Any], classes: int, ignored: int | None, device: str = "cpu"
) -> float:
    """Dataset mIoU, as validation logs it."""
    metric = MulticlassJaccardIndex(classes, average="none", ignore_index=ignored, zero_division=float("nan"))
    for image, target in batches:
        metric.update(model(image.to(device)).max(1).indices.cpu(), target)
    iou = metric.compute()
    if ignored is not None and 0 <= ignored < classes:
        iou[ignored] = float("nan")
    return float(mean_iou(iou))


def table(found: Sensitivity) -> Table:
    """One row per group of layers, one column per share."""
    header = ("layers that go together", "filters", *(f"-{share:.0%}" for share in found.shares))
    rows = [(_label(row), str(row.units), *(_number(s, 3, "-") for s in row.scores)) for row in found.rows]
    return Table(header, rows)


def _label(row: Row) -> str:
    return row.name if len(row.layers) < 2 else f"{row.name} (x{len(row.layers)})"


def _number(score: float, digits: int, otherwise: str) -> str:
    return otherwise if math.isnan(score) else f"{score:.{digits}f}"


def figure(found: Sensitivity, metric: str = "mIoU") -> Figure:
    """A heat map: layers from input to output downwards, the share removed to the right."""
    values = np.array([row.scores for row in found.rows], dtype=float)
    rows, columns = values.shape
    whole = Figure(figsize=(3.5 + 0.62 * columns, 1.6 + 0.24 * rows), layout="constrained")
    axes = whole.add_subplot()
    axes.set_facecolor(REFUSED)
    shown = axes.imshow(values, aspect="auto", cmap="viridis", vmin=0.0, vmax=max(found.dense, 1e-9))
    axes.set_yticks(range(rows), [_label(row) for row in found.rows], fontsize=7, color=INK)
    axes.set_xticks(range(columns), [f"{share:.0%}" for share in found.shares], fontsize=8, color=INK)
    axes.set_xlabel("share of the filters removed, from this row alone", fontsize=9, color=INK)
    axes.set_title(_title(found, metric), loc="left", fontsize=9, color=INK)
    for (y, x), value in np.ndenumerate(values):
        dark = not math.isnan(value) and value <= 0.6 * found.dense
        text = _number(value, 2, "\N{EN DASH}")
        axes.text(x, y, text, ha="center", va="center", fontsize=6, color="white" if dark else "black")
    whole.colorbar(shown, ax=axes, shrink=0.8).set_label(metric, fontsize=8, color=INK)
    return whole


def _title(found: Sensitivity, metric: str) -> str:
    refused = any(math.isnan(score) for row in found.rows for score in row.scores)
    grey = "; grey: this cut is refused" if refused else ""
    return f"{metric} after one cut; {found.dense:.3f} with all filters{grey}"


def main(arguments: Sequence[str]) -> None:
    """The command; see its ``--help``."""
    parser = argparse.ArgumentParser("lightning-prune sensitivity", description=__doc__)
    parser.add_argument(
        "run", type=Path, help="folder of a run; sensitivity.json and .png are written into it"
    )
    parser.add_argument("--criterion", default="ipad", help="which filters go first: l1, l2, fpgm, ipad, ...")
    parser.add_argument("--batches", type=int, default=0, help="of the validation set; all if left out")
    parser.add_argument("--recalibrate", type=int, default=0, help="training batches to renew batch norms on")
    parser.add_argument("--device", default="", help="as torch names it; a GPU if there is one, if left out")
    parser.add_argument("--out", type=Path, help="folder to write into instead")
    given = parser.parse_args(arguments)
    device = given.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = sensitivity_run(
            given.run, given.criterion, given.batches, given.recalibrate, _progress, device
        )
    except (ValueError, OSError, RuntimeError) as error:
        raise SystemExit(f"lightning-prune sensitivity: {error}") from error
    folder = given.out or given.run
    (folder / "sensitivity.json").write_text(json.dumps(found.to_dict(), indent=1) + "\n")
    figure(found).savefig(folder / "sensitivity.png", dpi=130)
    show(table(found))
    print(f"mIoU {found.dense:.3f} as it is; {found.seconds:.0f} s; {folder / 'sensitivity.png'}")


def _progress(done: int, total: int, row: Row) -> None:
    print(f"{done}/{total} {_label(row)}: {row.scores[-1]:.3f} at most removed", file=sys.stderr, flush=True)
