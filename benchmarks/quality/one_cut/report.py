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
PLANNED = 288  # cuts of the whole study
#: state of a network after the cut -> its name on the page
STATES = {
    "raw": "as cut",
    "recalibrated": "norms recalibrated",
    "repaired": "repaired",
    "refined": "refined",
}
Table = Iterator[str]


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


def with_state(rows: Sequence[Row], state: str) -> list[Row]:
    """Return the rows that have a score in this state; runs of before the refinement have none of it."""
    return [row for row in rows if state in row]


def score_tables(rows: Sequence[Row]) -> Table:
    """Yield one table per share: networks and criteria, scores, and the shares of the dense score that are kept."""
    for share in shares(rows):
        yield f"## {share:.0%} of the MACs"
        yield ""
        yield f"| network (dense) | criterion | {' | '.join(STATES.values())} | repaired keeps | refined keeps |"
        yield "|:--|:--|--:|--:|--:|--:|--:|--:|"
        for network in ordered(rows, "network"):
            yield from network_lines([r for r in rows if (r["network"], r["share"]) == (network, share)])
        yield ""


def network_lines(rows: Sequence[Row]) -> Table:
    """Yield the lines of one network at one share."""
    for number, criterion in enumerate(ordered(rows, "criterion")):
        chosen = [row for row in rows if row["criterion"] == criterion]
        head = f"{rows[0]['network']} ({median(rows, itemgetter('dense')):.3f})" if number == 0 else ""
        scores = " | ".join(score_cell(chosen, state) for state in STATES)
        shares_kept = " | ".join(kept_cell(chosen, state) for state in ("repaired", "refined"))
        yield f"| {head} | {criterion} | {scores} | {shares_kept} |"


def score_cell(rows: Sequence[Row], state: str) -> str:
    """Return the median score of a state."""
    scored = with_state(rows, state)
    return f"{median(scored, itemgetter(state)):.3f}" if scored else "-"


def kept_cell(rows: Sequence[Row], state: str) -> str:
    """Return the median share that is kept, in bold if it reaches the aim."""
    scored = with_state(rows, state)
    if not scored:
        return "-"
    share = median(scored, lambda row: kept(row, state))
    return f"**{share:.1%}**" if share >= AIMS.get(rows[0]["share"], 0) else f"{share:.1%}"


def aim_table(rows: Sequence[Row]) -> Table:
    """Yield how many cuts reach the aim, what they keep, and how many score lower than with recalibrated norms."""
    yield f"| share of the MACs | cuts | {' | '.join(STATES.values())} |"
    yield "|:--|:--|--:|--:|--:|--:|"
    for share in shares(rows):
        scored = [with_state([row for row in rows if row["share"] == share], state) for state in STATES]
        values = [[kept(row, state) for row in each] for each, state in zip(scored, STATES, strict=True)]
        aim = AIMS.get(share, 0)
        reach = (f"{sum(value >= aim for value in each)} of {len(each)}" if each else "-" for each in values)
        yield f"| {share:.0%} | keep at least {aim:.0%} of the dense score | {' | '.join(reach)} |"
        for name, summary in (("median kept", statistics.median), ("lowest kept", min)):
            yield f"|  | {name} | {' | '.join(f'{summary(each):.1%}' if each else '-' for each in values)} |"
        worse = (
            str(sum(row[state] < row["recalibrated"] for row in each)) if each else "-"
            for each, state in zip(scored, STATES, strict=True)
        )
        yield f"|  | lower than with recalibrated norms | {' | '.join(worse)} |"


def refinement_line(rows: Sequence[Row]) -> Table:
    """Yield what the refinement adds to the repair of the same cut."""
    pairs = [kept(row, "refined") - kept(row) for row in with_state(rows, "refined")]
    if pairs:
        up = sum(pair > 0 for pair in pairs)
        median_gain, lowest, highest = (
            100 * value for value in (statistics.median(pairs), min(pairs), max(pairs))
        )
        gains = f"{median_gain:+.1f} points (median; {lowest:+.1f} to {highest:+.1f})"
        yield ""
        yield f"The refinement adds {gains} to what the repair keeps; {up} of {len(pairs)} cuts keep more with it."


def price_table(rows: Sequence[Row]) -> Table:
    """Yield what the repair takes."""
    yield (
        "| network | images | seconds of the processor | forwards of all images | peak memory in MB "
        "| refined: seconds | refined: MB |"
    )
    yield "|:--|--:|--:|--:|--:|--:|--:|"
    for network in ordered(rows, "network"):
        chosen = [row for row in rows if row["network"] == network]
        columns = ("seconds", "forwards", "megabytes", "refined_seconds", "refined_megabytes")
        cells = (span(chosen, key) for key in columns)
        yield f"| {network} | {chosen[0]['images']} | {' | '.join(cells)} |"


def span(rows: Sequence[Row], key: str) -> str:
    """Return the lowest and the highest value of a column."""
    values = sorted(row[key] for row in rows if key in row)
    if not values:
        return "-"
    digits = 1 if isinstance(values[-1], float) else 0
    first, last = (f"{value:.{digits}f}" for value in (values[0], values[-1]))
    return first if first == last else f"{first} to {last}"


def split(runs: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """Return the rows of the study, and those of the trials."""
    return [row for row in runs if "trial" not in row], [row for row in runs if "trial" in row]


def counts(rows: Sequence[Row]) -> Iterator[str]:
    """Yield how many cuts there are of each network and share, and of how many seeds."""
    for network in ordered(rows, "network"):
        chosen = [row for row in rows if row["network"] == network]
        cuts = (f"{sum(r['share'] == share for r in chosen)} to {share:.0%}" for share in shares(chosen))
        yield f"{network} {', '.join(cuts)} ({len({row['seed'] for row in chosen})})"


def trial_table(rows: Sequence[Row]) -> Table:
    """Yield what was tried to keep more: the shares of the dense score on validation images."""
    cuts = list(dict.fromkeys((row["network"], row["criterion"]) for row in rows))
    found = {(row["trial"], row["network"], row["criterion"]): row for row in rows}
    yield from ("", "## What was tried", "")
    yield (
        "Shares of the dense score that are kept at 26% of the MACs, on validation images, and seconds of the "
        "processor; `python -m benchmarks.quality.one_cut.trials`."
    )
    yield ""
    yield f"| repair | {' | '.join(f'{network}, {criterion}' for network, criterion in cuts)} | seconds |"
    yield f"|:--|{'--:|' * (len(cuts) + 1)}"
    for trial in ordered(rows, "trial"):
        results = [found.get((trial, *cut)) for cut in cuts]
        cells = ("-" if row is None else f"{row['kept']:.1%}" for row in results)
        yield f"| {trial} | {' | '.join(cells)} | {span([row for row in results if row], 'seconds')} |"


def page(content: dict[str, Any]) -> str:
    """Return the page (Markdown)."""
    rows, tried = split(content["runs"])
    refined = len(with_state(rows, "refined"))
    lines = [
        "# Right after one cut",
        "",
        "What is left of a trained network after one cut, without training: as it is cut, with the statistics of its "
        "batch norms estimated anew, [repaired](../guides/one_shot.md) layer by layer, which needs no labels "
        "(`compensate=CompensationSettings()`), and *refined* after the repair, as `one_shot` does by default: steps "
        "on the outputs, also without labels, on the same images. Scores are accuracies, and mean IoUs of U-Nets, on "
        "test images.",
        "",
        f"{content['date']} · torch {content['versions']['torch']} · {content['machine']} · "
        "`python -m benchmarks.quality.one_cut`. Every layer keeps an eighth of its channels, and at least four. "
        f"Shares that reach the aim are in bold. {len(rows)} of {PLANNED} cuts so far, {refined} of "
        "them refined too. Medians over seeds; cuts (seeds) of each network: "
        + "; ".join(counts(rows))
        + ".",
        "",
        *aim_table(rows),
        *refinement_line(rows),
        "",
        *score_tables(rows),
        "## Price",
        "",
        "Lowest and highest of all cuts; the memory includes the activations of the forwards.",
        "",
        *price_table(rows),
        *(trial_table(tried) if tried else ()),
    ]
    return "\n".join(lines) + "\n"


def write(rows: Sequence[Row], folder: Path = RESULTS) -> None:
    """Write JSON and page; without rows, from the stored JSON."""
    files = ReportFiles("one_cut", folder)
    files.write_page(page(files.save_runs(rows)))
