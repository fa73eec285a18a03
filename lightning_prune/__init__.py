"""Make a network physically smaller while it trains.

The engine, step by step::

    graph = trace(model, example)                     # which channels depend on which
    scores = IPAD(omega=1)(graph, model)              # importance of each unit
    plan = select(graph, scores, budget={"macs": 0.5})
    record = prune_(model, graph, plan.remove)        # verified, or rolled back

In training, :class:`FilterPruningCallback` does all of it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_prune.callbacks.checkpoints import BestOfLast, BudgetCheckpoint, BudgetEarlyStopping
    from lightning_prune.callbacks.method_callback import PruningCallback
    from lightning_prune.callbacks.methods.base import PruningMethod
    from lightning_prune.callbacks.netadapt import NetAdaptCallback
    from lightning_prune.callbacks.pruning import FilterPruningCallback
    from lightning_prune.callbacks.slimming import SlimmingCallback
    from lightning_prune.cli.sweep import SweepTable
    from lightning_prune.criteria.block_scores import block_scores
    from lightning_prune.criteria.ipad import IPAD
    from lightning_prune.criteria.weights import L1, L2, Random
    from lightning_prune.distillation.config import Distillation
    from lightning_prune.distillation.mixin import DistillationMixin
    from lightning_prune.graph.block_search import residual_blocks
    from lightning_prune.graph.channel_graph import ChannelGraph
    from lightning_prune.graph.costs import Term
    from lightning_prune.graph.layer_costs import LayerCost
    from lightning_prune.graph.pins import pin, unpin
    from lightning_prune.graph.residual_blocks import ResidualBlock, ResidualBlocks
    from lightning_prune.graph.trace import TraceError, trace
    from lightning_prune.latency.store import LatencyError
    from lightning_prune.latency.table import LatencyTable
    from lightning_prune.pruning.one_shot import one_shot
    from lightning_prune.pruning.pruner import Pruner
    from lightning_prune.pruning.schedules import Cubic, Curve, Linear, OneShot, Timing
    from lightning_prune.pruning.sensitivity import sensitivity
    from lightning_prune.pruning.session import PruningSession
    from lightning_prune.reporting.csv_log import ResumableCSVLogger
    from lightning_prune.reporting.trackio import TrackioLogger
    from lightning_prune.reporting.visdom import VisdomLogger
    from lightning_prune.selection.depth import select_with_depth
    from lightning_prune.selection.depth_settings import DepthSettings
    from lightning_prune.selection.limits import Limits
    from lightning_prune.selection.optimal import OptimalSelection
    from lightning_prune.selection.plan import Plan
    from lightning_prune.selection.policy import PruningPolicy
    from lightning_prune.selection.select import select
    from lightning_prune.serialization.export import ExportError, export
    from lightning_prune.serialization.hub import push_pretrained
    from lightning_prune.serialization.model_card import ModelCard
    from lightning_prune.serialization.pretrained import load_pretrained, save_pretrained
    from lightning_prune.serialization.quantization import Int8Export, export_int8
    from lightning_prune.serialization.record import PruningRecord, RecordError
    from lightning_prune.serialization.saving import load_pruned, save_pruned
    from lightning_prune.serialization.torch_file import UnsafeFileError
    from lightning_prune.surgery.prune import SurgeryError, prune_
    from lightning_prune.tracing.rules.registry import rule
    from lightning_prune.trainer.checkpoint_io import AtomicCheckpointIO, last_checkpoint
    from lightning_prune.trainer.retraining import FinalPhase, Retraining
    from lightning_prune.utils.passing import PassingFailure

__version__ = "0.1.0"
__all__ = [
    "IPAD",
    "L1",
    "L2",
    "AtomicCheckpointIO",
    "BestOfLast",
    "BudgetCheckpoint",
    "BudgetEarlyStopping",
    "ChannelGraph",
    "Cubic",
    "Curve",
    "DepthSettings",
    "Distillation",
    "DistillationMixin",
    "ExportError",
    "FilterPruningCallback",
    "FinalPhase",
    "Int8Export",
    "LatencyError",
    "LatencyTable",
    "LayerCost",
    "Limits",
    "Linear",
    "ModelCard",
    "NetAdaptCallback",
    "OneShot",
    "OptimalSelection",
    "PassingFailure",
    "Plan",
    "Pruner",
    "PruningCallback",
    "PruningMethod",
    "PruningPolicy",
    "PruningRecord",
    "PruningSession",
    "Random",
    "RecordError",
    "ResidualBlock",
    "ResidualBlocks",
    "ResumableCSVLogger",
    "Retraining",
    "SlimmingCallback",
    "SurgeryError",
    "SweepTable",
    "Term",
    "Timing",
    "TraceError",
    "TrackioLogger",
    "UnsafeFileError",
    "VisdomLogger",
    "block_scores",
    "export",
    "export_int8",
    "last_checkpoint",
    "load_pretrained",
    "load_pruned",
    "one_shot",
    "pin",
    "prune_",
    "push_pretrained",
    "residual_blocks",
    "rule",
    "save_pretrained",
    "save_pruned",
    "select",
    "select_with_depth",
    "sensitivity",
    "trace",
    "unpin",
]

# Imported on first use: torch, Lightning and Hydra take seconds to import, for which help and messages about a wrong
# command line need not wait.
_MODULE_OF = {
    "AtomicCheckpointIO": "trainer.checkpoint_io",
    "BestOfLast": "callbacks.checkpoints",
    "BudgetCheckpoint": "callbacks.checkpoints",
    "BudgetEarlyStopping": "callbacks.checkpoints",
    "ChannelGraph": "graph.channel_graph",
    "Cubic": "pruning.schedules",
    "Curve": "pruning.schedules",
    "DepthSettings": "selection.depth_settings",
    "Distillation": "distillation.config",
    "DistillationMixin": "distillation.mixin",
    "ExportError": "serialization.export",
    "FilterPruningCallback": "callbacks.pruning",
    "FinalPhase": "trainer.retraining",
    "IPAD": "criteria.ipad",
    "Int8Export": "serialization.quantization",
    "L1": "criteria.weights",
    "L2": "criteria.weights",
    "LatencyError": "latency.store",
    "LatencyTable": "latency.table",
    "LayerCost": "graph.layer_costs",
    "Limits": "selection.limits",
    "Linear": "pruning.schedules",
    "ModelCard": "serialization.model_card",
    "NetAdaptCallback": "callbacks.netadapt",
    "OneShot": "pruning.schedules",
    "OptimalSelection": "selection.optimal",
    "PassingFailure": "utils.passing",
    "Plan": "selection.plan",
    "Pruner": "pruning.pruner",
    "PruningCallback": "callbacks.method_callback",
    "PruningMethod": "callbacks.methods.base",
    "PruningPolicy": "selection.policy",
    "PruningRecord": "serialization.record",
    "PruningSession": "pruning.session",
    "Random": "criteria.weights",
    "RecordError": "serialization.record",
    "ResidualBlock": "graph.residual_blocks",
    "ResidualBlocks": "graph.residual_blocks",
    "ResumableCSVLogger": "reporting.csv_log",
    "Retraining": "trainer.retraining",
    "SlimmingCallback": "callbacks.slimming",
    "SurgeryError": "surgery.prune",
    "SweepTable": "cli.sweep",
    "Term": "graph.costs",
    "Timing": "pruning.schedules",
    "TraceError": "graph.trace",
    "UnsafeFileError": "serialization.torch_file",
    "TrackioLogger": "reporting.trackio",
    "VisdomLogger": "reporting.visdom",
    "block_scores": "criteria.block_scores",
    "export": "serialization.export",
    "export_int8": "serialization.quantization",
    "last_checkpoint": "trainer.checkpoint_io",
    "load_pretrained": "serialization.pretrained",
    "load_pruned": "serialization.saving",
    "one_shot": "pruning.one_shot",
    "pin": "graph.pins",
    "prune_": "surgery.prune",
    "residual_blocks": "graph.block_search",
    "push_pretrained": "serialization.hub",
    "save_pretrained": "serialization.pretrained",
    "rule": "tracing.rules.registry",
    "save_pruned": "serialization.saving",
    "select": "selection.select",
    "select_with_depth": "selection.depth",
    "sensitivity": "pruning.sensitivity",
    "trace": "graph.trace",
    "unpin": "graph.pins",
}
_PACKAGES = (
    *("classification", "compensation", "criteria", "data", "distillation"),
    *("netadapt", "segmentation", "slimming", "testing"),
)


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        value = getattr(import_module(f"lightning_prune.{_MODULE_OF[name]}"), name)
        globals()[name] = value  # the next access is an ordinary one
        return value
    if name in _PACKAGES:
        return import_module(f"lightning_prune.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_PACKAGES})
