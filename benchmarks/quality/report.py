"""Page and data of ``python -m benchmarks.quality``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.pages import RESULTS, ReportFiles
from benchmarks.quality.answers import answers, answers_on_training
from benchmarks.quality.figures import draw_omega, draw_shares
from benchmarks.quality.plan import CRITERIA, DEFAULT, DENSE, LABELS, SCRATCH, STAGES, THIN
from benchmarks.quality.summary import Results, flat
from benchmarks.quality.tasks import DENSE_RATE, SIZES, STAGE_RATES

__all__ = ["write"]


def write(runs: Sequence[dict[str, Any]], folder: Path = RESULTS) -> None:
    """Write page, data and pictures; without runs, from the stored data."""
    files = ReportFiles("quality", folder)
    content = files.save_runs([row for run in runs for row in flat(run)])
    everything = Results(content["runs"])
    results, longer = everything.of_length(False), everything.of_length(True)
    files.write_page(page(content, results, longer))
    draw_shares(results, files.figure.with_suffix(".svg"))
    draw_omega(results, files.figure.with_name("quality_omega.svg"))
    if folder == RESULTS:
        readme = ReportFiles("README", RESULTS.parents[1])
        readme.write_section("quality", "\n".join(["", *readme_table(results), ""]))


def readme_table(results: Results) -> list[str]:
    """Return the table of the README: median scores at 26 and 10 % of the MACs, by task."""
    shares = STAGES[1:3]
    heads = [f"{LABELS[task].split(':')[0]}, {share:.0%}" for task in results.tasks for share in shares]
    levels = [f"{results.dense_median(task):.3f}" for task in results.tasks for _ in shares]
    lines = ["| | " + " | ".join(heads) + " |", "|:--|" + "--:|" * len(heads)]
    lines.append("| dense | " + " | ".join(levels) + " |")
    for row in SHORT:
        cells = [cell(results, task, row, share) for task in results.tasks for share in shares]
        if any(cells):
            lines.append(f"| {name_of(*row)} | {' | '.join(cells)} |")
    return lines


def page(content: dict[str, Any], results: Results, longer: Results) -> str:
    """Return the page (Markdown).

    Args:
        content: date, machine and versions.
        results: the study.
        longer: the runs with longer training.
    """
    lines = [
        "# What a cut leaves, with and without repair",
        "",
        f"{content['date']} · {tools(content['versions'])} · {content['machine']}. Made by "
        "`python -m benchmarks.quality`, which says how each number comes about; the sizes are in its "
        "`tasks.py`. `--larger --device cuda` runs it with more steps, images and pixels.",
        "",
        *PROTOCOL,
        "",
        *sizes_table("study"),
        "",
        RATES,
        "",
        *answers(results),
        "",
        "## After training",
        "",
        AFTER_TRAINING,
        "",
        "![Median score over the share of the MACs](figures/quality.svg)",
        "",
        "![Median score at 26 % over omega](figures/quality_omega.svg)",
    ]
    for task in results.tasks:
        lines += ["", f"### {LABELS[task]}", "", *scores_table(results, task)]
    if longer.tasks:
        lines += ["", *longer_section(longer)]
    lines += ["", "## Directly after the cut", "", AFTER_CUT]
    for task in results.tasks:
        lines += ["", f"### {LABELS[task]}, no training", "", *cut_table(results, task)]
    lines += ["", "## Differences from random and from no repair", "", DIFFERENCES]
    for task in results.tasks:
        lines += ["", f"### {LABELS[task]}, differences", "", *difference_table(results, task)]
    return "\n".join([*lines, ""])


#: rows of the README's table
SHORT = (
    (DEFAULT, True),
    (DEFAULT, False),
    ("LAMP", True),
    ("LAMP", False),
    ("uniform L2", True),
    ("uniform L2", False),
    ("random", True),
    ("random", False),
    (THIN, False),
)
PROTOCOL = (
    "Three tasks: a U-Net (width 12) on FashionScenes, six classes at 48x48; ResNet-20 on "
    "Fashion-MNIST, pooled to 14x14 so that a run takes seconds; a U-Net with the first stages of ResNet-18 on "
    "BrainSlices, 48x48. A dense network is trained once per seed. Each method cuts it to 50, 26, 10 and 5 % of its "
    "MACs, one after the other. After each cut all methods train for the same number of steps with a new AdamW, "
    "warm-up and a cosine to zero, on the same batches. No layer keeps fewer than 4 channels or an eighth of them, "
    "in any method. Statistics of batch norms are estimated anew before every score, on the same batches. "
    "Statistics of criteria and the repair use the same 32 images (scenes, brain) or 256 (Fashion-MNIST). "
    "A network *from scratch* has the MACs of the stage and is trained for all steps that dense network and stages "
    "had together: *thin* has the same layers, all thinner by one factor, *shallow* has fewer layers.",
)
RATES = (
    f"Dense networks train at {DENSE_RATE:g}. The rates of the stages were chosen on validation with uniform L2 on "
    "the scenes, seed 1, and are the same for all methods. Networks from scratch have the rate of their stage, on "
    "the scenes at 0.008, which is better there. Slimming and GroupNormPruner train with their penalty before the "
    "first cut, for as many steps as a first stage, in addition. Training is short: the scores show what methods "
    "keep, not what a network can reach."
)
AFTER_TRAINING = (
    "Median of the test score over the seeds (mean IoU, or accuracy). `c2` says that two of the runs *collapsed*: a "
    "class that the dense network finds (IoU above 0.2) has an IoU below 0.05, or half of the accuracy is gone. "
    "Ordered by the mean on validation."
)
LONGER = (
    "`--long`: the same tasks and rates with more steps, for the questions that depend on the length of the "
    "training. Few methods and seeds."
)
AFTER_CUT = (
    "Median of the test score over the seeds, before any step of training at that stage, on the first 300 (scenes), "
    "2,000 (Fashion-MNIST) or all images. Unrepaired networks have new statistics of batch norms."
)
DIFFERENCES = (
    "Mean and 95 % interval (Student's t over seeds) of the difference of the test scores of runs with the same "
    "seed, after training. Against random: both repaired, or both not. Against not: the same method without repair."
)


def longer_section(results: Results) -> list[str]:
    """Return the section of the runs with longer training."""
    lines = [
        "## With longer training",
        "",
        LONGER,
        "",
        *sizes_table("long"),
        "",
        *answers_on_training(results),
    ]
    for task in results.tasks:
        lines += ["", f"### {LABELS[task]}", "", *scores_table(results, task)]
    return lines


def sizes_table(size: str) -> list[str]:
    """Return the table of the sizes of the runs."""
    lines = [
        "| | dense steps | steps per stage | images per step | rates of the stages |",
        "|:--|--:|--:|--:|--:|",
    ]
    rates = ", ".join(f"{rate:g}" for rate in STAGE_RATES)
    for task, sizes in SIZES.items():
        chosen = sizes[size]
        steps = ", ".join(map(str, chosen.stage_steps))
        lines.append(f"| {LABELS[task]} | {chosen.dense_steps} | {steps} | {chosen.batch} | {rates} |")
    return lines


def tools(versions: dict[str, str]) -> str:
    """Return the versions that matter."""
    return ", ".join(f"{name} {versions[name]}" for name in ("torch", "torch-pruning") if name in versions)


def name_of(method: str, repair: bool) -> str:
    """Return the name of a row."""
    return f"{method}, repaired" if repair else method


def ordered(results: Results, task: str) -> list[tuple[str, bool]]:
    """Return the rows of a task by the mean of the medians on validation at 26, 10 and 5 %, best first."""

    def mean(row: tuple[str, bool]) -> float:
        medians = [results.median((task, *row, share), "val") for share in STAGES[1:]]
        return sum(value for value in medians if not math.isnan(value)) / max(
            1, sum(not math.isnan(value) for value in medians)
        )

    return sorted(results.methods(task), key=lambda row: (row[0] != DENSE, -mean(row)))


def scores_table(results: Results, task: str) -> list[str]:
    """Return the table of scores after training."""
    lines = [
        f"| dense {results.dense_median(task):.3f} | "
        + " | ".join(f"{share:.0%}" for share in STAGES)
        + " | seeds |",
        "|:--|" + "--:|" * (len(STAGES) + 1),
    ]
    for row in ordered(results, task):
        seeds = max(len(results.values((task, *row, share))) for share in STAGES)
        cells = (cell(results, task, row, share) for share in STAGES)
        lines.append(f"| {emphasised(*row)} | {' | '.join(cells)} | {seeds} |")
    return lines


def emphasised(method: str, repair: bool) -> str:
    """Return the name of a row, that of the default in bold."""
    name = name_of(method, repair)
    return f"**{name}**" if method == DEFAULT and repair else name


def cell(results: Results, task: str, row: tuple[str, bool], share: float, column: str = "test") -> str:
    """Return median and collapses of a row at a share."""
    values = results.values((task, *row, share), column)
    if not values:
        return ""
    lost = 0 if column != "test" else sum(results.values((task, *row, share), "collapsed").values())
    return f"{results.median((task, *row, share), column):.3f}" + (f" c{int(lost)}" if lost else "")


def cut_table(results: Results, task: str) -> list[str]:
    """Return the table of scores directly after the cut: without and with repair, side by side."""
    lines = [
        "| not repaired → repaired | " + " | ".join(f"{share:.0%}" for share in STAGES) + " |",
        "|:--|" + "--:|" * len(STAGES),
    ]
    for name in (name for name, repair in ordered(results, task) if repair and name in CRITERIA):
        cells = [
            " → ".join(
                cell(results, task, (name, repair), share, "cut_test") or "?" for repair in (False, True)
            )
            for share in STAGES
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def difference_table(results: Results, task: str) -> list[str]:
    """Return the table of paired differences."""
    lines = ["| | against | " + " | ".join(f"{share:.0%}" for share in STAGES) + " |"]
    lines.append("|:--|:--|" + "--:|" * len(STAGES))
    for method, repair in ordered(results, task):
        if method not in CRITERIA and method not in SCRATCH:
            continue
        others = [("random", ("random", repair))] * (method != "random" and method not in SCRATCH)
        others += [("not", (method, False))] * repair
        others += [("default", (DEFAULT, True))] * (method in SCRATCH)
        for label, other in others:
            cells = [
                str(results.difference((task, method, repair, share), (task, *other, share)))
                for share in STAGES
            ]
            if any(cells):
                lines.append(f"| {name_of(method, repair)} | {label} | {' | '.join(cells)} |")
    return lines
