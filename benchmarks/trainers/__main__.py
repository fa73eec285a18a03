"""Prune YOLO to half of its MACs in Ultralytics' own training, and export it.

``python -m benchmarks.trainers`` needs ``ultralytics`` (AGPL), best in an environment of its own.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.pages import ReportFiles, page_parser
from benchmarks.trainers.yolo import NETWORKS, SIZE, prune_in_training

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run all networks, and write the page."""
    parser = page_parser("trainers", __doc__ or "")
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--epochs", type=int, default=6)
    args = parser.parse_args(arguments)
    files = ReportFiles("trainers", args.docs)
    if not args.report:
        warnings.filterwarnings("ignore")
        torch.set_num_threads(1)
        with tempfile.TemporaryDirectory() as folder:
            runs = [prune_in_training(name, Path(folder), args.epochs) for name in args.networks]
        content = files.save_runs(runs)
        files.save({**content, "versions": {**content["versions"], "ultralytics": version("ultralytics")}})
    files.write_page(page(files.load()))


def page(content: dict[str, Any]) -> str:
    """Return the page (Markdown) of the stored numbers."""
    versions = content["versions"]
    lines = [
        "# Other trainers",
        "",
        f"{content['date']} · torch {versions['torch']} · ultralytics {versions['ultralytics']} · "
        f"{content['machine']}. Made by `python -m benchmarks.trainers`.",
        "",
        "YOLO, pruned to half of its MACs in Ultralytics' own training, by the callbacks of "
        "[the guide](../guides/trainers.md#ultralytics); then `last.pt` is loaded, exported to ONNX, and the export "
        "is loaded. The networks begin with random weights. Their data are 16 drawn images of discs and bars, "
        f"{SIZE} x {SIZE}, in the format of coco8, which could not be downloaded. So the numbers say that pruning, "
        "moving average, optimizer and export fit together, and nothing about accuracy.",
        "",
        "| network | MACs left | parameters left | cuts after epochs | seconds per cut | training, s "
        "| loss of the first and last epoch | moving average: distance | ONNX: difference |",
        "|:--|--:|--:|:--|--:|--:|--:|--:|--:|",
        *(_line(run) for run in content["runs"]),
        "",
        "*Distance*: of the moving average from the network, as a share of its norm, at the end. *Difference*: the "
        "largest between the outputs of network and export, as a share of the largest output.",
    ]
    return "\n".join(lines) + "\n"


def _line(run: dict[str, Any]) -> str:
    seconds = sum(run["cut_seconds"]) / max(len(run["cut_seconds"]), 1)
    return (
        f"| {run['network']} | {run['macs_share']:.1%} | {run['params_share']:.1%} "
        f"| {', '.join(map(str, run['cuts']))} | {seconds:.1f} | {run['seconds']:.0f} "
        f"| {run['losses'][0]:.2f} → {run['losses'][-1]:.2f} | {run['average_follows']:.2%} "
        f"| {run['onnx_difference']:.1e} |"
    )


if __name__ == "__main__":
    main()
