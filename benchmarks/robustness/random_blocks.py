"""Random networks from which residual blocks vanish, each checked against zero times their branches, then cut.

    python -m benchmarks.robustness.random_blocks --cases 400

Writes ``docs/results/data/random_blocks.json``: numbers of networks, blocks, refusals and wrong results, with the
shortest network for each as Python code.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import hypothesis
import torch
from hypothesis import HealthCheck, Phase, given
from hypothesis import strategies as st

from benchmarks.common.pages import ReportFiles
from benchmarks.robustness.random_nets import general, most_frequent
from lightning_prune.utils.atomic import write_text
from tests.support.random_blocks import BlockOutcome, examine_blocks
from tests.support.random_nets import Net, nets

Cases = defaultdict[str, list[str]]


def runner(cases: int, seed: int, add: Callable[[str, BlockOutcome | Exception], None]) -> Callable[[], None]:
    """Return a function in which hypothesis generates networks, and each outcome is added."""

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=cases, deadline=None, database=None, phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(
        st.one_of(nets(only="Skip"), nets()), st.integers(0, 99), st.sampled_from([0.1, 0.3, 0.5, 0.8, 1.0])
    )
    def run(net: Net, seed: int, share: float) -> None:
        case = f"examine_blocks({net!r}, {seed}, {share})"
        try:
            add(case, examine_blocks(net, seed, share))
        except Exception as error:
            add(case, error)

    return run


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the networks, write the numbers, and return 1 if a result was wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.robustness.random_blocks", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--cases", type=int, default=400, help="number of networks")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--out", type=Path, default=ReportFiles("random_blocks").data, help="JSON file to write"
    )
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    counts, refusals, wrong = Counter[str](), Cases(list), Cases(list)

    def add(case: str, outcome: BlockOutcome | Exception) -> None:
        counts["networks"] += 1
        if isinstance(outcome, Exception):
            wrong[general(f"{type(outcome).__name__}: {outcome}")].append(case)
            return
        counts["networks with blocks"] += outcome.blocks > 0
        counts["blocks"] += outcome.blocks
        counts["networks that lost blocks"] += outcome.vanished > 0
        counts["blocks that vanished"] += outcome.vanished
        counts["cuts of channels after that"] += outcome.channels.cuts
        if outcome.refusal:
            refusals[general(outcome.refusal)].append(case)

    start = time.process_time()
    runner(args.cases, args.seed, add)()
    report = {
        "date": time.strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "seed": args.seed,
        "seconds": round(time.process_time() - start),
        **counts,
        "refusals": most_frequent(refusals),
        "wrong": most_frequent(wrong),
    }
    write_text(args.out, json.dumps(report, indent=1) + "\n")
    print(
        json.dumps(
            {key: value if not isinstance(value, list) else len(value) for key, value in report.items()}
        )
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
