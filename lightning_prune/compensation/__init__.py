"""Repair after a cut: fit the layers that remain to the outputs of the dense network, without labels."""

from lightning_prune.compensation.calibration import CompensationError, CompensationSettings
from lightning_prune.compensation.repair import compensate_, cut_and_compensate_
from lightning_prune.compensation.report import CompensationReport, LayerRepair
from lightning_prune.compensation.target_records import Targets
from lightning_prune.compensation.targets import collect_targets

__all__ = [
    "CompensationError",
    "CompensationReport",
    "CompensationSettings",
    "LayerRepair",
    "Targets",
    "collect_targets",
    "compensate_",
    "cut_and_compensate_",
]
