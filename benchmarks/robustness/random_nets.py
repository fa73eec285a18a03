"""Random networks by the thousand, each cut twice at random and checked against oracles.

    python -m benchmarks.robustness.random_nets --cases 3000
    python -m benchmarks.robustness.random_nets --cases 3000 --resume     go on after an interruption

Networks are drawn in batches of fifty; the result of each batch is a line of ``outputs/random_nets.jsonl``.

Writes ``docs/results/data/random_nets.json``: the numbers of networks and cuts, the refusals with their reasons, and
wrong results, with the shortest network for each as Python code.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import hypothesis
import torch
from hypothesis import HealthCheck, Phase, given
from hypothesis import strategies as st

from benchmarks.common.pages import ReportFiles
from tests.support.random_cuts import Outcome, examine
from tests.support.random_nets import Net, nets

BATCH = 50
ROWS = Path(__file__).parents[2] / "outputs" / "random_nets.jsonl"

hypothesis.settings.register_profile(
    "random-nets-nightly",
    deadline=None,
    database=None,
    phases=(Phase.generate,),
    suppress_health_check=list(HealthCheck),
)


@dataclass
class Tally:
    """Numbers of all networks so far.

    Attributes:
        refusals: reason -> the networks, as Python code.
        wrong: error -> the networks, as Python code.
    """

    seconds: float = 0.0
    networks: int = 0
    cuts: int = 0
    units_removed: int = 0
    units: int = 0
    prunable: int = 0
    changed_outputs: int = 0
    nothing_to_cut: int = 0
    refusals: dict[str, list[str]] = field(default_factory=dict)
    wrong: dict[str, list[str]] = field(default_factory=dict)

    def add(self, case: str, outcome: Outcome) -> None:
        """Add the outcome of one network."""
        self.cuts += outcome.cuts
        self.units_removed += outcome.removed
        self.units += outcome.units
        self.prunable += outcome.prunable
        self.changed_outputs += outcome.changes_output
        self.nothing_to_cut += not outcome.cuts and not outcome.refusals
        for reason in outcome.refusals:
            self.refusals.setdefault(general(reason), []).append(case)

    def merge(self, other: dict[str, Any]) -> None:
        """Add the tally of a batch, as plain values."""
        for name, value in other.items():
            if isinstance(value, dict):
                cases = getattr(self, name)
                for what, codes in value.items():
                    cases.setdefault(what, []).extend(codes)
            else:
                setattr(self, name, getattr(self, name) + value)

    def report(self, seed: int) -> dict[str, Any]:
        """Return what the JSON holds."""
        tried = self.cuts + sum(map(len, self.refusals.values()))
        return {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "torch": torch.__version__,
            "seed": seed,
            "seconds": round(self.seconds),
            "networks": self.networks,
            "cuts_tried": tried,
            "cuts_proven": self.cuts,
            "networks_whose_output_changed": self.changed_outputs,
            "networks_with_nothing_to_cut": self.nothing_to_cut,
            "units": self.units,
            "units_prunable": self.prunable,
            "units_removed": self.units_removed,
            "refusal_rate": round(1 - self.cuts / max(tried, 1), 5),
            "refusals": most_frequent(self.refusals),
            "wrong": most_frequent(self.wrong),
        }


def general(message: str) -> str:
    """Return a message without the numbers and module names that differ from network to network."""
    return re.sub(r"\d[\d.e+-]*", "#", re.sub(r"(blocks|head|aux|hidden)[\w.]*", "M", message))[:200]


def most_frequent(cases: dict[str, list[str]]) -> list[dict[str, Any]]:
    """Return each message with its number of networks and the shortest one; the most frequent first."""
    rows = [
        {"what": what, "times": len(codes), "example": min(codes, key=len)} for what, codes in cases.items()
    ]
    return sorted(rows, key=lambda row: -int(row["times"]))


def make_runner(tally: Tally, cases: int, seed: int) -> Callable[[], None]:
    """Return a function in which hypothesis generates ``cases`` networks and examines each."""
    profile = hypothesis.settings.get_profile("random-nets-nightly")

    @hypothesis.seed(seed)
    @hypothesis.settings(profile, max_examples=cases)
    @given(
        nets(), st.integers(0, 99), st.sampled_from([0.1, 0.3, 0.5, 0.8, 1.0]), st.sampled_from([0, 0, 0, 1])
    )
    def run(net: Net, seed: int, share: float, mixing: int) -> None:
        run_case(tally, net, seed, share, bool(mixing))

    return run


def run_case(tally: Tally, net: Net, seed: int, share: float, mixing: bool) -> None:
    """Examine one network and add the outcome to the tally; an error is recorded as a wrong result."""
    case = f"examine({net!r}, {seed}, {share}, {mixing})"
    tally.networks += 1
    try:
        tally.add(case, examine(net, seed, share, mixing))
    except Exception as error:
        tally.wrong.setdefault(general(f"{type(error).__name__}: {error}"), []).append(case)


def run_batch(cases: int, seed: int) -> dict[str, Any]:
    """Examine a batch of networks; return its tally as plain values."""
    tally, start = Tally(), time.process_time()
    make_runner(tally, cases, seed)()
    tally.seconds = time.process_time() - start
    return asdict(tally)


def finished_batches(rows: Path) -> dict[int, dict[str, Any]]:
    """Return the batches of a file of rows, by seed."""
    lines = rows.read_text().splitlines() if rows.exists() else []
    return {row["seed"]: row["tally"] for row in map(json.loads, lines)}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.robustness.random_nets", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--cases", type=int, default=3000, help="number of networks")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="keep the batches that are finished")
    parser.add_argument("--rows", type=Path, default=ROWS, help="JSONL file of the batches")
    parser.add_argument(
        "--out", type=Path, default=ReportFiles("random_nets").data, help="JSON file to write"
    )
    args = parser.parse_args(arguments)
    args.rows.parent.mkdir(parents=True, exist_ok=True)
    if not args.resume:
        args.rows.unlink(missing_ok=True)
    finished, tally = finished_batches(args.rows), Tally()
    for number in range(-(-args.cases // BATCH)):
        seed = args.seed * 10_000 + number
        if seed not in finished:
            finished[seed] = run_batch(min(BATCH, args.cases - number * BATCH), seed)
            with args.rows.open("a") as rows:
                rows.write(json.dumps({"seed": seed, "tally": finished[seed]}) + "\n")
        tally.merge(finished[seed])
        print(f"{tally.networks} networks, {tally.cuts} cuts, {len(tally.wrong)} kinds of errors", flush=True)
    report = tally.report(args.seed)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps({key: value for key, value in report.items() if not isinstance(value, list)}, indent=1))
    return 1 if report["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
