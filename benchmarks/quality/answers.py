"""The questions of the study, answered from the numbers; an aim that is missed is said with its figure."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence

from benchmarks.common.intervals import Interval, interval
from benchmarks.quality.plan import CRITERIA, DEFAULT, DENSE, DISTILLED, OMEGAS, PEERS, STAGES, THIN
from benchmarks.quality.summary import Key, Results

__all__ = ["answers", "answers_on_training"]

NOTE = (
    "Differences are of test scores of the same seed, with 95 % intervals (Student's t). Where all tasks are taken "
    'together, each pair of task and seed is one value. "The default" is IPAD energy with omega 0.25, repaired.'
)
BEST = 3  # places that the default should be among


def answers(results: Results) -> list[str]:
    """Return the section of answers (Markdown)."""
    parts = (
        ("Is the default among the best?", default_among_best(results)),
        ("Which criterion do the validation sets choose?", chosen(results)),
        ("Does any method collapse?", collapses(results)),
        *_on_training(results),
        ("Are the dense networks at a plateau?", plateau(results)),
        ("What does omega do?", omega(results)),
        ("Beside torch-pruning, slimming and NetAdapt", peers(results)),
    )
    return ["## Answers", "", NOTE, *_listed(parts)]


def answers_on_training(results: Results) -> list[str]:
    """Return the answers that depend on the length of the training (Markdown)."""
    return _listed(_on_training(results))[1:]


def _on_training(results: Results) -> tuple[tuple[str, Iterator[str]], ...]:
    """Return the questions that depend on the length of the training, and the sentences of their answers."""
    return (
        ("What does repair give?", repair(results)),
        ("Is it level with the dense network?", level(results)),
        ("Is it better than a thin network from scratch?", scratch(results)),
        ("Does distillation win back what is lost?", distillation(results)),
    )


def _listed(parts: Iterable[tuple[str, Iterable[str]]]) -> list[str]:
    """Return the answers as lists, without questions that have none."""
    lines = []
    for question, sentences in parts:
        found = [f"- {sentence}" for sentence in sentences]
        if found:
            lines += ["", f"**{question}**", "", *found]
    return lines


def common(results: Results, task: str, names: Sequence[str]) -> list[str]:
    """Return those of the repaired methods that have runs of as many seeds as the default."""
    wanted = set(results.values((task, DEFAULT, True, STAGES[1])))
    return [name for name in names if wanted and wanted <= set(results.values((task, name, True, STAGES[1])))]


def default_among_best(results: Results) -> Iterator[str]:
    """Say the place of the default on each task, by validation, for all shares together."""
    for task in results.tasks:
        names = common(results, task, CRITERIA)
        ranking = [name for name, _ in results.ranking(task, names, STAGES)]
        if DEFAULT in ranking and len(ranking) > 1:
            place = ranking.index(DEFAULT) + 1
            miss = "" if place <= BEST else f" The aim, among the first {BEST}, is missed."
            yield (
                f"{task}: {DEFAULT} has place {place} of {len(ranking)} repaired criteria by the mean on "
                f"validation over all shares; first is {ranking[0]}.{miss}"
            )


def chosen(results: Results) -> Iterator[str]:
    """Say which criterion has the best mean place over tasks and shares."""
    names = [n for n in CRITERIA if all(n in common(results, task, CRITERIA) for task in results.tasks)]
    places: dict[str, list[int]] = {name: [] for name in names}
    for task in results.tasks:
        for share in STAGES:
            for place, (name, _) in enumerate(results.ranking(task, names, [share]), 1):
                places[name].append(place)
    means = sorted((statistics.fmean(p), name) for name, p in places.items() if p)
    if len(means) > 1:
        listed = ", ".join(f"{name} {mean:.1f}" for mean, name in means)
        yield f"Mean place over tasks and shares, repaired, of {len(means)} criteria with all seeds: {listed}."
    for name in (name for _, name in means if name != "random"):
        cells = [f"{share:.0%}: {results.pooled((name, True), ('random', True), share)}" for share in STAGES]
        yield f"{name} less random, test, both repaired, all tasks and seeds: {'; '.join(cells)}."


def collapses(results: Results) -> Iterator[str]:
    """Say how many runs collapsed at each share, with and without repair."""
    for repaired in (True, False):
        cells = []
        for share in STAGES:
            runs = [
                lost
                for task in results.tasks
                for name in CRITERIA
                for lost in results.values((task, name, repaired, share), "collapsed").values()
            ]
            cells.append(f"{int(sum(runs))} of {len(runs)} at {share:.0%}")
        yield f"{'With' if repaired else 'Without'} repair, all criteria: {', '.join(cells)}."
    yield from _collapses_of_pairs(results)
    yield from _worst(results)


def _collapses_of_pairs(results: Results) -> Iterator[str]:
    """Say how many runs collapsed of those that there are with and without repair."""
    cells = []
    for share in STAGES:
        pairs = []
        for task, name in itertools.product(results.tasks, CRITERIA):
            on, off = (
                results.values((task, name, repaired, share), "collapsed") for repaired in (True, False)
            )
            pairs += [(on[seed], off[seed]) for seed in on.keys() & off.keys()]
        if pairs:
            repaired, plain = (int(sum(column)) for column in zip(*pairs, strict=True))
            cells.append(f"{share:.0%}: {repaired} with and {plain} without repair of {len(pairs)}")
    if cells:
        yield f"Same criteria, tasks and seeds: {'; '.join(cells)}."


def _worst(results: Results) -> Iterator[str]:
    """Name the repaired criteria that collapsed at 50 or 26 %, where none should."""
    named = [
        f"{name} ({task}, {share:.0%}, {int(sum(lost))} of {len(lost)})"
        for task in results.tasks
        for name in CRITERIA
        for share in STAGES[:2]
        if sum(lost := list(results.values((task, name, True, share), "collapsed").values()))
    ]
    if named:
        yield f"Aim missed, repaired and yet collapsed at 50 or 26 %: {', '.join(named)}."
    else:
        yield "No repaired criterion collapsed at 50 or 26 %, as intended."


def repair(results: Results) -> Iterator[str]:
    """Say the mean difference of repair, over all criteria, by share, for all tasks and for each."""
    for label, tasks in {"All tasks": results.tasks, **{task: [task] for task in results.tasks}}.items():
        cells, missed = [], []
        for share in STAGES:
            difference, wins, pairs = _repair_gain(results, tasks, share)
            if pairs:
                cells.append(f"{share:.0%}: {difference} ({wins} of {pairs} pairs up)")
                missed += [f"{share:.0%}"] * (share <= 0.10 and difference.mean < 0.01)
        if cells:
            aim = f" The aim, +0.01, is missed at {', '.join(missed)}." if missed else ""
            yield f"{label}, mean over criteria, after training: {'; '.join(cells)}.{aim}"


def _repair_gain(results: Results, tasks: Sequence[str], share: float) -> tuple[Interval, int, int]:
    """Return the gain, its interval over pairs of task and seed, how many runs gained, and how many there are."""
    gains: dict[tuple[str, int], list[float]] = {}
    for task, name in itertools.product(tasks, CRITERIA):
        with_repair, without = (results.values((task, name, on, share)) for on in (True, False))
        for seed in with_repair.keys() & without.keys():
            gains.setdefault((task, seed), []).append(with_repair[seed] - without[seed])
    pairs = [gain for group in gains.values() for gain in group]
    means = [statistics.fmean(group) for group in gains.values()]
    return interval(means), sum(gain > 0 for gain in pairs), len(pairs)


def level(results: Results) -> Iterator[str]:
    """Say the difference of the default from the dense network at all shares."""
    cells = [f"{share:.0%}: {results.pooled_from_dense((DEFAULT, True), share)}" for share in STAGES]
    yield f"All tasks and seeds together: {'; '.join(cells)}."
    for task in results.tasks:
        cells = [
            f"{share:.0%}: {results.from_dense((task, DEFAULT, True, share))}"
            for share in STAGES
            if results.values((task, DEFAULT, True, share))
        ]
        if cells:
            at_26, at_10 = (results.from_dense((task, DEFAULT, True, share)) for share in STAGES[1:3])
            missed = [
                *(["level at 26 %"] if at_26.verdict == "below" else []),
                *(["at most 0.02 below at 10 %"] if at_10.mean < -0.02 else []),
            ]
            aims = f" Missed: {', '.join(missed)}." if missed else ""
            yield f"{task}, {DEFAULT}, repaired, against dense: {'; '.join(cells)}.{aims}"


def plateau(results: Results) -> Iterator[str]:
    """Say by how much the dense networks change in the steps of all stages, without a cut."""
    for task in results.tasks:
        change = results.from_dense((task, DENSE, False, STAGES[-1]))
        if change.count:
            yield f"{task}: trained on for the steps of all stages, without a cut, dense changes by {change}."


def scratch(results: Results) -> Iterator[str]:
    """Say the difference of the default from the thin network at 26, 10 and 5 %."""
    pooled = [
        f"{share:.0%}: {d}"
        for share in STAGES[1:]
        if (d := results.pooled((DEFAULT, True), (THIN, False), share)).count
    ]
    if pooled:
        yield f"All tasks and seeds together: {'; '.join(pooled)}."
    for task in results.tasks:
        differences = {
            share: results.difference((task, DEFAULT, True, share), (task, THIN, False, share))
            for share in STAGES[1:]
        }
        cells = [f"{share:.0%}: {d}" for share, d in differences.items() if d.count]
        if cells:
            missed = [f"{share:.0%}" for share, d in differences.items() if d.count and d.mean <= 0]
            aims = (
                f" The thin network is level or better at {', '.join(missed)}: aim missed." if missed else ""
            )
            yield f"{task}, {DEFAULT}, repaired, against thin, same MACs and steps: {'; '.join(cells)}.{aims}"


def omega(results: Results) -> Iterator[str]:
    """Say the score over omega at 26 % for both forms, and whether the best lies inside."""
    for task in results.tasks:
        for family in ("IPAD", "IPAD energy"):
            keys = {w: (task, f"{family}, omega {w:g}", True, STAGES[1]) for w in OMEGAS}
            keys = {w: key for w, key in keys.items() if results.values(key)}
            if (
                len(keys) > 2
                and {0.0, 1.0} <= keys.keys()
                and results.values((task, "random", True, STAGES[1]))
            ):
                yield _omega(results, task, family, keys)


def _omega(results: Results, task: str, family: str, keys: Mapping[float, Key]) -> str:
    """Return the sentence on one form of IPAD."""
    random = (task, "random", True, STAGES[1])
    seeds = sorted(set.intersection(*(set(results.values(key)) for key in (*keys.values(), random))))
    scores, checks = (
        {w: statistics.fmean(results.values(key, column)[seed] for seed in seeds) for w, key in keys.items()}
        for column in ("test", "val")
    )
    level = statistics.fmean(results.values(random)[seed] for seed in seeds)
    best = max(checks, key=lambda w: checks[w])
    below = [f"{w:g}" for w, value in scores.items() if value < level]
    listed = ", ".join(f"{value:.3f}" for value in scores.values())
    place = "inside" if 0 < best < 1 else "at an end"
    weak = f"omega {', '.join(below)} below random" if below else "none below random"
    omegas = ", ".join(f"{w:g}" for w in scores)
    return (
        f"{task}, 26 %, repaired, {family}, omega {omegas} (seeds: {len(seeds)}): {listed}; "
        f"best on validation {place} ({best:g}); {weak}."
    )


def distillation(results: Results) -> Iterator[str]:
    """Say the gain of distillation, as a share of what is lost, with its interval."""
    for name in DISTILLED:
        cells, missed = [], []
        for share in STAGES[1:3]:
            gain = results.pooled((name, True), (DEFAULT, True), share)
            loss = _loss_of_pairs(results, name, share)
            if gain.count:
                won = f", {gain.mean / loss:.0%} of the loss" if loss > 0 else ""
                cells.append(f"{share:.0%}: {gain}{won}")
                missed += [f"{share:.0%}"] * (gain.verdict != "above" or gain.mean < loss / 2)
        if cells:
            aim = (
                f" The aim, half of it, interval above 0, is missed at {', '.join(missed)}." if missed else ""
            )
            yield f"{name.removeprefix(DEFAULT + ', ')}, all tasks and seeds: {'; '.join(cells)}.{aim}"


def _loss_of_pairs(results: Results, name: str, share: float) -> float:
    """Return what the default loses against dense, mean over the tasks and seeds that a method ran on."""
    losses = [
        results.dense(task)[seed] - value
        for task in results.tasks
        for seed, value in results.values((task, DEFAULT, True, share)).items()
        if seed in results.values((task, name, True, share))
    ]
    return statistics.fmean(losses) if losses else 0.0


def peers(results: Results) -> Iterator[str]:
    """Say the difference of the default, repaired, from each other tool, for all tasks and seeds."""
    for name in (*PEERS, "slimming", "NetAdapt"):
        cells = [
            f"{share:.0%}: {d}"
            for share in STAGES
            if (d := results.pooled((DEFAULT, True), (name, False), share)).count > 2
        ]
        if cells:
            yield f"{DEFAULT}, repaired, less {name}: {'; '.join(cells)}."
