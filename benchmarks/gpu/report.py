"""The page of ``python -m benchmarks.gpu``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from benchmarks.common.pages import cell

__all__ = ["page"]

HEAD = """\
Each check of correctness trains, cuts or repairs a network on the device; checks that compare do so with the CPU.
The command reads no files and needs no network, so it also runs on a machine that has only torch, Lightning and the
wheels that `benchmarks/gpu/__init__.py` names."""
SPEED = """\
Networks with random weights, pruned by the norm of filters. *Multiple*: each cut layer keeps a multiple of this many
channels. Milliseconds of one forward in eval mode, medians of 15 times by CUDA events; in brackets the share of the
dense network's time in the same mode. fp32: convolutions in TF32, as torch sets by default. bf16: autocast, with
weights that are cast once. *CUDA graph*: one image, replayed without launching kernels one by one; without it, one
image takes as long as the launches."""


def page(content: dict[str, Any]) -> str:
    """Return the page (Markdown) of the stored results."""
    rows, versions = content["rows"], content["versions"]
    counts = {name: sum(row["outcome"] == name for row in rows) for name in ("ok", "failed", "skipped")}
    packages = " · ".join(f"{name} {version}" for name, version in versions.items())
    seconds = sum(row["seconds"] for row in rows)
    cuda = f" · CUDA {content['cuda']}" if "cuda" in content else ""
    lines = [
        "# On a GPU",
        "",
        f"{content['date']} · {content['device']}{cuda} · {packages} · {seconds:.0f} s. Made by "
        f"`python -m benchmarks.gpu{' --small' if content['small'] else ''}`.",
        "",
        f"**{counts['ok']} checks are right, {counts['failed']} failed, {counts['skipped']} were skipped.**",
        "",
        HEAD,
        "",
        "| check | outcome | seconds | result |",
        "|:--|:--|--:|:--|",
        *(_line(row) for row in rows),
        *_speed_ups(rows),
        *_training(rows),
    ]
    return "\n".join(lines) + "\n"


def _line(row: dict[str, Any]) -> str:
    figures = {name: value for name, value in row["figures"].items() if name != "rows"}
    text = row["reason"] or ", ".join(
        f"{name.replace('_', ' ')} {_short(value)}" for name, value in figures.items()
    )
    return f"| {row['name']} | {row['outcome']} | {row['seconds']:.1f} | {cell(text, 420)} |"


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_short(each)}" for name, each in value.items())
    if isinstance(value, list):
        return " → ".join(map(_short, value)) if value else "none"
    return value if isinstance(value, str) else json.dumps(value)


def _speed_ups(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Yield a table for each network, with a row for each size and a column for each mode."""
    measured = [row for row in rows if row["group"] != "memory" and "rows" in row["figures"]]
    if measured:
        yield from ("", "## Speed-up", "", SPEED)
    for row in measured:
        times = row["figures"]["rows"]
        columns = _columns(times)
        yield from ("", f"### {row['name']}", "")
        yield f"| MACs | multiple | {' | '.join(name for name, _ in columns)} |"
        yield f"|--:|--:|{'--:|' * len(columns)}"
        for macs, multiple in dict.fromkeys((each["macs"], each["multiple"]) for each in times):
            cells = [_time(times, macs, multiple, *key) for _, key in columns]
            yield f"| {macs:.0%} | {multiple} | {' | '.join(cells)} |"


def _columns(times: list[dict[str, Any]]) -> list[tuple[str, tuple[int, str, str]]]:
    columns = {}
    for each in times:
        for clock in ("ms", "graph_ms"):
            if clock in each:
                kind = ", CUDA graph" if clock == "graph_ms" else ""
                columns[f"{each['mode']}, batch {each['batch']}{kind}"] = each["batch"], each["mode"], clock
    return sorted(columns.items(), key=lambda column: (column[1][0], column[1][2] != "ms"))


def _time(times: list[dict[str, Any]], macs: float, multiple: int, batch: int, mode: str, clock: str) -> str:
    same = [each for each in times if each["batch"] == batch and each["mode"] == mode and clock in each]
    dense = next((each[clock] for each in same if each["macs"] == 1), None)
    found = next((each[clock] for each in same if (each["macs"], each["multiple"]) == (macs, multiple)), None)
    if found is None:
        return ""
    return f"{found:.3g}" + (f" ({found / dense:.0%})" if dense and macs != 1 else "")


def _training(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Yield the table of training dense and shrinking."""
    for row in rows:
        if row["group"] != "memory" or "rows" not in row["figures"]:
            continue
        figures = row["figures"]
        yield from ("", "## Training dense and shrinking", "")
        yield (
            f"U-Net with a ResNet-34 in bf16-mixed and channels last: batches of {figures['batch']}, images of "
            f"{figures['size']} x {figures['size']}, {figures['batches']} steps per epoch, "
            f"{len(figures['rows'][0]['seconds'])} epochs. Cuts come at the end of the first two epochs, with "
            "statistics, proof and repair; they are part of the time. Peak memory is what torch allocated at most."
        )
        yield from (
            "",
            "| MACs | seconds | of the cuts | last epoch | peak memory | in the last epoch | last loss |",
        )
        yield "|--:|--:|--:|--:|--:|--:|--:|"
        yield from (_training_line(each, figures["rows"][0]) for each in figures["rows"])


def _training_line(run: dict[str, Any], dense: dict[str, Any]) -> str:
    def ratio(value: float, reference: float, unit: str) -> str:
        return f"{value:.4g} {unit}" + ("" if run is dense else f" ({value / reference:.0%})")

    peaks = ["", ""]
    if run["peaks_mb"]:
        peaks = [
            ratio(max(run["peaks_mb"]), max(dense["peaks_mb"]), "MB"),
            ratio(run["peaks_mb"][-1], dense["peaks_mb"][-1], "MB"),
        ]
    cells = [
        f"{run['macs']:.0%}", ratio(run["wall"], dense["wall"], "s"),
        " + ".join(f"{seconds:.2g}" for seconds in run["cut_seconds"]),
        ratio(run["seconds"][-1], dense["seconds"][-1], "s"), *peaks, f"{run['losses'][-1]:.3f}",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"
