"""Trainers other than Lightning's; each needs its own package, see the extras.

Names are imported on first use, so that one trainer's package is not needed for another.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_prune.integrations.transformers import PrunerCallback

__all__ = ["PrunerCallback"]

_MODULE_OF = {"PrunerCallback": "transformers"}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
