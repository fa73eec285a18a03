"""Make a network physically smaller while it trains.

The whole story::

    graph = trace(model, example)                     # what depends on what
    scores = IPAD(omega=1)(graph, model)              # which filters matter
    plan = select(graph, scores, budget={"macs": 0.5})
    record = prune_(model, graph, plan.remove)        # proven, or rolled back
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_prune.criteria import IPAD, L1, L2, Random
from lightning_prune.graph import ChannelGraph
from lightning_prune.latency_table import LatencyTable
from lightning_prune.limits import Limits
from lightning_prune.measurements import LatencyError
from lightning_prune.pins import pin, unpin
from lightning_prune.record import PruningRecord, RecordError
from lightning_prune.resources import LayerCost
from lightning_prune.rules import rule
from lightning_prune.saving import load_pruned, save_pruned
from lightning_prune.schedules import Cubic, Curve, Linear, OneShot
from lightning_prune.selection import Plan, select
from lightning_prune.surgery import SurgeryError, prune_
from lightning_prune.tracing import TraceError, trace

if TYPE_CHECKING:
    from lightning_prune.best import BestOfLast, BudgetCheckpoint, BudgetEarlyStopping
    from lightning_prune.callback import FilterPruningCallback
    from lightning_prune.checkpoint_io import AtomicCheckpointIO, last_checkpoint
    from lightning_prune.distillation import Distillation, DistillationMixin
    from lightning_prune.netadapt_callback import NetAdaptCallback
    from lightning_prune.retraining import FinalPhase
    from lightning_prune.slimming import SlimmingCallback

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
    "Distillation",
    "DistillationMixin",
    "FilterPruningCallback",
    "FinalPhase",
    "LatencyError",
    "LatencyTable",
    "LayerCost",
    "Limits",
    "Linear",
    "NetAdaptCallback",
    "OneShot",
    "Plan",
    "PruningRecord",
    "Random",
    "RecordError",
    "SlimmingCallback",
    "SurgeryError",
    "TraceError",
    "last_checkpoint",
    "load_pruned",
    "pin",
    "prune_",
    "rule",
    "save_pruned",
    "select",
    "trace",
    "unpin",
]


# The engine does not need Lightning, which takes its time to import.
_LATE = {
    "AtomicCheckpointIO": "checkpoint_io",
    "BestOfLast": "best",
    "BudgetCheckpoint": "best",
    "BudgetEarlyStopping": "best",
    "Distillation": "distillation",
    "DistillationMixin": "distillation",
    "FilterPruningCallback": "callback",
    "FinalPhase": "retraining",
    "NetAdaptCallback": "netadapt_callback",
    "SlimmingCallback": "slimming",
    "last_checkpoint": "checkpoint_io",
}


def __getattr__(name: str) -> Any:
    if name in _LATE:
        return getattr(import_module(f"lightning_prune.{_LATE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
