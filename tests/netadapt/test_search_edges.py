"""A search where something is unusual: networks with several inputs, losses that fail, folders of other searches."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_prune import trace
from lightning_prune.criteria import IPAD, L2
from lightning_prune.netadapt.candidate import Candidate, CandidateContext
from lightning_prune.netadapt.rounds import Rounds
from lightning_prune.netadapt.run import search
from lightning_prune.netadapt.workers import Workers, attempt, packed, run
from lightning_prune.pruning.training import Training
from lightning_prune.selection.limits import Limits
from lightning_prune.selection.policy import PruningPolicy
from lightning_prune.utils.batch_norm import recalibrate_
from tests.support.netadapt_search import (
    RULES,
    THREE,
    TRAINING,
    batches,
    build,
    error,
    loss,
    searched,
    silent,
)

ONE = Rounds(rounds=1, steps=2)
MILD = replace(RULES, budget={"macs": 0.8})
EXAMPLE = ((torch.zeros(1, 1, 8, 8),), {})


def same(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(one, other) for one, other in pairs)


def width(net: Any) -> int:
    return net[0].out_channels


def test_a_search_that_judges_otherwise_is_another_one(tmp_path):
    searched(folder=tmp_path, rounds=ONE)
    net = build()
    other = replace(TRAINING, evaluate=partial(error, held_out=batches(2, 3)))
    with pytest.raises(ValueError, match=r"holds another search \(whose network was judged"):
        searched(other, folder=tmp_path, rounds=ONE)
    with pytest.raises(ValueError, match=r"holds another search \(its training differ"):
        searched(replace(TRAINING, batches=batches(5, 9)), folder=tmp_path, rounds=ONE)
    assert same(net, build())


def test_functions_as_criteria_and_types_in_limits_do_not_keep_a_search_from_going_on(tmp_path):
    def again() -> Any:
        def by_size(graph: Any, model: nn.Module, statistics: Any) -> Any:  # another object each time
            return torch.as_tensor(L2()(graph, model, {}))

        rules = replace(RULES, limits=Limits(0.9, overrides={nn.Conv2d: 0.9}))
        return searched(
            rounds=replace(THREE, criterion=by_size), rules=rules, folder=tmp_path, report=lines.append
        )

    lines: list[str] = []
    (first, _), (second, found) = again(), again()
    assert lines[-1].startswith("going on after round 3")
    assert same(first, second)
    assert found.reached


def explodes(net: nn.Module, batch: Any) -> Tensor:
    """A loss that is NaN where the first layer lost filters."""
    return loss(net, batch) * (float("nan") if width(net) < 8 else 1.0)


def test_a_candidate_whose_weights_became_nan_never_stays_even_if_its_metric_is_fine(tmp_path):
    training = replace(TRAINING, loss=explodes, evaluate=width)  # lower is better: the broken one would win
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        net, found = searched(training, rounds=ONE, rules=MILD, folder=tmp_path)
    assert ["made its weights NaN" in str(each.message) for each in said] == [True]
    assert found.rounds[0].block != "0"
    assert all(p.isfinite().all() for p in net.parameters())
    facts = json.loads((tmp_path / "history.json").read_text(), parse_constant=pytest.fail)
    assert facts[0]["metrics"]["0"] is None


def tuned(training: Training, steps: int, net: nn.Module | None = None) -> dict[str, Any]:
    """What becomes of a candidate that loses a filter of its first layer."""
    model = net or build()
    gone = trace(model, torch.zeros(1, 1, 8, 8)).layers["0.weight"][:1].tolist()
    shared = CandidateContext(model, EXAMPLE, training, None, steps)
    (outcome,) = run(packed(shared), [Candidate(0, "0", tuple(gone), 0)], Workers(1))
    return {"metric": outcome.metric, "weights": outcome.weights, "state": outcome.optimizer["state"]}


def skips(net: nn.Module, batch: Any) -> Tensor | None:
    return None if torch.equal(batch[0], TRAINING.batches[0][0]) else loss(net, batch)


def test_a_batch_without_a_loss_is_skipped():
    steps = {float(each["step"]) for each in tuned(replace(TRAINING, loss=skips), 3)["state"].values()}
    assert steps == {2.0}
    assert searched(replace(TRAINING, loss=skips), rounds=Rounds(rounds=2, steps=1))[1].reached


def test_accumulated_batches_make_one_step_like_one_large_batch():
    def plain() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 1, 1))

    small = batches(4, 1)
    large = [tuple(torch.cat(pair) for pair in zip(*small[i : i + 2], strict=True)) for i in (0, 2)]

    def sgd(net: nn.Module) -> Any:
        return torch.optim.SGD(net.parameters(), lr=0.1)

    one = tuned(replace(TRAINING, batches=large, optimizer=sgd), 2, plain())
    two = tuned(replace(TRAINING, batches=small, optimizer=sgd, accumulate=2), 2, plain())
    for name, weight in one["weights"].items():
        torch.testing.assert_close(two["weights"][name], weight)
    assert two["metric"] == pytest.approx(one["metric"])


def test_gradients_are_clipped_as_told():
    def none_left(net: nn.Module, optimizer: Any) -> None:
        for group in optimizer.param_groups:
            torch.nn.utils.clip_grad_norm_(group["params"], 0.0)

    def sgd(net: nn.Module) -> Any:
        return torch.optim.SGD(net.parameters(), lr=1.0)

    still = tuned(replace(TRAINING, optimizer=sgd, before_step=none_left), 3)["weights"]
    assert torch.equal(still["3.weight"], build().state_dict()["3.weight"][:, 1:])


def test_norms_in_eval_mode_keep_their_statistics():
    def frozen() -> nn.Sequential:
        net = build()
        recalibrate_(net, [((batch[0],), {}) for batch in TRAINING.batches])
        net[4].eval()
        return net

    before, after = frozen().state_dict(), tuned(TRAINING, 1, frozen())["weights"]
    assert torch.equal(after["4.running_var"], before["4.running_var"])
    assert not torch.equal(after["7.running_var"], before["7.running_var"])


class Two(nn.Module):
    """Reads two images."""

    def __init__(self) -> None:
        super().__init__()
        self.alignment, self.right = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(1, 8, 3, padding=1)
        self.norm, self.out = nn.BatchNorm2d(16), nn.Conv2d(16, 1, 1)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.out(self.norm(torch.cat([self.alignment(left), self.right(right)], 1)).relu())


def pairs(number: int, seed: int) -> list[Any]:
    """``((left, right), target)``."""
    return [((image, image.flip(-1)), target) for image, target in batches(number, seed)]


def by_both(net: nn.Module, batch: Any) -> Tensor:
    return nn.functional.mse_loss(net(*batch[0]), batch[1])


def test_a_network_with_several_inputs_and_a_module_called_alignment():
    torch.manual_seed(0)
    net, held = Two(), pairs(2, 2)
    training = Training(
        pairs(5, 1), by_both, lambda net: by_both(net, held[0]).item(), higher_is_better=False
    )
    rounds = Rounds(
        rounds=2, steps=1, criterion=IPAD(omega=0.5), blocks=["alignment"], align=3, tolerance=None
    )
    example = torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 8, 8)
    found = search(net, example, PruningPolicy({"macs": 0.75}), training, rounds, report=silent)
    assert [each.block for each in found.rounds] == ["alignment", "alignment", "(alignment)"]
    assert net.alignment.out_channels == 3
    assert net.right.out_channels == 8


def test_no_blocks_at_all_are_refused():
    with pytest.raises(ValueError, match="blocks names no block: name some, or give None"):
        searched(rounds=replace(THREE, blocks=[]))


def test_the_traceback_of_a_worker_reaches_the_user():
    shared = CandidateContext(
        build(), EXAMPLE, replace(TRAINING, loss=partial(_broken, why="no such batch")), None, 1
    )
    jobs = [Candidate(i, str(i), (0,), 0) for i in range(2)]
    with pytest.raises(IndexError, match="no such batch") as caught:
        list(run(packed(shared), jobs, Workers(2)))
    assert "in _broken" in str(caught.value.__cause__)
    with pytest.raises(IndexError, match="no such batch"):
        attempt(packed(shared), jobs[0], torch.device("cpu"), 1)


def _broken(net: nn.Module, batch: Any, why: str) -> Tensor:
    raise IndexError(why)


def test_a_terminal_counts_candidates_and_lines_say_how_long_it_will_take(monkeypatch, capsys):
    lines: list[str] = []
    searched(report=lines.append)
    assert [line.rpartition(" · ")[2].startswith("about") for line in lines] == [True, True, False]
    assert not capsys.readouterr().err
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    searched(report=print, rounds=ONE, rules=MILD)
    said = capsys.readouterr()
    assert said.out.startswith("round 1/1: ")
    assert "0/3 " in said.err
    assert said.err.endswith("\r")
