"""The page of the second zoo and its JSON; the summary comes first."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.common.machine import machine, versions
from benchmarks.common.pages import ReportFiles, cell

__all__ = ["facts", "save_rows", "write_page"]

Row = dict[str, Any]
HALF = 0.5
KINDS = ("half", "random")
ORACLES = ("masked", "dead", "zeroed", "distinct")
NOT_MEASURED = ("not installed", "unusable")
PACKAGES = (
    "torch", "torchvision", "transformers", "monai", "dynamic-network-architectures", "ultralytics", "vit-pytorch",
    "segmentation-models-pytorch", "torchaudio",
)  # fmt: skip
KEPT = (
    "network", "status", "reason", "parameters", "units", "prunable", "pinned_share", "pinned_reasons", "unsupported",
    "macs", "lowest", "half", "random", "free", "seconds", "where", "at",
)  # fmt: skip


def save_rows(rows: Sequence[Row], names: Sequence[str], files: ReportFiles) -> None:
    """Write the JSON: rows of the networks ``names``, with date, versions and machine."""
    listed = [{key: row[key] for key in KEPT if key in row} for row in rows if row["network"] in set(names)]
    found = versions(PACKAGES)
    head = {
        "date": max((row["at"] for row in listed), default=""),
        "versions": {name: found.get(name, "not installed") for name in PACKAGES},
        "machine": machine(),
        "listed": len(names),
    }
    files.save(
        {**head, "summary": facts(listed), "rows": sorted(listed, key=lambda row: row["network"].lower())}
    )


def facts(rows: Sequence[Row]) -> dict[str, Any]:
    """Return the summary of the rows: numbers of networks."""
    statuses = Counter(row["status"] for row in rows)
    measured = [row for row in rows if row["status"] not in NOT_MEASURED]
    cuts = [row[kind] for row in measured for kind in KINDS if row.get(kind, {}).get("status") == "cut"]
    refusals = [
        refusal for row in measured for kind in KINDS for refusal in row.get(kind, {}).get("refusals", [])
    ]
    return {
        "measured": len(measured),
        "not_installed": statuses["not installed"],
        "unusable": statuses["unusable"],
        "wrong": statuses["wrong"],
        "cut": statuses["cut"],
        "half": sum(row["status"] == "cut" and row["half"]["share"] <= HALF for row in measured),
        "by_oracle": sum(cut["verdict"] == "right" for cut in cuts),
        "by_proof_only": sum(cut["verdict"] == "proof only" for cut in cuts),
        "with_statistics": sum(cut["verdict"] == "right" and cut["statistics"] > 0 for cut in cuts),
        "refusals": len(refusals),
        "refusals_with_units": sum(refusal["units"] > 0 for refusal in refusals),
        "seconds": round(sum(row.get("seconds", 0) for row in measured)),
    }


def write_page(files: ReportFiles) -> None:
    """Write the page from the JSON."""
    content = files.load()
    lines = ["# The second zoo", "", *_summary(content), "", *METHOD, "", *_shortfalls(content["rows"])]
    files.write_page("\n".join([*lines, "", *_table(content["rows"])]) + "\n")


def _summary(content: Row) -> Iterator[str]:
    data, measured = content["summary"], max(content["summary"]["measured"], 1)
    packages = ", ".join(f"{name} {number}" for name, number in content["versions"].items())
    missing = content["listed"] - len(content["rows"])
    since = min((row["at"] for row in content["rows"] if "at" in row), default=content["date"])
    yield f"{content['date']} · {packages} · {content['machine']}. Made by `python -m benchmarks.zoo.more`."
    yield ""
    yield (
        f"- **{data['wrong']} of {measured} networks wrong** after a cut to half of the MACs or a random cut of half "
        "of the prunable units."
    )
    yield f"- **{data['cut']} of {measured} ({data['cut'] / measured:.1%}) cut in both ways** (aim: 97 %)."
    yield (
        f"- **{data['half']} of {measured} ({data['half'] / measured:.1%}) cut to half of their MACs or below** "
        "(aim: 90 %); carried out and checked, not only computed."
    )
    yield (
        f"- {data['by_oracle']} cuts confirmed by an oracle, {data['with_statistics']} of them with units that enter "
        f"statistics across channels; {data['by_proof_only']} by the proof only, since with random weights the cut "
        "changes the output by less than 1e-2."
    )
    yield (
        f"- {data['refusals']} cuts were refused on the way, {data['refusals_with_units']} of these with the units "
        "concerned, which were pinned before the next attempt."
    )
    yield (
        f"- Of {content['listed']} networks on the list, {missing} were not run, {data['not_installed']} belong to "
        f"packages that are not installed, {data['unusable']} cannot be built or run. {data['seconds']} s of "
        f"processor time in all. The rows were measured from {since} on, with the code of their time."
    )


METHOD = [
    "Every network is built with random weights, norms and biases, in a small size where its package allows, and "
    "runs in a process of its own within limits of processor time and memory. Two copies are cut: to half of the "
    "MACs, planned by the L2 norm without limits per layer, and without a random half of all prunable units. "
    "Units that surgery refuses are pinned and others chosen, as the callback does. *right*: in double precision, "
    "on other inputs than the traced ones, the outputs agree to 1e-4 with the dense network in which the removed "
    "units are zero. This oracle knows nothing of the surgery; norms, means, variances and softmax across "
    "channels leave out channels that are zero (*masked*: `lightning_prune.testing.with_masked_statistics`). "
    "Where it does not hold, since the code adds the same to removed channels too or has no zero at zero, a cut "
    "is right if another oracle agrees: *dead*, *zeroed*, or *distinct*, which leaves out channels that equal "
    "each other as well. Dropouts that run in eval mode too are switched off. *effect*: relative change of the "
    "output by the cut to half. *lowest*: the smallest possible share of MACs. *pinned*: share of the units that "
    "must stay. Where a cut is wrong, a third one leaves out the units that enter statistics.",
]


def _shortfalls(rows: Sequence[Row]) -> Iterator[str]:
    yield from ["## Wrong, refused, or above half", "", "| network | status | half | lowest | reason |"]
    yield "|---|---|---:|---:|---|"
    for row in rows:
        share = row.get("half", {}).get("share")
        if row["status"] != "cut" or share > HALF:
            lowest = f"{row['lowest']:.2f}" if "lowest" in row else ""
            yield f"| {row['network']} | {row['status']} | {share or ''} | {lowest} | {_reason(row)} |"


def _reason(row: Row) -> str:
    """Return why a network was refused, or why most of its units are pinned."""
    reasons = [row.get("reason"), *(row.get(kind, {}).get("reason") for kind in KINDS)]
    pins = [f"{reason} ({count})" for reason, count in list(row.get("pinned_reasons", {}).items())[:2]]
    reason = next((reason for reason in reasons if reason), "; ".join(pins))
    return cell(re.sub(r"/\S*/site-packages/", "", reason), 200)


COLUMNS = "network | status | half | by | error | random | by | error | effect | pinned | lowest | refusals | seconds"


def _table(rows: Sequence[Row]) -> Iterator[str]:
    yield from ["## All networks", "", f"| {COLUMNS} |"]
    yield f"|{'|'.join(['---', '---', *['---:'] * (COLUMNS.count('|') - 1)])}|"
    for row in rows:
        yield f"| {' | '.join(_cells(row))} |"


def _cells(row: Row) -> Iterator[str]:
    yield from (row["network"], row["status"])
    for kind in KINDS:
        yield from _cut_cells(row.get(kind, {}))
    half = row.get("half", {})
    yield f"{half['effect']:.0e}" if "effect" in half else ""
    yield from (f"{row[key]:.3f}" if key in row else "" for key in ("pinned_share", "lowest"))
    yield str(sum(len(row.get(kind, {}).get("refusals", [])) for kind in KINDS))
    yield str(row.get("seconds", ""))


def _cut_cells(cut: Row) -> Iterator[str]:
    """Yield the share of MACs, the oracle that came nearest, and its error."""
    errors = {name: cut[name] for name in ORACLES if name in cut}
    best = min(errors, key=lambda name: errors[name], default="")
    yield str(cut.get("share", ""))
    yield best
    yield f"{errors[best]:.0e}" if best else ""
