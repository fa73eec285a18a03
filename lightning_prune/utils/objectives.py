"""Names of the values that a run returns to a sweeper, checked before torch is imported."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_prune.utils.hints import did_you_mean
from lightning_prune.utils.metrics import higher_is_better

__all__ = ["SIZES", "check_directions", "check_objective", "objective_names"]

#: sizes of the final network that can be an objective; attributes of ``Sizes``
SIZES = ("macs", "params", "bytes", "latency_ms")


def objective_names(setting: str | Sequence[str] | None) -> list[str]:
    """Return the names of the values to return; an empty list if the main score on the validation set is wanted.

    Example:
        >>> objective_names("val/miou"), objective_names(["val/miou", "macs"]), objective_names(None)
        (['val/miou'], ['val/miou', 'macs'], [])
    """
    return [setting] if isinstance(setting, str) else [str(name) for name in setting or ()]


def check_objective(names: Sequence[str], latency_runs: int) -> None:
    """Check the names of objectives as far as possible before a run.

    Raises:
        ValueError: a name is of the test set, a size with another name, or the latency, which is not measured.
    """
    for name in names:
        if name.startswith(("test/", "test_")):
            raise ValueError(
                f"objective={name}: the test set must not decide; choose by {name.replace('test', 'val', 1)}"
            )
        if "/" not in name and name not in SIZES and (hint := did_you_mean(name, SIZES, "objective={}")):
            raise ValueError(f"objective={name}: {hint} The sizes are {', '.join(SIZES)}")
        if name == "latency_ms" and not latency_runs:
            raise ValueError("objective=latency_ms is not measured: set latency_runs=30")


def check_directions(names: Sequence[str], directions: Sequence[str]) -> str:
    """Check the directions of a search against its objectives, and return a warning, or an empty string.

    Args:
        names: from :func:`objective_names`; empty: the main score.
        directions: ``"minimize"`` or ``"maximize"``, for each objective.

    Raises:
        ValueError: there is not one direction for each objective.

    Example:
        >>> check_directions(["val/miou", "macs"], ["maximize", "minimize"])
        ''
        >>> check_directions([], ["minimize"])
        'the search minimizes the score in val, of which more is better: hydra.sweeper.direction=maximize'
    """
    names = names or ["the score in val"]
    if len(names) != len(directions):
        raise ValueError(
            f"{len(names)} objectives ({', '.join(names)}) need as many directions, got {', '.join(directions)}: "
            f"hydra.sweeper.direction=[{','.join(map(_best_direction, names))}]"
        )
    best = list(map(_best_direction, names))
    wrong = [pair for pair in zip(names, directions, best, strict=True) if pair[1] != pair[2]]
    if not wrong:
        return ""
    name, given, _ = wrong[0]
    setting = best[0] if len(best) == 1 else f"[{','.join(best)}]"
    more = "less" if _best_direction(name) == "minimize" else "more"
    return f"the search {given}s {name}, of which {more} is better: hydra.sweeper.direction={setting}"


def _best_direction(name: str) -> str:
    return "minimize" if name in SIZES or not higher_is_better(name) else "maximize"
