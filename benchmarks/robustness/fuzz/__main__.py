"""Damaged files by the thousand: refused with the documented error, or read with the same contents.

    python -m benchmarks.robustness.fuzz --mutations 3000

Each mutation changes the bytes of a file, or one value in what it holds. The file is then read with and without
``verify``. Writes ``docs/results/fuzz.md`` and its JSON; the exit status is 1 if anything else was seen.
"""

from __future__ import annotations

import resource
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.common.machine import machine, versions
from benchmarks.common.pages import ReportFiles, page_parser
from benchmarks.common.time_limit import time_limit
from benchmarks.robustness.fuzz.files import KINDS, FileKind
from benchmarks.robustness.fuzz.mutations import damage_bytes, damage_content
from lightning_prune.utils.hashing import value_digest
from lightning_prune.utils.tables import Table

__all__ = ["attack", "main", "outcome"]

LIMIT = 10  # seconds for one file
REFUSED, SAME, DIFFERENT, HANG = "refused", "same contents", "other contents", "hang"
MUTATIONS = 3000
GUIDE = "[The guide](../guides/checkpoints.md#damaged-files) says what the checksums cover."
EXPLANATION = """
Of each kind of file an example is written and damaged at random: 60% in its bytes (changed, lost, repeated, moved,
foreign or cut off), 40% in one value of what it holds, which is then written anew: numbers, names, keys, and tensors
of other values, dtypes, shapes and layouts, among them `NaN`, `10**400`, sparse, nested, quantised and meta tensors.
*Refused* is the documented error of that file, after which the network is as it was. *Same* are mutations of what is
not read, such as spaces in JSON. *Silently other*, *other errors* and *hangs* must be 0. With `verify=False`, other
contents are what was asked for.
""".strip()


def attack(kind: FileKind, mutations: int, seed: int = 0) -> dict[str, Any]:
    """Damage an example of a kind of file many times, and count what reading it leads to.

    Returns:
        ``verified`` and ``insisted`` (with ``verify=False``): outcome -> number; ``slowest``: seconds of one reading;
        ``examples``: outcome that is an error of its own -> the seed of one mutation.
    """
    counts: dict[bool, Counter[str]] = {True: Counter(), False: Counter()}
    slowest, examples = 0.0, dict[str, int]()
    with tempfile.TemporaryDirectory() as name:
        kind.write(Path(name))
        path = Path(name, kind.file)
        whole = path.read_bytes()
        expected = value_digest(kind.read(path, True))
        for number in range(mutations):
            damage(path, whole, Random(f"{seed} {number}"))
            for verify in (True, False):
                start = time.perf_counter()
                result = outcome(kind, path, verify, expected)
                slowest = max(slowest, time.perf_counter() - start)
                counts[verify][result] += 1
                if result not in (REFUSED, SAME) and (verify or result != DIFFERENT):
                    examples.setdefault(result, number)
    return {
        "kind": kind.name,
        "mutations": mutations,
        "verified": dict(counts[True]),
        "insisted": dict(counts[False]),
        "slowest": round(slowest, 3),
        "examples": examples,
    }


def damage(path: Path, whole: bytes, rng: Random) -> None:
    """Write a damaged copy of a file to its path."""
    path.write_bytes(whole)
    if rng.random() < 0.6:
        path.write_bytes(damage_bytes(whole, rng))
    else:
        damage_content(path, rng)


def outcome(kind: FileKind, path: Path, verify: bool, expected: str) -> str:
    """Read a file, and return what it led to: one of four outcomes, or the type of another exception."""
    try:
        with time_limit(LIMIT), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = value_digest(kind.read(path, verify))
    except kind.error:
        return REFUSED
    except TimeoutError:
        return HANG
    except Exception as error:  # counted, and shown on the page
        return f"{type(error).__name__}: {str(error)[:80]}"
    return SAME if result == expected else DIFFERENT


def memory_mb() -> int:
    """Return the largest memory that this process has had so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def is_clean(row: dict[str, Any]) -> bool:
    """Return whether nothing but the documented error and the same contents was seen."""
    return not row["examples"]


def page(content: dict[str, Any]) -> str:
    """Return the whole page."""
    rows = content["kinds"]
    header = ("file", "mutations", "refused", "same", "silently other", "other errors", "hangs")
    header = (*header, "verify=False: refused", "same", "stated other", "other errors", "slowest")
    table = Table(header, [_row(row) for row in rows], left=1)
    seen = [f"- {row['kind']}, mutation {n}: {what}" for row in rows for what, n in row["examples"].items()]
    made = f"{content['date']} · torch {content['versions']['torch']} · {content['machine']}. Made by"
    memory = (
        f"Largest memory of the process: {content['memory_mb']} MB; {content['memory_before_mb']} MB before"
    )
    paragraphs = [
        "# Damaged files",
        f"{made} `python -m benchmarks.robustness.fuzz --mutations {content['mutations']}`.",
        EXPLANATION,
        table.markdown(),
        f"{memory} the first mutation. {GUIDE}",
        *(["What must not be:", "\n".join(seen)] if seen else []),
    ]
    return "\n\n".join(paragraphs) + "\n"


def _row(row: dict[str, Any]) -> tuple[str, ...]:
    cells: list[Any] = []
    for counts in (row["verified"], row["insisted"]):
        known = [counts.get(name, 0) for name in (REFUSED, SAME, DIFFERENT)]
        hangs = counts.get(HANG, 0)
        others = sum(counts.values()) - sum(known) - hangs
        cells += [*known, others, hangs] if counts is row["verified"] else [*known, others + hangs]
    return (row["kind"], str(row["mutations"]), *map(str, cells), f"{row['slowest']:.2f} s")


def measure(kinds: Sequence[str], mutations: int, seed: int) -> dict[str, Any]:
    """Attack all kinds of files, and return what the JSON holds."""
    before, rows = memory_mb(), []
    for name in kinds:
        rows.append(attack(KINDS[name], mutations, seed))
        print(rows[-1], flush=True)
    content = {"date": time.strftime("%Y-%m-%d %H:%M"), "versions": versions(), "machine": machine()}
    memory = {"memory_before_mb": before, "memory_mb": memory_mb()}
    return {**content, "mutations": mutations, "seed": seed, "kinds": rows, **memory}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = page_parser("robustness.fuzz", __doc__ or "")
    parser.add_argument("--mutations", type=int, default=MUTATIONS, help="number for each kind of file")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS), help="default: all")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    files = ReportFiles("fuzz", args.docs)
    content = files.load() if args.report else measure(args.kinds, args.mutations, args.seed)
    if not args.report:
        files.save(content)
    files.write_page(page(content))
    return 0 if all(map(is_clean, content["kinds"])) else 1


if __name__ == "__main__":
    sys.exit(main())
