"""Candidates that are repaired after their cut."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_prune import trace
from lightning_prune.compensation import CompensationSettings, cut_and_compensate_
from lightning_prune.netadapt import candidate
from lightning_prune.netadapt.candidate import CALIBRATION_BATCHES
from lightning_prune.netadapt.repair import SETTINGS, SearchRepair
from lightning_prune.netadapt.rounds import Rounds
from lightning_prune.netadapt.workers import Workers
from lightning_prune.serialization.saving import load_torch_file
from lightning_prune.tracing.ids import Units
from tests.support.netadapt_search import RULES, TRAINING, build, error, loss, run_search
from tests.support.nets import assert_same

MILD = replace(RULES, budget={"macs": 0.7})
UNTRAINED = Rounds(rounds=1, steps=0)
EXAMPLE = ((torch.zeros(1, 1, 8, 8),), {})


def removed_units(net: nn.Module, kept: dict[str, dict[int, list[int]]]) -> Units:
    """Return the units of a dense network whose filters a record does not keep."""
    graph = trace(net, torch.zeros(1, 1, 8, 8))
    units = [
        np.delete(graph.bindings[name][0], dims[0])
        for name, dims in kept.items()
        if 0 in dims and name.endswith("weight")
    ]
    return np.unique(np.concatenate(units))


def test_a_candidate_without_training_is_the_network_after_cut_and_repair():
    net, result = run_search(rounds=UNTRAINED, rules=MILD)
    expected = build().train()
    images = SearchRepair.of(True, expected, EXAMPLE, TRAINING.batches).batches
    remove = removed_units(expected, result.record.kept)
    _, report = cut_and_compensate_(
        expected, trace(expected, torch.zeros(1, 1, 8, 8)), remove, images, settings=SETTINGS
    )
    assert report.accepted
    assert result.rounds[0].change == (report.change_before, report.change_after)
    assert_same(net.state_dict(), expected.state_dict())


def test_repaired_candidates_lose_less_and_say_so_in_the_line_of_their_round():
    lines: list[str] = []
    _, repaired = run_search(rounds=UNTRAINED, rules=MILD, report=lines.append)
    _, plain = run_search(rounds=UNTRAINED, rules=MILD, compensate=False)
    before, after = repaired.rounds[0].change
    assert after < before
    assert f" · repaired, change {before:.2g} → {after:.2g} · " in lines[0]
    assert plain.rounds[0].change is None


@pytest.mark.parametrize("compensate", [True, False])
def test_workers_and_interruptions_do_not_change_a_bit_with_and_without_repair(compensate: bool, tmp_path):
    def stop_after_first(line: str) -> None:
        if line.startswith("round 1"):
            raise KeyboardInterrupt

    rounds = Rounds(rounds=2, steps=1)
    once, result = run_search(rounds=rounds, compensate=compensate)
    parallel, _ = run_search(rounds=rounds, workers=Workers(n_jobs=2), compensate=compensate)
    with pytest.raises(KeyboardInterrupt):
        run_search(rounds=rounds, folder=tmp_path, report=stop_after_first, compensate=compensate)
    resumed, again = run_search(rounds=rounds, folder=tmp_path, compensate=compensate)
    assert_same(parallel.state_dict(), once.state_dict())
    assert_same(resumed.state_dict(), once.state_dict())
    assert [each.change for each in again.rounds] == [each.change for each in result.rounds]


def test_alignment_is_repaired_too():
    rounds = Rounds(rounds=2, steps=0, align=5, tolerance=None)
    with_repair, result = run_search(rounds=rounds)
    without, plain = run_search(rounds=rounds, compensate=False)
    assert result.rounds[-1].block == plain.rounds[-1].block == "(alignment)"
    assert error(with_repair.eval(), TRAINING.batches) < error(without.eval(), TRAINING.batches)


def test_a_search_with_repair_does_not_continue_one_without_and_old_states_are_without(tmp_path):
    one = Rounds(rounds=1, steps=1)
    net, _ = run_search(rounds=one, folder=tmp_path, compensate=False)
    with pytest.raises(ValueError, match=r"another search \(its compensation differ\)"):
        run_search(rounds=one, folder=tmp_path)
    state = load_torch_file(tmp_path / "state.pt")
    del state["search"]["checksum"], state["search"]["settings"]["compensation"]
    for item in state["search"]["rounds"]:
        del item["change"]
    torch.save(state, tmp_path / "state.pt")
    lines: list[str] = []
    again, _ = run_search(rounds=one, folder=tmp_path, report=lines.append, compensate=False)
    assert lines == [f"continuing after round 1, from {tmp_path}"]
    assert_same(again.state_dict(), net.state_dict())


def loss_of_flat_images(net: nn.Module, batch: Any) -> Tensor:
    return loss(net, (batch[0].unflatten(1, (1, 8, 8)), batch[1]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batches": [(x[:1], y[:1]) for x, y in TRAINING.batches[:1]]}, "needs at least two images, got 1"),
        (
            {"batches": [(x.flatten(1), y) for x, y in TRAINING.batches], "loss": loss_of_flat_images},
            "the network cannot run on the images",
        ),
    ],
)
def test_without_images_nothing_is_repaired_and_a_warning_says_why(change: dict[str, Any], message: str):
    training = replace(TRAINING, **change)
    with pytest.warns(UserWarning, match=f"candidates are not repaired: .*{message}"):
        net, result = run_search(training, rounds=UNTRAINED, rules=MILD)
    plain, _ = run_search(training, rounds=UNTRAINED, rules=MILD, compensate=False)
    assert result.rounds[0].change is None
    assert_same(net.state_dict(), plain.state_dict())


def test_the_first_training_batches_give_the_images():
    net = build()
    for settings, number in ((True, 32 // 4), (CompensationSettings(images=9), 3)):  # batches of four
        chosen = SearchRepair.of(settings, net, EXAMPLE, TRAINING.batches * 10).batches
        assert len(chosen) == number
        assert all(batch is other for batch, other in zip(chosen, TRAINING.batches * 2, strict=False))
    assert SearchRepair.of(False, net, EXAMPLE, TRAINING.batches) is None
    with pytest.raises(ValueError, match="compensate must be True, False or CompensationSettings, got 3"):
        run_search(compensate=3)


@pytest.mark.parametrize(("steps", "estimated"), [(1, False), (CALIBRATION_BATCHES, True)])
def test_norms_of_repaired_candidates_are_estimated_only_after_some_steps(
    steps: int, estimated: bool, monkeypatch: pytest.MonkeyPatch
):
    calls: list[int] = []
    monkeypatch.setattr(candidate, "recalibrate_by_", lambda *args: calls.append(1))
    one = Rounds(rounds=1, steps=steps)
    _, result = run_search(rounds=one, rules=MILD)
    assert result.rounds[0].change is not None
    assert bool(calls) == estimated
    run_search(rounds=one, rules=MILD, compensate=False)
    assert calls
