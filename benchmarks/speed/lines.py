"""Where the processor time of a cut goes, line by line, and what the proof of code of one's own adds.

    python -m benchmarks.speed.lines             # adds it to docs/results/data/speed.json

Networks of known packages are proven without a forward where that is possible; all others are run. The same network
is cut in both ways in turn. ``python -m benchmarks.speed --report`` writes the page.
"""

from __future__ import annotations

import copy
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks.common.pages import ReportFiles, docs_parser
from benchmarks.speed.engine import cut_timed, networks
from benchmarks.zoo.ours import Seconds, awake_, warm_up
from lightning_prune.surgery import proof
from lightning_prune.testing import randomise_

NETWORKS = ("torchvision/mobilenet_v2", "smp/Unet-resnet34", "torchvision/vit_b_16")
REPEATS, SAMPLED, SHARE, INTERVAL = 9, 60, 0.5, 0.001


def measured(name: str, repeats: int = REPEATS, sampled: int = SAMPLED) -> dict[str, Any]:
    """Return the seconds of a cut, the largest shares of lines, and how much longer the cut of own code takes."""
    network = networks()[name]
    torch.manual_seed(0)
    model, example = awake_(randomise_(network.build())).eval(), torch.randn(1, 3, network.size, network.size)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(repeats):
        for known in seconds:
            seconds[known].append(_seconds(model, example, known))
    lines = _lines(lambda: _seconds(model, example, True), sampled)
    total = max(lines.total(), 1)
    return {
        "network": name,
        "seconds": median(seconds[True]),
        "own_code": median(own / known for known, own in zip(*seconds.values(), strict=True)),
        "lines": [[line, count / total] for line, count in lines.most_common(5)],
    }


def _seconds(model: nn.Module, example: Tensor, known: bool) -> float:
    """Return the processor seconds of a cut of a copy, as code of known packages or as that of a stranger."""
    network = copy.deepcopy(model)
    with mock.patch.object(proof, "is_known_code", return_value=known):
        start = time.process_time()
        cut_timed(network, example, SHARE, Seconds())
        return time.process_time() - start


def _lines(run: Callable[[], Any], times: int) -> Counter[str]:
    """Return how often each line of this package was being run, or waited for, when the clock struck."""
    found: Counter[str] = Counter()

    def note(_: int, frame: Any) -> None:
        while frame is not None and "/lightning_prune/" not in frame.f_code.co_filename:
            frame = frame.f_back
        if frame is not None:
            file = frame.f_code.co_filename.rpartition("/lightning_prune/")[2]
            found[f"{file}:{frame.f_lineno}"] += 1

    before = signal.signal(signal.SIGPROF, note)
    signal.setitimer(signal.ITIMER_PROF, INTERVAL, INTERVAL)
    try:
        for _ in range(times):
            run()
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and store."""
    args = docs_parser("speed.lines", __doc__).parse_args(arguments)
    torch.set_num_threads(1)
    warm_up()
    rows = [measured(name) for name in NETWORKS]
    for row in rows:
        print(row)
    files = ReportFiles("speed", args.docs)
    files.save({**files.load(), "lines": rows})


if __name__ == "__main__":
    main()
