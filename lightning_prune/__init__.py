"""Make a network physically smaller while it trains.

The whole story::

    graph = trace(model, example)                     # what depends on what
    scores = IPAD(omega=1)(graph, model)              # which filters matter
    plan = select(graph, scores, budget={"macs": 0.5})
    record = prune_(model, graph, plan.remove)        # proven, or rolled back
"""

from lightning_prune.graph import ChannelGraph
from lightning_prune.pins import pin, unpin
from lightning_prune.record import PruningRecord, RecordError
from lightning_prune.rules import rule
from lightning_prune.surgery import SurgeryError, prune_
from lightning_prune.tracing import TraceError, trace

__version__ = "0.1.0"
__all__ = [
    "ChannelGraph",
    "PruningRecord",
    "RecordError",
    "SurgeryError",
    "TraceError",
    "pin",
    "prune_",
    "rule",
    "trace",
    "unpin",
]
