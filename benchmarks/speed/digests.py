"""Digests of graphs, plans and records of the zoo's networks, to show that a faster engine decides the same.

    python -m benchmarks.speed.digests --every 10 old.jsonl          # with the old engine
    python -m benchmarks.speed.digests --every 10 new.jsonl          # with the new engine
    python -m benchmarks.speed.digests --compare old.jsonl new.jsonl

Each network is traced, planned to half of its MACs by the L2 norm, and cut by that plan; then again by random scores.
A network that is refused has the text of the refusal as its digest. A file that exists is continued.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.speed.engine import networks
from benchmarks.zoo.networks import Network
from benchmarks.zoo.ours import HALF, NO_LIMITS, awake_
from lightning_prune import ChannelGraph, prune_, trace
from lightning_prune.criteria import L2
from lightning_prune.selection.select import select
from lightning_prune.serialization.record import PruningRecord
from lightning_prune.testing import randomise_

QUARTER = {"params": 0.6}


def digests(network: Network) -> dict[str, str]:
    """Return the digests of graph, plan and record of two cuts, as far as they succeed."""
    torch.manual_seed(0)
    model = awake_(randomise_(network.build())).eval()
    example = torch.randn(1, 3, network.size, network.size)
    found: dict[str, str] = {}
    try:
        for number, budget in enumerate((HALF, QUARTER)):
            graph = trace(model, example)
            found[f"graph {number}"] = _digest(_of_graph(graph))
            random = np.random.default_rng(number).random(graph.num_units)
            plan = select(graph, random if number else L2()(graph, model, {}), budget, limits=NO_LIMITS)
            found[f"plan {number}"] = _digest([sorted(plan.remove.tolist()), sorted(plan.closed.items())])
            found[f"record {number}"] = _digest(_of_record(prune_(model, graph, plan)))
    except Exception as error:
        found["error"] = f"{type(error).__name__}: {error}"[:300]
    return found


def _digest(value: Any) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:12]


def _of_graph(graph: ChannelGraph) -> list[Any]:
    bindings = [
        (name, dim, units.tolist()) for name, dims in graph.bindings.items() for dim, units in dims.items()
    ]
    terms = [
        (resource, term.layer, term.scale, [units.tolist() for units in term.factors])
        for resource, terms in graph.terms.items()
        for term in terms
    ]
    pinned = sorted(graph.pinned.items())
    return [
        graph.num_units,
        bindings,
        terms,
        pinned,
        graph.statistics_units.tolist(),
        graph.filter_dims,
        graph.notes,
    ]


def _of_record(record: PruningRecord) -> list[Any]:
    return [record.kept, record.shapes, sorted(record.attributes.items())]


def write(path: Path, every: int, only: str) -> None:
    """Append the digests of the networks that the file lacks, one line of JSON each."""
    done = read(path) if path.is_file() else {}
    names = [name for name in list(networks())[::every] if only in name]
    with path.open("a") as lines:
        for name in (name for name in names if name not in done):
            lines.write(json.dumps({"network": name, **digests(networks()[name])}) + "\n")
            lines.flush()


def read(path: Path) -> dict[str, dict[str, str]]:
    """Return network -> its digests."""
    return {row.pop("network"): row for row in map(json.loads, path.read_text().splitlines())}


def main(arguments: Sequence[str] | None = None) -> None:
    """Write a file, or compare two."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed.digests", description=__doc__.split("\n")[0]
    )
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--compare", action="store_true", help="compare two files instead of writing one")
    parser.add_argument("--every", type=int, default=1, help="take each n-th network of the zoo")
    parser.add_argument("--only", default="", help="only networks whose name contains this text")
    args = parser.parse_args(arguments)
    if not args.compare:
        torch.set_num_threads(1)
        write(args.files[0], args.every, args.only)
        return
    old, new = map(read, args.files)
    both = [name for name in old if name in new]
    differing = [name for name in both if old[name] != new[name]]
    print(f"{len(both)} networks, {len(differing)} differ: {', '.join(differing) or 'none'}")


if __name__ == "__main__":
    main()
