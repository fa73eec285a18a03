"""``lightning-prune sensitivity``: score of a run's network against the share of filters removed, layer by layer."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.utils import instantiate
from matplotlib.figure import Figure
from omegaconf import DictConfig
from torch import nn
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

from lightning_prune.classification.module import ClassificationModule
from lightning_prune.cli.arguments import TrainArguments
from lightning_prune.cli.config import load_config
from lightning_prune.cli.parsers import read
from lightning_prune.cli.preflight import composed
from lightning_prune.criteria.base import CriterionLike
from lightning_prune.pruning.sensitivity import Row, Sensitivity, sensitivity
from lightning_prune.reporting.figure import INK, write_png
from lightning_prune.reporting.run_folder import NET, load_net
from lightning_prune.segmentation.metrics import mean_iou
from lightning_prune.utils.atomic import write_text
from lightning_prune.utils.example_inputs import Example
from lightning_prune.utils.metrics import SCORE_LABELS
from lightning_prune.utils.tables import Table, show
from lightning_prune.utils.terminal import fitted

__all__ = ["figure", "main", "sensitivity_run", "table"]

REFUSED_COLOR = "#d9d9d9"


def sensitivity_run(
    folder: Path,
    criterion: str = "ipad",
    batches: int = 0,
    recalibrate: int = 0,
    progress: Callable[[int, int, Row], None] | None = None,
    device: str = "cpu",
) -> Sensitivity:
    """Return the sensitivity of a run's network, by the mIoU or accuracy on its validation set.

    See :func:`lightning_prune.sensitivity`.

    Args:
        folder: folder of the run.
        criterion: an option of ``prune/criterion`` that needs weights alone.
        batches: number of batches of the validation set to score on; 0: all.
        recalibrate: number of training batches on which batch norms are estimated anew after each cut.
        progress: called after each layer with its number, the number of layers, and its row.
        device: torch device to compute on.

    Raises:
        ValueError: the criterion needs activations or gradients.
        FileNotFoundError: the folder holds no finished run.
    """
    config: Any = load_config(folder)
    net = load_net(instantiate(config.net, _convert_="all"), folder / NET).to(device)
    chosen_criterion, data = weight_criterion(criterion), instantiate(config.data, _convert_="all")
    data.prepare_data()
    data.setup("fit")
    validation = [batch[:2] for batch in islice(data.val_dataloader(), batches or None)]
    images: list[Example] = [
        ((batch[0].to(device),), {}) for batch in islice(data.train_dataloader(), recalibrate)
    ]
    classes, ignored = config.module.num_classes, config.module.get("ignore_index")
    label = score_label(config)
    example: Example = (torch.zeros(tuple(config.module.example_input_shape), device=device),), {}

    def evaluate(model: nn.Module) -> float:
        if label == SCORE_LABELS["accuracy"]:
            return accuracy(model, validation, classes, device)
        return miou(model, validation, classes, ignored, device)

    return sensitivity(
        net, example, evaluate, criterion=chosen_criterion, recalibrate=images, progress=progress
    )


def weight_criterion(option: str) -> CriterionLike:
    """Return the criterion of an option of ``conf/prune/criterion``.

    Raises:
        UsageError: there is no such option; the message names the nearest.
    """
    config = composed(TrainArguments([f"prune/criterion={option}"]))
    criterion: CriterionLike = instantiate(config.prune.criterion, _convert_="all")
    return criterion


def score_label(config: DictConfig) -> str:
    """Return the label of the main score of a run with this configuration."""
    classifies = str(config.module.get("_target_")).endswith(ClassificationModule.__name__)
    return SCORE_LABELS["accuracy" if classifies else "miou"]


def accuracy(model: nn.Module, batches: Sequence[Any], classes: int, device: str = "cpu") -> float:
    """Return the accuracy over a data set of images ``(n, c, h, w)`` and class numbers ``(n,)``."""
    metric = MulticlassAccuracy(classes, average="micro")
    for image, target in batches:
        metric.update(model(image.to(device)).cpu(), target)
    return float(metric.compute())


def miou(
    model: nn.Module, batches: Sequence[Any], classes: int, ignored: int | None, device: str = "cpu"
) -> float:
    """Return the mIoU over a data set, as validation logs it.

    Args:
        model: returns logits (n, classes, h, w).
        batches: pairs of images (n, c, h, w) and masks (n, h, w).
        classes: number of classes.
        ignored: class in masks that is not scored; None: all are.
        device: torch device of the model.
    """
    metric = MulticlassJaccardIndex(classes, average="none", ignore_index=ignored, zero_division=float("nan"))
    for image, target in batches:
        metric.update(model(image.to(device)).max(1).indices.cpu(), target)
    iou = metric.compute()
    if ignored is not None and 0 <= ignored < classes:
        iou[ignored] = float("nan")
    return float(mean_iou(iou))


def table(result: Sensitivity) -> Table:
    """Return a table with one row per group of coupled layers, one column per share removed."""
    header = ("coupled layers", "filters", *(f"-{share:.0%}" for share in result.shares))
    rows = [(_label(row), str(row.units), *(_format(s, 3, "-") for s in row.scores)) for row in result.rows]
    return Table(header, rows)


def _label(row: Row) -> str:
    return row.name if len(row.layers) < 2 else f"{row.name} (x{len(row.layers)})"


def _format(score: float, digits: int, missing: str) -> str:
    return missing if math.isnan(score) else f"{score:.{digits}f}"


def figure(result: Sensitivity, metric: str = "mIoU") -> Figure:
    """Draw a heat map: layers downwards in the order of the forward, the share removed to the right."""
    values = np.array([row.scores for row in result.rows], dtype=float)
    rows, columns = values.shape
    picture = Figure(figsize=(3.5 + 0.62 * columns, 1.6 + 0.24 * rows), layout="constrained")
    axes = picture.add_subplot()
    axes.set_facecolor(REFUSED_COLOR)
    heat_map = axes.imshow(values, aspect="auto", cmap="viridis", vmin=0.0, vmax=max(result.dense, 1e-9))
    axes.set_yticks(range(rows), [_label(row) for row in result.rows], fontsize=7, color=INK)
    axes.set_xticks(range(columns), [f"{share:.0%}" for share in result.shares], fontsize=8, color=INK)
    axes.set_xlabel("share of the filters removed, from this row alone", fontsize=9, color=INK)
    axes.set_title(_title(result, metric), loc="left", fontsize=9, color=INK)
    for (y, x), value in np.ndenumerate(values):
        on_dark = not math.isnan(value) and value <= 0.6 * result.dense
        text = _format(value, 2, "\N{EN DASH}")
        axes.text(x, y, text, ha="center", va="center", fontsize=6, color="white" if on_dark else "black")
    picture.colorbar(heat_map, ax=axes, shrink=0.8).set_label(metric, fontsize=8, color=INK)
    return picture


def _title(result: Sensitivity, metric: str) -> str:
    refused = any(math.isnan(score) for row in result.rows for score in row.scores)
    legend = "; grey: this cut is refused" if refused else ""
    return f"{metric} after one cut; {result.dense:.3f} with all filters{legend}"


def main(arguments: Sequence[str]) -> None:
    """Run the command with the arguments of its command line; ``--help`` lists them."""
    options = read("sensitivity", arguments)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        result = sensitivity_run(
            options.run, options.criterion, options.batches, options.recalibrate, _progress, device
        )
    except (ValueError, OSError, RuntimeError) as error:
        raise SystemExit(f"lightning-prune sensitivity: {error}") from error
    folder = options.out or options.run
    write_text(folder / "sensitivity.json", json.dumps(result.to_dict(), indent=1) + "\n")
    label = score_label(load_config(options.run))
    write_png(figure(result, label), folder / "sensitivity.png")
    show(table(result))
    print(f"{label} {result.dense:.3f} uncut; {result.seconds:.0f} s; {folder / 'sensitivity.png'}")


def _progress(done: int, total: int, row: Row) -> None:
    print(
        fitted(
            f"{done}/{total} {_label(row)}: {row.scores[-1]:.3f} with the largest share removed",
            stream=sys.stderr,
        ),
        file=sys.stderr,
        flush=True,
    )
