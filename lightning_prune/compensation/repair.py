"""Repair a network after a cut: fit its layers, in the order of execution, to what the dense network gave."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_prune.compensation.calibration import (
    Calibration,
    CompensationError,
    CompensationSettings,
    calibration,
    output_change,
    outputs_of,
    undisturbed,
)
from lightning_prune.compensation.calls import observed_calls
from lightning_prune.compensation.judges import judged_change
from lightning_prune.compensation.layer_repair import LayerRepairer
from lightning_prune.compensation.layers import Layer, find_layers
from lightning_prune.compensation.refinement import refine_
from lightning_prune.compensation.report import CompensationReport
from lightning_prune.compensation.target_records import Targets
from lightning_prune.compensation.targets import collect_targets
from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.serialization.record import PruningRecord
from lightning_prune.surgery.prune import prune_, surviving_indices
from lightning_prune.utils.distributed import from_first
from lightning_prune.utils.modules import named_tensors

__all__ = ["compensate_", "cut_and_compensate_"]


def cut_and_compensate_(
    model: nn.Module,
    graph: ChannelGraph,
    remove: Iterable[int],
    batches: Sequence[Any],
    optimizers: Sequence[Optimizer] = (),
    settings: CompensationSettings | None = None,
    blocks: Sequence[str] | None = None,
) -> tuple[PruningRecord, CompensationReport]:
    """Cut ``model`` as :func:`~lightning_prune.prune_` does, and repair what is left.

    Args:
        model: the network that ``graph`` was traced from.
        graph: its units and their dependencies.
        remove: numbers of units, or a :class:`~lightning_prune.Plan`.
        batches: some 32 images for dense prediction, 128 to 512 for classification; labels are ignored.
        optimizers: their state is cut too; the repair leaves it as it is.
        settings: how much of the batches is looked at.
        blocks: names of residual blocks that vanish, as for :func:`~lightning_prune.prune_`.

    Returns:
        The record of the cut, and what was repaired.

    Raises:
        SurgeryError: the cut was refused; nothing was changed.
        CompensationError: the batches cannot be used; nothing was changed.

    Example:
        >>> import torch
        >>> from lightning_prune import trace
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 1))
        >>> images = torch.rand(8, 3, 16, 16)
        >>> graph = trace(net, images[:1])
        >>> record, report = cut_and_compensate_(net, graph, graph.layers["0.weight"][:4], [images])
        >>> net[0].out_channels, report.change_after < report.change_before
        (4, True)
    """
    units, names = list(remove), getattr(remove, "blocks", ()) if blocks is None else blocks
    targets = collect_targets(model, surviving_indices(graph, graph.kept(units)), batches, settings)
    record = prune_(model, graph, units, optimizers, names)
    return record, compensate_(model, targets, batches)


def compensate_(model: nn.Module, targets: Targets, batches: Sequence[Any]) -> CompensationReport:
    """Repair a network after a cut, in place, if that brings its outputs nearer to the dense ones.

    Each layer is regressed, around the weight that it has, from the inputs that it really gets to the dense layer's
    outputs. Images that take no part in the fit decide about each layer, and about the whole. In a distributed run
    every process must call this; all take over the repair of the first one.

    Args:
        model: the network after the cut.
        targets: what :func:`~lightning_prune.compensation.targets.collect_targets` saw before it.
        batches: the same as for the targets.

    Returns:
        What was repaired. If the outputs of held-out images did not come nearer, everything was undone.

    Raises:
        CompensationError: the batches cannot be used; nothing was changed.

    Example:
        >>> import torch
        >>> import copy
        >>> from lightning_prune import trace
        >>> from lightning_prune.compensation import collect_targets
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 1))
        >>> images = torch.rand(8, 3, 16, 16)
        >>> small = copy.deepcopy(net)
        >>> graph = trace(small, images[:1])
        >>> record = prune_(small, graph, graph.layers["0.weight"][:4])
        >>> report = compensate_(small, collect_targets(net, record.kept, [images]), [images])
        >>> report.change_after < report.change_before
        True
    """
    report, values = from_first(lambda: _repair_(model, targets, batches))
    tensors = named_tensors(model)
    for name, value in values.items():
        tensors[name].data.copy_(value)
    return report


def _repair_(
    model: nn.Module, targets: Targets, batches: Sequence[Any]
) -> tuple[CompensationReport, dict[str, Tensor]]:
    """Repair a network; return the report, and the tensors that are changed now, on the CPU."""
    images = calibration(model, batches, targets.settings)
    if images.num_images != targets.num_images:
        raise CompensationError(f"the targets are of {targets.num_images} images, not {images.num_images}")
    before = _change(model, targets, images)
    if not before > 0:
        reason = "its outputs are the dense ones" if before == 0 else "its outputs cannot be compared"
        return CompensationReport(False, reason, before, before, left_alone=targets.left_alone), {}
    repairer = LayerRepairer(targets, model)
    try:
        after = _repair_layers(model, targets, images, repairer, before)
    except BaseException:
        repairer.undo()
        raise
    accepted = repairer.changed and after < before
    if not accepted:
        repairer.undo()
    reason = "" if accepted else _refusal(repairer, after)
    report = CompensationReport(
        accepted, reason, before, after, repairer.layers, repairer.left_alone, repairer.not_refined
    )
    tensors = named_tensors(model)
    return report, {name: tensors[name].detach().cpu() for name in sorted(repairer.names) if accepted}


def _refusal(repairer: LayerRepairer, after: float) -> str:
    if not repairer.changed:
        return "no layer came nearer to the dense one"
    return f"the outputs of held-out images did not come nearer to the dense ones (change {after:.2g})"


def _repair_layers(
    model: nn.Module, targets: Targets, images: Calibration, repairer: LayerRepairer, before: float
) -> float:
    """Repair the layers, and return the distance of the outputs on images that took no part in it.

    If that is nearer, the layers are refined together, if the settings say so. If they do not, or if that is of no
    use, all layers are fitted once more, to all images; this is undone if it worsens the outputs.
    """
    layers, left_alone = find_layers(model)
    repairer.left_alone.update(left_alone)
    layers = [layer for layer in layers if layer.name in targets.calls]
    repeated = repairer.prepare(layers)
    for _ in range(2 if repeated else 1):  # again for calls that came before the repair of their weight
        _run(model, images, layers, repairer, refits=False)
    after = _change(model, targets, images)
    if targets.settings.refine_passes and after < before:
        refined = _refine(model, targets, images, repairer, layers, after)
        if refined < after:
            return refined
    if targets.settings.refit and after < before:
        restore = repairer.snapshot()
        _run(model, images, layers, repairer, refits=True)
        if not _change(model, targets, images) <= after:
            restore()
    return after


def _refine(
    model: nn.Module,
    targets: Targets,
    images: Calibration,
    repairer: LayerRepairer,
    layers: Sequence[Layer],
    before: float,
) -> float:
    """Refine the layers that were not left alone; return the distance of the outputs on held-out images."""
    layers = [layer for layer in layers if layer.name not in repairer.left_alone]
    passes, measure = targets.settings.refine_passes, partial(_change, model, targets, images)
    outcome = refine_(model, layers, images, targets.outputs, passes, before, measure)
    repairer.names.update(outcome.names)
    repairer.not_refined = outcome.reason
    return outcome.change


def _run(
    model: nn.Module, images: Calibration, layers: Sequence[Layer], repairer: LayerRepairer, refits: bool
) -> None:
    """Run the network once and repair its layers on the way."""
    repairer.start_forward(refits)
    with (
        undisturbed(model),
        repairer.sums.watching(model),
        observed_calls(model, layers, repairer.observe),
    ):
        outputs_of(model, images)
    repairer.write()


def _change(model: nn.Module, targets: Targets, images: Calibration) -> float:
    """Return the distance of the outputs from the dense ones; NaN if they cannot be compared.

    If the size of an output depends on values, as the boxes of a detector do, the last layers before that are
    compared in place of the outputs.
    """
    if targets.judges:
        return judged_change(model, targets, images)
    with undisturbed(model):
        return output_change(targets.outputs, outputs_of(model, images), images)
