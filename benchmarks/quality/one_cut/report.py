"""Page of ``python -m benchmarks.quality.one_cut``."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

from benchmarks.common.pages import RESULTS, ReportFiles
from benchmarks.common.studies import Row

__all__ = ["AIMS", "write"]

#: share of the MACs -> share of the dense score that a repaired network should keep
AIMS = {0.5: 0.97, 0.26: 0.93}
STATES = ("raw", "recalibrated", "repaired")


def median(rows: Sequence[Row], value: Callable[[Row], float]) -> float:
    return statistics.median(map(value, rows))


def kept(row: Row, state: str = "repaired") -> float:
    """Return the share of the dense score that is kept."""
    return float(row[state] / row["dense"])


def shares(rows: Sequence[Row]) -> list[float]:
    return sorted({row["share"] for row in rows}, reverse=True)


def ordered(rows: Sequence[Row], key: str) -> list[str]:
    """Return the values of a column, in the order of their first rows."""
    return list(dict.fromkeys(row[key] for row in rows))


def score_tables(rows: Sequence[Row]) -> Iterator[str]:
    """Yield one table per share: networks and criteria, three scores, and the share of the dense score."""
    for share in shares(rows):
        yield f"## {share:.0%} of the MACs"
        yield ""
        yield "| network (dense) | criterion | as cut | norms recalibrated | repaired | repaired keeps |"
        yield "|:--|:--|--:|--:|--:|--:|"
        for network in ordered(rows, "network"):
            yield from network_lines([r for r in rows if (r["network"], r["share"]) == (network, share)])
        yield ""


def network_lines(rows: Sequence[Row]) -> Iterator[str]:
    """Yield the lines of one network at one share."""
    for number, criterion in enumerate(ordered(rows, "criterion")):
        chosen = [row for row in rows if row["criterion"] == criterion]
        head = f"{rows[0]['network']} ({median(rows, itemgetter('dense')):.3f})" if number == 0 else ""
        scores = " | ".join(f"{median(chosen, itemgetter(state)):.3f}" for state in STATES)
        share = median(chosen, kept)
        mark = "" if share >= AIMS.get(chosen[0]["share"], 0) else " (below the aim)"
        yield f"| {head} | {criterion} | {scores} | {share:.1%}{mark} |"


def aim_lines(rows: Sequence[Row]) -> Iterator[str]:
    """Yield how many cuts reach the aim, and how many keep less than recalibrated norms."""
    for share in shares(rows):
        chosen = [row for row in rows if row["share"] == share]
        aim = AIMS.get(share, 0)
        values = [[kept(row, state) for row in chosen] for state in STATES]
        reached = [sum(value >= aim for value in column) for column in values]
        worse = sum(row["repaired"] < row["recalibrated"] for row in chosen)
        medians = ", ".join(f"{statistics.median(column):.1%}" for column in values)
        yield (
            f"- **{share:.0%} of the MACs**: {reached[2]} of {len(chosen)} repaired networks keep at least {aim:.0%} "
            f"of the dense score; {reached[0]} as cut, {reached[1]} with recalibrated norms. Medians: {medians}. "
            f"The lowest repaired one keeps {min(values[2]):.1%}. {worse} repaired networks score lower than with "
            "recalibrated norms."
        )


def price_table(rows: Sequence[Row]) -> Iterator[str]:
    """Yield what the repair takes."""
    yield "| network | images | seconds of the processor | forwards of all images | peak memory in MB |"
    yield "|:--|--:|--:|--:|--:|"
    for network in ordered(rows, "network"):
        chosen = [row for row in rows if row["network"] == network]
        seconds, forwards, megabytes = (
            sorted(row[key] for row in chosen) for key in ("seconds", "forwards", "megabytes")
        )
        yield (
            f"| {network} | {chosen[0]['images']} | {seconds[0]:.1f} to {seconds[-1]:.1f} | {forwards[0]} to "
            f"{forwards[-1]} | {megabytes[0]} to {megabytes[-1]} |"
        )


def page(content: dict[str, Any]) -> str:
    """Return the page (Markdown)."""
    rows = content["runs"]
    seeds = {
        network: len({r["seed"] for r in rows if r["network"] == network})
        for network in ordered(rows, "network")
    }
    lines = [
        "# Right after one cut",
        "",
        "What is left of a trained network after one cut, without training: as it is cut, with the statistics of its "
        "batch norms estimated anew, and [repaired](../guides/one_shot.md) with `compensate=True`, which needs no "
        "labels. Scores are accuracies, and mean IoUs of the U-Nets, on test images.",
        "",
        f"{content['date']} · torch {content['versions']['torch']} · {content['machine']} · "
        "`python -m benchmarks.quality.one_cut`. Medians over seeds: "
        + ", ".join(f"{network} {number}" for network, number in seeds.items())
        + ". Every layer keeps an eighth of its channels, and at least four.",
        "",
        *aim_lines(rows),
        "",
        *score_tables(rows),
        "## Price",
        "",
        "Lowest and highest of all cuts; the memory includes the activations of the forwards.",
        "",
        *price_table(rows),
    ]
    return "\n".join(lines) + "\n"


def write(rows: Sequence[Row], folder: Path = RESULTS) -> None:
    """Write JSON and page; without rows, from the stored JSON."""
    files = ReportFiles("one_cut", folder)
    files.write_page(page(files.save_runs(rows)))
