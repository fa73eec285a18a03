"""The section of the page of ``python -m benchmarks.depth`` about the number of blocks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean

from benchmarks.common.studies import Row

__all__ = ["CASES", "NUMBER_BUDGETS", "section"]

CASES = (("fashion", "onnx"), ("fashion", "eager"))  # task, execution
NUMBER_BUDGETS = (0.65, 0.5, 0.35, 0.25)  # shares of the latency
#: way to choose -> what it says in the table
WAYS = {
    "scores": 'sums of scores (`compare="scores"`)',
    "as it is": "change of the outputs, as the cut leaves it",
    "norms anew": "change of the outputs, batch norms estimated anew",
    "repaired": 'change of the outputs, repaired (`compare="repaired"`)',
}
TEXT = """## How many blocks vanish

On validation with seed 1 (`python -m benchmarks.depth.numbers`): networks cut with every number of blocks
({cases}; 65, 50, 35 and 25 % of the latency), and four ways to choose among those that meet
the budget. *Loss*: how far the score of the chosen number is below that of the best one, averaged over {count} cases.
Sums of scores let too few blocks vanish: they do not know that each further channel of a narrow layer costs more than
the one before. So the repaired copies decide.
"""


def section(rows: Sequence[Row]) -> Iterator[str]:
    """Return the lines of the section; none without rows."""
    groups: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in ("seed", "task", "execution", "budget")), []).append(row)
    if not groups:
        return
    reached = [[row for row in group if row["reached"]] or group for group in groups.values()]
    cases = ", ".join(dict.fromkeys(f"{group[0]['task']} {group[0]['execution']}" for group in reached))
    yield from TEXT.format(cases=cases, count=len(reached)).splitlines()
    yield from ("", "| number chosen by | blocks, mean | loss before training | loss after training |")
    yield "|:--|--:|--:|--:|"
    for way, label in WAYS.items():
        taken = [_taken(group, way) for group in reached]
        losses = [_loss(reached, taken, when) for when in ("cut", "trained")]
        blocks = fmean(row["blocks"] for row in taken)
        yield f"| {label} | {blocks:.1f} | {losses[0]:.3f} | {losses[1]:.3f} |"
    best = [max(group, key=lambda row: row["cut"]) for group in reached]
    yield f"| the best on validation, before training | {fmean(row['blocks'] for row in best):.1f} | 0.000 |  |"


def _taken(group: Sequence[Row], way: str) -> Row:
    """Return the row that a way chooses; sums of scores may prefer a plan that does not meet the budget."""
    if way == "scores":
        return next((row for row in group if row["scores"]), group[0])
    return min(group, key=lambda row: (row[way], row["blocks"]))


def _loss(groups: Sequence[Sequence[Row]], taken: Sequence[Mapping[str, float]], when: str) -> float:
    return fmean(
        max(row[when] for row in group) - choice[when] for group, choice in zip(groups, taken, strict=True)
    )
