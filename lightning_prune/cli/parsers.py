"""Parsers of the commands other than ``train``. They import nothing slow: ``--help`` and errors come at once."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

__all__ = ["EXECUTIONS", "read"]

#: as ``latency.backends.ExecutionName`` and ``LatencyTable.cuts``, which are slow to import
EXECUTIONS, CUTS = ("eager", "compiled", "onnx"), 8
DESCRIPTIONS = {
    "prune": "Prune the trained network of a run to its budget, in one cut or in rounds. Then test the network and, "
    "with --epochs, continue its training.",
    "netadapt": "Prune the trained network of a run by NetAdapt: in rounds, each of which keeps the best of several "
    "candidates. Then test the network and, with --epochs, continue its training. If the command is killed, the same "
    "command continues with the round that was interrupted.",
    "oneshot": "Prune the trained network of a run to its budget in one cut, and repair it with training images. "
    "Then test the network and, with --epochs, continue its training.",
}
EXAMPLE = "example of overrides: prune.budget.macs=0.3 prune.limits.layers=0.9 prune/criterion=taylor_gate"
METRIC = "the score to show and choose by; default: mIoU or accuracy"
SIZES = (
    "macs",
    "params",
    "latency_ms",
    "bytes",
)  # as ``reporting.pages.sweep_charts``, which is slow to import
OWN = "configurations and modules of your own"
PICTURE = "write the layers and their couplings as .png, .svg or .pdf"
EXPORTS = """examples:
  lightning-prune export RUN net.pt2               torch.export program
  lightning-prune export RUN --int8 --baseline DENSE_RUN
  lightning-prune export RUN DIR --license mit     folder with a model card
"""
EPILOG = """examples:
  lightning-prune plan                                   the default network
  lightning-prune plan net=fpn prune.budget.macs=0.26    any configuration
  lightning-prune plan RUN                  what a run has cut, or would cut
  lightning-prune plan torchvision.models.resnet50 --shape 1,3,224,224
"""


def read(command: str, arguments: Sequence[str]) -> argparse.Namespace:
    """Read the arguments of a command; ``--help``, and what is wrong with them, end the program.

    Example:
        >>> read("export", ["run", "net.pt2", "--fixed-batch"]).fixed_batch
        True
    """
    return PARSERS[command](command).parse_intermixed_args(arguments)


def _shape(text: str) -> tuple[int, ...]:
    parts = text.replace("x", ",").split(",")
    if not all(part.strip().isdecimal() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no shape: whole numbers, batch included, such as 1,3,224,224"
        )
    return tuple(map(int, parts))


def _plan(command: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        f"lightning-prune {command}",
        description="Show what would be cut from a network, layer by layer, before anything is\n"
        "trained: channels, MACs, parameters and latency before and after, what is\n"
        "pinned and why, and which layers are coupled.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "words", nargs="*", metavar="RUN | NETWORK | KEY=VALUE", help="a run, an import path, or overrides"
    )
    parser.add_argument("--shape", type=_shape, default=(), help="of the input, batch included: 1,3,224,224")
    parser.add_argument("--latency", type=Path, metavar="TABLE", help="latency table of this network (.json)")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write JSON; -: print it instead of the table"
    )
    parser.add_argument(
        "--html", type=Path, metavar="FILE", help="write a page; .svg: a picture of the table"
    )
    parser.add_argument("--picture", type=Path, metavar="FILE", help=PICTURE)
    parser.add_argument("--width", type=int, help="columns of the table; default: those of the terminal")
    parser.add_argument("--config-dir", type=Path, metavar="DIR", help=OWN)
    return parser


def _prune(command: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        f"lightning-prune {command}", description=DESCRIPTIONS[command], epilog=EXAMPLE
    )
    parser.add_argument("run", type=Path, help="folder of a run with a trained, dense network (prune=none)")
    parser.add_argument("out", type=Path, help="folder to write, in the form of a run")
    group = "METHOD" if command == "prune" else command
    parser.add_argument(
        "overrides",
        nargs="*",
        help=f"keys of conf/prune/{group}.yaml; all other keys are those of the run",
    )
    parser.add_argument(
        "--epochs", type=int, default=0, help="epochs of training after the cut; default 0: cut and test only"
    )
    if command == "prune":
        parser.add_argument(
            "--method",
            choices=("oneshot", "netadapt"),
            default="oneshot",
            help="oneshot (default): in one cut, and repair it; netadapt: in rounds, the best of several candidates",
        )
    return parser


def _sensitivity(command: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        f"lightning-prune {command}",
        description="Score of the network of a run against the share of filters removed, layer by layer: which "
        "layers bear a cut.",
    )
    parser.add_argument(
        "run", type=Path, help="folder of a run; sensitivity.json and sensitivity.png are written into it"
    )
    parser.add_argument(
        "--criterion", default="ipad", help="which filters are removed first: l1, l2, fpgm, ipad, ..."
    )
    parser.add_argument(
        "--batches", type=int, default=0, help="number of batches of the validation set; default: all"
    )
    parser.add_argument(
        "--recalibrate",
        type=int,
        default=0,
        help="number of training batches to estimate batch norms on after each cut; default 0: none",
    )
    parser.add_argument(
        "--device", default="", help="torch device; default: a GPU if there is one, else the CPU"
    )
    parser.add_argument("--out", type=Path, help="folder to write into instead of that of the run")
    return parser


def _latency(command: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        f"lightning-prune {command}",
        description="Measure the network of a configuration on this machine, for budgets in time.",
    )
    parser.add_argument("path", help="file to write (.json), or a folder that gets a file for each network")
    parser.add_argument(
        "overrides", nargs="*", help="KEY=VALUE of the configuration: net=fpn data=folder ..."
    )
    parser.add_argument(
        "--execution", choices=EXECUTIONS, default="eager", help="how the network is executed"
    )
    parser.add_argument("--device", default="cpu", help="torch device: cpu, cuda, cuda:1, ...")
    parser.add_argument("--threads", type=int, help="CPU threads; default: as many as torch uses")
    parser.add_argument(
        "--cuts",
        type=int,
        default=CUTS,
        help="number of random cuts to calibrate the sum of the operators on",
    )
    parser.add_argument("--config-dir", type=Path, metavar="DIR", help=OWN)
    return parser


def _export(command: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        f"lightning-prune {command}",
        description="Write the pruned network of a run for other programs.",
        epilog=EXPORTS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument(
        "path", type=Path, nargs="?", help="file .onnx or .pt2, or a folder; default: RUN/net.onnx"
    )
    parser.add_argument("--int8", action="store_true", help="quantise; compare dense, pruned, INT8")
    parser.add_argument("--baseline", type=Path, metavar="RUN", help="dense run to compare with")
    parser.add_argument(
        "--images", type=int, default=64, metavar="N", help="training images that calibrate; default 64"
    )
    parser.add_argument("--reduce-range", action="store_true", help="7-bit weights, for x86 without VNNI")
    parser.add_argument(
        "--threads", type=int, default=1, metavar="N", help="of the latency that is measured; default 1"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the comparison; -: print it")
    parser.add_argument("--license", default="unknown", help="for the model card: mit, apache-2.0, ...")
    parser.add_argument("--push", metavar="USER/NAME", help="upload to the Hugging Face hub, private")
    parser.add_argument("--public", action="store_true", help="make a new repository public")
    parser.add_argument(
        "--weights", type=Path, metavar="FILE", help="checkpoint of the run; default: RUN/net.pt"
    )
    parser.add_argument(
        "--shape", type=int, nargs="+", default=(), metavar="N", help="of the input, batch included"
    )
    parser.add_argument("--fixed-batch", action="store_true", help="only for the batch of the shape")
    return parser


def _report(command: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        f"lightning-prune {command}",
        description="Write the page of a run (report.html, and report.png) or of a sweep (sweep.html): one file that "
        "needs no network. Prints the table of results.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run or of a sweep")
    parser.add_argument(
        "baseline",
        type=Path,
        nargs="?",
        metavar="BASELINE",
        help="dense run on the same data, drawn beside it",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="page (.html) or picture (.png) to write; default: both, in RUN",
    )
    parser.add_argument("--metric", metavar="NAME", help=METRIC)
    return parser


def _compare(command: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        f"lightning-prune {command}",
        description="Print one table and write one page of several runs: the settings in which they differ, sizes, "
        "latency, scores. Runs that differ in their seed only share a row.",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run or of a sweep")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="write sweep.html, .md, .csv and .json into this folder"
    )
    parser.add_argument(
        "--html",
        type=Path,
        metavar="FILE",
        help="page to write; default: compare.html in the folder around the runs",
    )
    parser.add_argument("--metric", metavar="NAME", help=METRIC)
    parser.add_argument(
        "--against", choices=SIZES, default="macs", help="size on the axis of the Pareto front; default: macs"
    )
    return parser


PARSERS: dict[str, Callable[[str], argparse.ArgumentParser]] = {
    "plan": _plan,
    "prune": _prune,
    "oneshot": _prune,
    "netadapt": _prune,
    "sensitivity": _sensitivity,
    "latency": _latency,
    "export": _export,
    "report": _report,
    "compare": _compare,
}
