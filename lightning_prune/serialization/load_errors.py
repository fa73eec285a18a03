"""Add advice to torch's error where it refuses weights because a pruned network has another size.

Lightning calls no hook of a callback in ``load_from_checkpoint``, nor in a Trainer without a pruning callback, and
torch none in ``load_state_dict``. What these raise names every tensor, but not the reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import wraps
from typing import Any

from torch import Tensor, nn

from lightning_prune.serialization.cut_notes import notes_of
from lightning_prune.utils.modules import tensors_by_all_names

__all__ = ["explain_load_errors"]

HINT = (
    "Load the file by lightning_prune.load_pruned(module, path), or by a Trainer with the pruning callback: both "
    "give the module the sizes of the file first. See docs/guides/checkpoints.md of lightning-prune."
)


def explain_load_errors() -> None:
    """Have errors of ``nn.Module.load_state_dict`` name ``load_pruned`` if pruning may be the reason."""
    original = nn.Module.load_state_dict
    if hasattr(original, "_names_load_pruned"):
        return

    @wraps(original)
    def load_state_dict(self: nn.Module, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        try:
            return original(self, state_dict, *args, **kwargs)
        except RuntimeError as error:
            if advice := advice_for(self, state_dict):
                error.args = (f"{error}\n\t{advice}",)
            raise

    load_state_dict._names_load_pruned = True  # type: ignore[attr-defined]
    nn.Module.load_state_dict = load_state_dict  # type: ignore[method-assign]


def advice_for(module: nn.Module, state_dict: Mapping[str, Any]) -> str:
    """Return what to do if pruning may be the reason why weights do not fit; empty if it cannot be.

    Example:
        >>> advice_for(nn.Linear(2, 2), {"weight": Tensor(1, 2)}).partition(".")[0]
        'If these weights are of a network that was pruned, the module has to be cut first'
        >>> advice_for(nn.Linear(2, 2), {"weight": Tensor(3, 2)})
        ''
    """
    tensors = tensors_by_all_names(module)
    pairs = [(own.shape, state_dict[name].shape) for name, own in tensors if _is_tensor(state_dict, name)]
    different = [(own, given) for own, given in pairs if own != given]
    if not different:
        return ""
    if any(notes_of(module)):
        return f"This network was pruned, and these weights are of another size of it. {HINT}"
    if all(len(own) == len(given) and all(map(int.__ge__, own, given)) for own, given in different):
        return f"If these weights are of a network that was pruned, the module has to be cut first. {HINT}"
    return ""


def _is_tensor(state_dict: Mapping[str, Any], name: str) -> bool:
    return isinstance(state_dict, Mapping) and isinstance(state_dict.get(name), Tensor)
