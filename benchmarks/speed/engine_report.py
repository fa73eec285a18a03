"""Write the page of the engine's speed, from the stored seconds of each network."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import geometric_mean, median
from typing import Any

from benchmarks.speed.engine import NAMED, PARTS

__all__ = ["page", "ratios"]

Row = dict[str, Any]
TRIED = """\
What was tried, in the order of what it gave:

- Most cuts of networks of torch, torchvision, timm and segmentation-models-pytorch are proven operator by operator,
  from masks of what survives, without a second forward. Code of one's own is run in any case.
- Units that are alike are taken at once, and the end of a selection is found by bisection.
- Common operators are recorded without torch's dispatcher, with shapes that are computed here.
- One mode is followed where both are alike. Ids are joined by pointers instead of sparse matrices.
- Replay on random numbers is left for the few operators that masks cannot decide. Its verdicts are not kept by
  signature, and blocks that repeat are not followed once for all: small networks, where ours is slowest, repeat
  little.
"""
CLOCK = 0.001  # seconds below which the clock of the processor tells nothing


def ratios(rows: Mapping[str, Row]) -> dict[str, float]:
    """Return network -> their time over ours, where both were measured.

    Example:
        >>> ratios({"a": {"ours": {"total": 2.0}, "peer": {"total": 3.0}}, "b": {"ours": {"total": 1.0}}})
        {'a': 1.5}
    """
    both = {name: row for name, row in rows.items() if "ours" in row and "peer" in row}
    return {name: row["peer"]["total"] / row["ours"]["total"] for name, row in both.items()}


def page(content: Mapping[str, Any]) -> str:
    """Return the page (Markdown) of the stored seconds, now and before."""
    now, before = (_by_network(content.get(label, {})) for label in ("now", "before"))
    if now:  # both are compared on the same networks
        before = {name: row for name, row in before.items() if name in now}
    head = content.get("now") or content["before"]
    lines = [
        "# Speed of the engine",
        "",
        f"{head['date']} · torch {head['versions']['torch']}, torch-pruning {head['versions']['torch-pruning']} · "
        f"{head['machine']}. Made by `python -m benchmarks.speed`.",
        "",
        *_summary("Now", now),
        *_load(now, before),
        *_commits(now),
        *_summary("Before", before),
        *_floor(now),
        *_cuts(content.get("cuts", ())),
        "",
        "Processor time, medians of three runs in one process in which both tools take turns, each on a copy of "
        "the same network with random weights. Ours: trace, plan, surgery and proof. Theirs: dependency graph and "
        "one step of `BasePruner` with `MagnitudeImportance` and ratio 0.5, which proves nothing. Ours plans for "
        "the share of the parameters that theirs leaves. "
        "The networks are those of [the zoo](zoo.md) that both tools pass, or each n-th of them, and those of the "
        "first table. *Two empty forwards*: two forwards without data under a dispatch mode that does nothing, one "
        "for the trace and one for the proof. Goal: 3 times their speed, slower on none.",
        "",
        "## Parts of twelve networks",
        "",
        *_parts_table(now, before),
        "",
        "## All networks",
        "",
        *_all_table(now, before),
        "",
        "## What keeps it from three times",
        "",
        *_lines(content.get("lines", ())),
        TRIED.rstrip(),
    ]
    return "\n".join(lines) + "\n"


def _by_network(results: Mapping[str, Any]) -> dict[str, Row]:
    return {row["network"]: row for row in results.get("runs", ())}


def _summary(title: str, rows: Mapping[str, Row]) -> list[str]:
    times = ratios(rows)
    if not times:
        return []
    slower = sorted((ratio, name) for name, ratio in times.items() if ratio < 1)
    listed = ", ".join(f"{name} {ratio:.2f}" for ratio, name in slower)
    mean = geometric_mean(times.values())
    return [
        f"- {title}: **{mean:.2f} times the speed of torch-pruning** in the geometric mean over {len(times)} "
        f"networks; slower on {len(slower)}{': ' + listed if slower else ''}."
    ]


def _load(now: Mapping[str, Row], before: Mapping[str, Row]) -> list[str]:
    """Return a line on other work of the machine, which shows in torch-pruning's own time and in its load."""
    both = [name for name in ratios(now) if name in ratios(before)]
    if not both:
        return []
    theirs = [(now[name]["peer"]["total"], before[name]["peer"]["total"]) for name in both]
    drift = geometric_mean(new / old for new, old in theirs)
    faster = {name: min(pair) / now[name]["ours"]["total"] for name, pair in zip(both, theirs, strict=True)}
    slower = sum(ratio < 1 for ratio in faster.values())
    loads = [row["load"] for row in now.values() if "load" in row]
    tasks = f" ({median(loads):.1f} tasks per processor)" if loads else ""
    return [
        f"- The machine was shared with other work{tasks}: torch-pruning, the same version, took {drift:.2f} times "
        "its time of the measurement before. Against the faster of its two times for each network ours is "
        f"**{geometric_mean(faster.values()):.2f} times as fast**, and slower on {slower}. Both tools take turns, "
        "but times of a few milliseconds on such a machine are no better than this."
    ]


def _commits(rows: Mapping[str, Row]) -> list[str]:
    """Return a line on the versions that were measured, where there are several."""
    counts = Counter(row["commit"] for row in rows.values() if "commit" in row)
    if len(counts) < 2:
        return []
    each = ", ".join(f"{number} at {commit}" for commit, number in counts.most_common())
    return [f"- Not all networks were measured with the same version of ours: {each}."]


def _floor(rows: Mapping[str, Row]) -> list[str]:
    """Return a line on how near ours is to two forwards that are only passed through a dispatch mode."""
    times = [row["ours"]["total"] / row["floor"] for row in rows.values() if row.get("floor", 0.0) >= CLOCK]
    if not times:
        return []
    return [
        f"- All of ours takes {geometric_mean(times):.2f} times as long as two empty forwards, in the geometric mean "
        f"over {len(times)} networks, and less than these on {sum(time < 1 for time in times)}."
    ]


def _cuts(seconds: Sequence[float]) -> list[str]:
    """Return a line on the cuts of one training."""
    if not seconds:
        return []
    third = len(seconds) // 3
    first, last = median(seconds[:third]), median(seconds[-third:])
    return [
        f"- A cut in training (`smp.Unet(resnet34)`, 128 x 128) takes **{median(seconds):.3f} s** of processor time "
        f"beyond its criterion: the median of {len(seconds)} cuts in one run; of the first third {first:.3f} s, of "
        f"the last {last:.3f} s (`python -m benchmarks.speed.cuts`; goal: under 0.1 s)."
    ]


def _lines(rows: Sequence[Row]) -> list[str]:
    """Return what lines take, and what the proof of code of one's own adds."""
    if not rows:
        return []
    return [
        "Lines of this package that take most of a cut, with all that they call outside of it, and how many times as "
        "long a cut takes if the code is one's own and is run again (`python -m benchmarks.speed.lines`):",
        "",
        "| network | largest lines | as code of one's own |",
        "|:--|:--|--:|",
        *(f"| {row['network']} | {_shares(row['lines'][:4])} | {row['own_code']:.2f} |" for row in rows),
        "",
    ]


def _shares(lines: Sequence[tuple[str, float]]) -> str:
    return ", ".join(f"`{line}` {share:.0%}" for line, share in lines)


def _parts_table(now: Mapping[str, Row], before: Mapping[str, Row]) -> list[str]:
    """Return a table with the milliseconds of each part, before and now."""
    rows = [f"| {name} | {_cells(now.get(name), before.get(name))} |" for name in NAMED]
    head = " | ".join((*PARTS, "all", "torch-pruning", "times faster", "two empty forwards"))
    return [f"| network, milliseconds (before → now) | {head} |", "|:--|" + "--:|" * (len(PARTS) + 4), *rows]


def _cells(now: Row | None, before: Row | None) -> str:
    rows = [row for row in (before, now) if row is not None and "ours" in row]
    parts = [" → ".join(f"{1000 * row['ours'][part]:.0f}" for row in rows) for part in (*PARTS, "total")]
    theirs = " → ".join(f"{1000 * row['peer']['total']:.0f}" if "peer" in row else "fails" for row in rows)
    faster = " → ".join(f"{ratio:.2f}" for row in rows for ratio in ratios({"": row}).values())
    floors = [f"{1000 * row['floor']:.0f}" for row in rows if row.get("floor", 0.0) >= CLOCK]
    return " | ".join((*parts, theirs, faster, *(floors[-1:] or [""])))


def _all_table(now: Mapping[str, Row], before: Mapping[str, Row]) -> list[str]:
    """Return a table of the times faster, lowest first."""
    newest, oldest = ratios(now), ratios(before)
    names = sorted({**oldest, **newest}, key=lambda name: newest.get(name, oldest.get(name, 0.0)))
    cells = [[f"{times[name]:.2f}" if name in times else "" for times in (oldest, newest)] for name in names]
    rows = [f"| {name} | {' | '.join(each)} |" for name, each in zip(names, cells, strict=True)]
    return ["| network | times faster, before | now |", "|:--|--:|--:|", *rows]
