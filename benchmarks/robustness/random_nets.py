"""Thousands of random networks, each cut twice at random: ``python -m benchmarks.robustness.random_nets --cases 3000``.

Writes ``docs/random_nets.json``: what was run, what was refused and why, what was wrong and the network that
showed it, printed as the Python that makes it.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import hypothesis
import torch
from hypothesis import HealthCheck, Phase, given
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[2]

from tests.support.random_cuts import Outcome, examine
from tests.support.random_nets import Net, nets

hypothesis.settings.register_profile(
    "random-nets-nightly",
    deadline=None,
    database=None,
    phases=(Phase.generate,),
    suppress_health_check=list(HealthCheck),
)


@dataclass
class Tally:
    """What came of all networks so far."""

    networks: int = 0
    cuts: int = 0
    units_removed: int = 0
    units: int = 0
    prunable: int = 0
    seen_by_oracles: int = 0
    nothing_to_cut: int = 0
    refusals: dict[str, list[str]] = field(default_factory=dict)
    wrong: dict[str, list[str]] = field(default_factory=dict)

    def add(self, case: str, outcome: Outcome) -> None:
        """Count one network."""
        self.cuts += outcome.cuts
        self.units_removed += outcome.removed
        self.units += outcome.units
        self.prunable += outcome.prunable
        self.seen_by_oracles += outcome.bites
        self.nothing_to_cut += not outcome.cuts and not outcome.refusals
        for reason in outcome.refusals:
            self.refusals.setdefault(alike(reason), []).append(case)

    def report(self, arguments: argparse.Namespace, seconds: float) -> dict[str, Any]:
        """Everything as plain data; of networks with the same complaint, how many and the shortest."""
        tried = self.cuts + sum(map(len, self.refusals.values()))
        return {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "torch": torch.__version__,
            "seed": arguments.seed,
            "seconds": round(seconds),
            "networks": self.networks,
            "cuts_tried": tried,
            "cuts_proven": self.cuts,
            "networks_whose_output_changed": self.seen_by_oracles,
            "networks_with_nothing_to_cut": self.nothing_to_cut,
            "units": self.units,
            "units_prunable": self.prunable,
            "units_removed": self.units_removed,
            "refusal_rate": round(1 - self.cuts / max(tried, 1), 5),
            "refusals": shortest(self.refusals),
            "wrong": shortest(self.wrong),
        }


def alike(reason: str) -> str:
    """A message without what differs from network to network."""
    return re.sub(r"\d[\d.e+-]*", "#", re.sub(r"(blocks|head|aux|hidden)[\w.]*", "M", reason))[:200]


def shortest(found: dict[str, list[str]]) -> list[dict[str, Any]]:
    """Each complaint, how often, and the shortest network; the most frequent first."""
    rows = [
        {"what": what, "times": len(cases), "example": min(cases, key=len)} for what, cases in found.items()
    ]
    return sorted(rows, key=lambda row: -int(row["times"]))


def runner(tally: Tally, cases: int, seed: int) -> Callable[[], None]:
    """The whole run, as hypothesis drives it."""
    profile = hypothesis.settings.get_profile("random-nets-nightly")

    @hypothesis.seed(seed)
    @hypothesis.settings(profile, max_examples=cases)
    @given(
        nets(), st.integers(0, 99), st.sampled_from([0.1, 0.3, 0.5, 0.8, 1.0]), st.sampled_from([0, 0, 0, 1])
    )
    def run(net: Net, seed: int, share: float, mixing: int) -> None:
        one(tally, net, seed, share, bool(mixing))

    return run


def one(tally: Tally, net: Net, seed: int, share: float, mixing: bool) -> None:
    """One network; whatever it raises is written down."""
    case = f"examine(net.build(), net.example(), {seed}, {share}, net.by_weights(), {mixing}) of {net!r}"
    tally.networks += 1
    try:
        tally.add(case, examine(net.build(), net.example(), seed, share, net.by_weights(), mixing))
    except Exception as error:
        tally.wrong.setdefault(alike(f"{type(error).__name__}: {error}"), []).append(case)
    if tally.networks % 100 == 0:
        print(f"{tally.networks} networks, {tally.cuts} cuts, {len(tally.wrong)} kinds of wrong", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--cases", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "random_nets.json")
    arguments = parser.parse_args()
    tally, start = Tally(), time.perf_counter()
    runner(tally, arguments.cases, arguments.seed)()
    report = tally.report(arguments, time.perf_counter() - start)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps({key: value for key, value in report.items() if not isinstance(value, list)}, indent=1))
    return 1 if report["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
