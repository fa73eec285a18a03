"""The page of the zoo and its JSON; the summary comes first."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import geometric_mean
from typing import Any

from benchmarks.common.machine import machine, versions
from benchmarks.common.pages import ReportFiles, cell
from benchmarks.zoo.ours import verdict
from benchmarks.zoo.worker import TOOLS

__all__ = ["Summary", "save_rows", "write_page"]

Row = dict[str, Any]
OURS, PEER = TOOLS
HALF = 0.5


def save_rows(rows: Sequence[Row], names: Sequence[str], files: ReportFiles) -> None:
    """Write the JSON: rows of the networks ``names``, and their summary."""
    listed = [row for row in rows if row["network"] in set(names)]
    summary = Summary(len(names), _of(listed, OURS), _of(listed, PEER))
    date = max((row["at"] for row in listed), default="")
    head = {"date": date, "versions": versions(), "machine": machine(), "summary": summary.facts()}
    files.save({**head, "rows": sorted(listed, key=_order)})


def write_page(files: ReportFiles) -> None:
    """Write the page from the JSON."""
    content = files.load()
    rows, networks = content["rows"], content["summary"]["networks"]
    files.write_page("\n".join(_page(Summary(networks, _of(rows, OURS), _of(rows, PEER)), content)) + "\n")


def _of(rows: Iterable[Row], tool: str) -> dict[str, Row]:
    return {row["network"]: row for row in sorted(rows, key=_order) if row["tool"] == tool}


def _order(row: Row) -> tuple[str, str]:
    return row["network"].lower(), row["tool"]


@dataclass
class Summary:
    """Numbers over all networks.

    Args:
        listed: number of networks on the list; those without a row were not run.
        ours: network -> row of this package.
        peer: network -> row of torch-pruning.
    """

    listed: int
    ours: dict[str, Row]
    peer: dict[str, Row]

    def usable(self) -> dict[str, Row]:
        """Return the rows of networks that can be built and run."""
        return {name: row for name, row in self.ours.items() if row["status"] != "unusable"}

    def both(self) -> dict[str, float]:
        """Return network -> ratio of processor times, theirs over ours, where both passed in the same visit."""
        passed = {name: row for name, row in self.peer.items() if row["status"] == "passed"}
        return {
            name: seconds(passed[name]) / max(seconds(row), 1e-9)
            for name, row in self.ours.items()
            if row["status"] == "proven" and name in passed and row.get("visit") == passed[name].get("visit")
        }

    def timeouts(self) -> dict[str, float]:
        """Return network -> least ratio of processor times where torch-pruning exceeded its limit."""
        timeouts = {name: row for name, row in self.peer.items() if row["status"] == "timeout"}
        limits = {name: float(row["reason"].split()[2]) for name, row in timeouts.items()}
        ours = {name: self.ours[name] for name in limits if name in self.ours}
        proven = {name: row for name, row in ours.items() if row["status"] == "proven"}
        return {name: limits[name] / max(seconds(row), 1e-9) for name, row in proven.items()}

    def facts(self) -> dict[str, Any]:
        """Return the summary as plain values."""
        return {"networks": self.listed, **self._our_facts(), **self._peer_facts(), **self._ratio_facts()}

    def _our_facts(self) -> dict[str, Any]:
        ours = self.usable()
        proven = [row for row in ours.values() if row["status"] == "proven"]
        verdicts = Counter(_verdict(row) for row in ours.values())
        return {
            "measured": len(ours),
            "proven": len(proven),
            "right": verdicts["right"],
            "proof_only": verdicts["proof only"],
            "wrong": verdicts["wrong"],
            "half": sum(row.get("lowest", 1.0) <= HALF for row in proven),
            "retried": sum(bool(row.get("retried")) for row in proven),
        }

    def _peer_facts(self) -> dict[str, Any]:
        passed = [row for row in self.peer.values() if row["status"] == "passed"]
        return {
            "peer_measured": len(self.peer),
            "peer": dict(Counter(row["status"] for row in self.peer.values())),
            "peer_with_oracle": sum("dead" in row for row in passed),
            "commits": sorted({row["commit"] for row in self.usable().values() if "commit" in row}),
        }

    def _ratio_facts(self) -> dict[str, Any]:
        ratios, timeouts = self.both(), self.timeouts()
        return {
            "both": len(ratios),
            "times_faster": _mean_ratio(ratios.values()) if ratios else None,
            "timeouts": len(timeouts),
            "times_faster_with_timeouts": (
                _mean_ratio([*ratios.values(), *timeouts.values()]) if ratios else None
            ),
            "slower": sum(ratio < 1 for ratio in ratios.values()),
        }


def _mean_ratio(ratios: Iterable[float]) -> float:
    return round(geometric_mean(ratios), 2)


def _verdict(row: Row) -> str | None:
    return verdict(row) if "dead" in row else row.get("verdict")


def seconds(row: Row) -> float:
    """Return the processor time of all steps of a tool."""
    return float(sum(row.get("cpu", {}).values()))


def _page(summary: Summary, head: Row) -> list[str]:
    return [
        "# The zoo",
        "",
        *_summary(summary, head),
        "",
        *_refusals(summary),
        "",
        *_our_table(summary),
        "",
        *_peer_table(summary),
    ]


def _summary(summary: Summary, head: Row) -> list[str]:
    facts = summary.facts()
    measured, missing = max(facts["measured"], 1), facts["networks"] - facts["measured"]
    packages = ", ".join(f"{name} {number}" for name, number in head["versions"].items())
    partial = " **This result is for a part of the list only.**" * (missing > 0)
    statuses = sorted(facts["peer"].items(), key=lambda item: -item[1])
    peer = ", ".join(f"{count} {status}" for status, count in statuses) or "not run"
    return [
        f"{head['date']} · {packages} · {head['machine']}. Made by `python -m benchmarks.zoo`.",
        "",
        f"- **{facts['proven']} of {measured} networks pruned with a proof ({facts['proven'] / measured:.1%})**; "
        f"{missing} of the {facts['networks']} networks on the list were not measured.{partial}",
        f"- **{facts['half']} of {measured} ({facts['half'] / measured:.1%}) can be pruned to half of their MACs.**",
        f"- **{facts['wrong']} wrong networks**: {facts['right']} right by an oracle, {facts['proof_only']} by the "
        "proof alone. There no oracle can check: all prunable units enter statistics across channels, or with random "
        "weights the cut hardly changes the output (*effect* below 1e-2).",
        f"- torch-pruning, default use, on {facts['peer_measured']} of them: {peer}. "
        f"An oracle could check {facts['peer_with_oracle']} of those passed.",
        f"- {_speed(facts)}",
        f"- Measured at the commits {', '.join(facts['commits'])}.",
        "",
        *METHOD,
    ]


def _speed(facts: dict[str, Any]) -> str:
    """Return the comparison in time, which needs networks that both tools had in the same visit."""
    if not facts["both"]:
        return "Both tools were measured on different days here; their speed is compared in [speed.md](speed.md)."
    return (
        f"**{facts['times_faster']} times the speed of torch-pruning** in the geometric mean over the "
        f"{facts['both']} networks that both pass, measured one after the other; slower on {facts['slower']} "
        "(processor time of trace, plan, surgery and proof against build and step). If the "
        f"{facts['timeouts']} networks that torch-pruning did not finish within its limit are counted with that "
        f"limit as its time: {facts['times_faster_with_timeouts']} times."
    )


METHOD = [
    "Every network is built with random weights, norms and biases. Each tool handles it in a process of its own, one "
    "tool directly after the other; before, the process prunes a tiny network, so that the times of the first calls "
    "are left out. Ours: trace; plan half of the MACs by the L2 norm (only timed); remove a random half of the units "
    "that enter no statistics across channels, and prove the result. Units for which surgery refuses the cut are "
    "pinned, and another half is drawn, up to five times (*retries*). *dead* and *zeroed* are the relative errors "
    "against two oracles in single precision (`64`: repeated in double precision): the dense network with dead "
    "filters, and with zeroed consumers. A network is right if the smaller error is below 1e-4. *effect* is the "
    "relative change of the output by the cut: where it is tiny, an oracle shows little. *pinned*: share of the "
    "filters' units that must stay. *lowest*: the smallest possible share of MACs, with one prunable unit left per "
    "dimension (computed, not cut). *trace*, *plan*, *surgery*, *proof*: processor seconds. *MB*: peak memory of all "
    "four beyond the model.",
    "",
    "torch-pruning: `BasePruner` with `MagnitudeImportance`, ratio 0.5, local; the layers that output the classes "
    "are ignored. *passed* means that the smaller network runs forward and backward with the same output shape and, "
    "where an oracle can check, computes the right result: the filters in torch-pruning's log of pruned groups are "
    "set to zero in the dense network. Limits are of processor time (180 s for ours; that of torch-pruning is in its "
    "table where it was exceeded) and of resident memory (10 GB).",
]


def _refusals(summary: Summary) -> list[str]:
    kinds: dict[str, list[str]] = {}
    for name, row in summary.ours.items():
        if row["status"] != "proven":
            kinds.setdefault(f"{row['status']}: {_kind(row.get('reason', ''))}", []).append(name)
    most_first = sorted(kinds.items(), key=lambda item: -len(item[1]))
    lines = [f"| {len(names)} | {kind} | {', '.join(names)} |" for kind, names in most_first]
    return ["## Refused, by reason", "", "| | reason | networks |", "|---:|---|---|", *lines]


def _kind(reason: str) -> str:
    """Return a reason without the parts that differ from network to network."""
    return cell(re.sub(r"\d+", "N", reason.split(" at ")[0]), 120)


COLUMNS = (
    "network | verdict | dead | zeroed | effect | pinned | lowest | retries "
    "| trace | plan | surgery | proof | MB"
)
PEER_COLUMNS = (
    "network | status | oracle | dead | zeroed | build | step | ours, all steps | times faster | MB"
)


def _our_table(summary: Summary) -> list[str]:
    rule = "|".join(["---", "---", *["---:"] * (COLUMNS.count("|") - 1)])
    return ["## Ours", "", f"| {COLUMNS} |", f"|{rule}|", *(_our_line(row) for row in summary.ours.values())]


def _our_line(row: Row) -> str:
    cells = [
        row["network"],
        _verdict(row) or f"{row['status']}: {cell(row.get('reason', ''))}",
        *(_error(row, key) for key in ("dead", "zeroed")),
        f"{row['effect']:.0e}" if "effect" in row else "",
        *(f"{row[key]:.3f}" if key in row else "" for key in ("pinned_share", "lowest")),
        str(len(row["retried"])) if "retried" in row else "",
        *(_number(row.get("cpu", {}).get(step)) for step in ("trace", "plan", "surgery", "proof")),
        f"{row['peak_mb']:.0f}" if "peak_mb" in row else "",
    ]
    return f"| {' | '.join(cells)} |"


def _error(row: Row, key: str) -> str:
    if key not in row:
        return ""
    double = f" (64: {row[key + '64']:.0e})" if key + "64" in row else ""
    return f"{row[key]:.0e}{double}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _peer_table(summary: Summary) -> list[str]:
    ratios = summary.both()
    rule = "|".join(["---"] * 3 + ["---:"] * 7)
    lines = [_peer_line(row, summary.ours.get(name), ratios.get(name)) for name, row in summary.peer.items()]
    return ["## torch-pruning", "", f"| {PEER_COLUMNS} |", f"|{rule}|", *lines]


def _peer_line(row: Row, ours: Row | None, ratio: float | None) -> str:
    cpu = row.get("cpu", {})
    cells = [
        row["network"],
        row["status"] + (f": {cell(row['reason'], 120)}" if "reason" in row else ""),
        row.get("oracle", ""),
        *(f"{row[key]:.0e}" if key in row else "" for key in ("dead", "zeroed")),
        *(_number(cpu.get(step)) for step in ("build", "step")),
        _number(seconds(ours)) if ours and ours.get("cpu") else "",
        _number(ratio),
        f"{row['peak_mb']:.0f}" if "peak_mb" in row else "",
    ]
    return f"| {' | '.join(cells)} |"
