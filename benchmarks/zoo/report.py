"""The zoo's tables: JSON for programs, Markdown for people, the summary first."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from benchmarks.common.machine import machine, versions
from benchmarks.zoo.ours import verdict
from benchmarks.zoo.worker import TOOLS

__all__ = ["Summary", "machine", "versions", "write_report"]

Row = dict[str, Any]
OURS, PEER = TOOLS
HALF = 0.5


def write_report(rows: Sequence[Row], names: Sequence[str], docs: Path) -> None:
    """Write ``zoo.json`` and ``zoo.md`` about the networks of the catalogue, ``names``."""
    known = [row for row in rows if row["network"] in set(names)]
    summary = Summary(len(names), _of(known, OURS), _of(known, PEER))
    head = {
        "date": max((row["at"] for row in known), default=""),
        "versions": versions(),
        "machine": machine(),
    }
    docs.mkdir(parents=True, exist_ok=True)
    everything = {**head, "summary": summary.facts(), "rows": sorted(known, key=_order)}
    (docs / "zoo.json").write_text(json.dumps(everything, indent=1) + "\n")
    (docs / "zoo.md").write_text("\n".join(_page(summary, head)) + "\n")


def _of(rows: Iterable[Row], tool: str) -> dict[str, Row]:
    return {row["network"]: row for row in sorted(rows, key=_order) if row["tool"] == tool}


def _order(row: Row) -> tuple[str, str]:
    return row["network"].lower(), row["tool"]


@dataclass
class Summary:
    """The numbers that count. ``wanted`` networks are on the list; those without a row were not reached."""

    wanted: int
    ours: dict[str, Row]
    peer: dict[str, Row]

    def usable(self) -> dict[str, Row]:
        """Networks that can be built and run at all."""
        return {name: row for name, row in self.ours.items() if row["status"] != "unusable"}

    def both(self) -> dict[str, float]:
        """Network -> how many times faster we are, in processor time, where both pass, one after the other."""
        passed = {name: row for name, row in self.peer.items() if row["status"] == "passed"}
        return {
            name: seconds(passed[name]) / max(seconds(row), 1e-9)
            for name, row in self.ours.items()
            if row["status"] == "proven" and name in passed and row.get("visit") == passed[name].get("visit")
        }

    def timeouts(self) -> dict[str, float]:
        """Network -> how many times faster we are at least, where the peer ran into its limit."""
        limits = {
            name: float(row["reason"].split()[2])
            for name, row in self.peer.items()
            if row["status"] == "timeout"
        }
        ours = {name: self.ours[name] for name in limits if name in self.ours}
        return {
            n: limits[n] / max(seconds(row), 1e-9) for n, row in ours.items() if row["status"] == "proven"
        }

    def facts(self) -> dict[str, Any]:
        """Everything of the summary, as plain values."""
        ours = self.usable()
        ratios = self.both()
        verdicts = Counter(verdict(row) if "dead" in row else row.get("verdict") for row in ours.values())
        return {
            "networks": self.wanted,
            "measured": len(ours),
            "proven": sum(row["status"] == "proven" for row in ours.values()),
            "right": verdicts["right"],
            "proof_only": verdicts["proof only"],
            "wrong": verdicts["wrong"],
            "half": sum(row.get("lowest", 1.0) <= HALF for row in ours.values() if row["status"] == "proven"),
            "retried": sum(bool(row.get("retried")) for row in ours.values() if row["status"] == "proven"),
            "peer_measured": len(self.peer),
            "peer": dict(Counter(row["status"] for row in self.peer.values())),
            "peer_with_oracle": sum("dead" in row for row in self.peer.values() if row["status"] == "passed"),
            "commits": sorted({row["commit"] for row in ours.values() if "commit" in row}),
            "both": len(ratios),
            "times_faster": round(geometric_mean(ratios.values()), 2) if ratios else None,
            "timeouts": len(self.timeouts()),
            "times_faster_with_timeouts": round(
                geometric_mean([*ratios.values(), *self.timeouts().values()]), 2
            )
            if ratios
            else None,
            "slower": sum(ratio < 1 for ratio in ratios.values()),
        }


def seconds(row: Row) -> float:
    """Processor time of the whole tool."""
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
    done = max(facts["measured"], 1)
    packages = ", ".join(f"{name} {number}" for name, number in head["versions"].items())
    missing = " **This is a part of the list, not a result for all of it.**" * (
        facts["measured"] < facts["networks"]
    )
    peer = ", ".join(
        f"{count} {status}" for status, count in sorted(facts["peer"].items(), key=lambda i: -i[1])
    )
    return [
        f"{head['date']} · {packages} · {head['machine']}. Made by `python -m benchmarks.zoo`.",
        "",
        f"- **{facts['proven']} of {done} networks proven with a cut ({facts['proven'] / done:.1%})**; "
        f"{facts['networks'] - facts['measured']} of the list's {facts['networks']} were not measured.{missing}",
        f"- **{facts['half']} of {done} ({facts['half'] / done:.1%}) can reach half of their MACs.**",
        f"- **{facts['wrong']} wrong networks**: {facts['right']} right by an oracle, {facts['proof_only']} by "
        "the proof alone (all their prunable units meet statistics across channels, where no oracle holds, or the "
        "random weights hide the cut: *effect* below 1e-2).",
        f"- torch-pruning, default use, on {facts['peer_measured']} of them: {peer or 'not run'}. "
        f"An oracle could check {facts['peer_with_oracle']} of those passed.",
        f"- **{facts['times_faster']} times its speed in the geometric mean** over the {facts['both']} networks that "
        f"both pass, measured in turn; slower on {facts['slower']} (trace, plan, surgery and proof against build and "
        "step, processor time). "
        f"With the {facts['timeouts']} that it did not finish within its limit, as if it had passed there: "
        f"{facts['times_faster_with_timeouts']} times.",
        f"- Measured at the commits {', '.join(facts['commits'])}.",
        "",
        *METHOD,
    ]


METHOD = [
    "Every network is built with random weights and random norms and biases, and handled in a process of its "
    "own by each tool in turn; both have first handled a toy, so that nobody pays for first calls. We trace, "
    "plan half of the MACs by the L2 norm (timed), cut a random half of the units that meet no statistics "
    "across channels, and prove it; what surgery refuses is pinned and chosen again, up to five times "
    "(*retries*). *dead* and *zeroed* are the relative errors of the two oracles in single precision (`64` "
    "where they were repeated in double); a network is right if the smaller of them is below 1e-4. *effect* "
    "is what the cut changes at all: where it is tiny, an oracle says little. *pinned*: share of the filters' "
    "units that must stay. *lowest*: the smallest share of MACs when every prunable unit but one per "
    "dimension goes (computed, not cut). *MB*: peak memory beyond the model, over trace, plan, surgery and "
    "proof.",
    "",
    "torch-pruning: `BasePruner` with `MagnitudeImportance`, ratio 0.5, local, the layers that make the "
    "classes ignored; *passed* means that the smaller network runs forward and backward with the same output "
    "shape and, where an oracle holds, computes the right thing. We have its log of pruned groups, and set "
    "the same filters of the dense network to zero. Seconds are processor time, limits too (180 s for us; "
    "torch-pruning's is in its table where it was met). A process may hold 10 GB of resident memory "
    "(watched).",
]


def _refusals(summary: Summary) -> list[str]:
    failed = {name: row for name, row in summary.ours.items() if row["status"] != "proven"}
    kinds: dict[str, list[str]] = {}
    for name, row in failed.items():
        kinds.setdefault(f"{row['status']}: {_kind(row.get('reason', ''))}", []).append(name)
    lines = [f"| {len(names)} | {kind} | {', '.join(names)} |" for kind, names in _most_first(kinds)]
    return ["## Refused, by reason", "", "| | reason | networks |", "|---:|---|---|", *lines]


def _most_first(kinds: dict[str, list[str]]) -> list[tuple[str, list[str]]]:
    return sorted(kinds.items(), key=lambda item: -len(item[1]))


def _kind(reason: str) -> str:
    """A reason without what differs from network to network."""
    return _cell(re.sub(r"\d+", "N", reason.split(" at ")[0]), 120)


def _cell(text: str, most: int = 160) -> str:
    return " ".join(text.replace("|", "/").split())[:most]


COLUMNS = (
    "network | verdict | dead | zeroed | effect | pinned | lowest | retries "
    "| trace | plan | surgery | proof | MB"
)


def _our_table(summary: Summary) -> list[str]:
    rule = "|".join(["---", "---", *["---:"] * (COLUMNS.count("|") - 1)])
    return ["## Ours", "", f"| {COLUMNS} |", f"|{rule}|", *(_our_line(row) for row in summary.ours.values())]


def _our_line(row: Row) -> str:
    known = verdict(row) if "dead" in row else row.get("verdict")
    cells = [
        row["network"],
        known or f"{row['status']}: {_cell(row.get('reason', ''))}",
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
    head = "network | status | oracle | dead | zeroed | build | step | ours, whole | times faster | MB"
    rule = "|".join(["---"] * 3 + ["---:"] * 7)
    lines = [_peer_line(row, summary.ours.get(name), ratios.get(name)) for name, row in summary.peer.items()]
    return ["## torch-pruning", "", f"| {head} |", f"|{rule}|", *lines]


def _peer_line(row: Row, ours: Row | None, ratio: float | None) -> str:
    cpu = row.get("cpu", {})
    cells = [
        row["network"],
        row["status"] + (f": {_cell(row['reason'], 120)}" if "reason" in row else ""),
        row.get("oracle", ""),
        *(f"{row[key]:.0e}" if key in row else "" for key in ("dead", "zeroed")),
        *(_number(cpu.get(step)) for step in ("build", "step")),
        _number(seconds(ours)) if ours and ours.get("cpu") else "",
        _number(ratio),
        f"{row['peak_mb']:.0f}" if "peak_mb" in row else "",
    ]
    return f"| {' | '.join(cells)} |"
