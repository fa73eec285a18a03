"""Unusual searches: networks with several inputs, losses that fail, folders of other searches."""

from __future__ import annotations

import json
import threading
import warnings
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from tqdm import tqdm

from lightning_prune import trace
from lightning_prune.criteria import IPAD, L2
from lightning_prune.netadapt.candidate import Candidate, CandidateContext
from lightning_prune.netadapt.rounds import Rounds
from lightning_prune.netadapt.run import search
from lightning_prune.netadapt.searcher import _with_bar
from lightning_prune.netadapt.workers import Workers, attempt_candidate, pack_context, run_candidates
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
    run_search,
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


def test_a_search_with_another_metric_or_other_data_is_refused_in_the_same_folder(tmp_path):
    run_search(folder=tmp_path, rounds=ONE)
    net = build()
    other = replace(TRAINING, evaluate=partial(error, held_out=batches(2, 3)))
    with pytest.raises(ValueError, match=r"holds another search \(the metric of its first network is"):
        run_search(other, folder=tmp_path, rounds=ONE)
    with pytest.raises(ValueError, match=r"holds another search \(its training, "):
        run_search(replace(TRAINING, batches=batches(5, 9)), folder=tmp_path, rounds=ONE)
    assert same(net, build())


def test_a_search_with_functions_as_criteria_and_types_in_limits_can_be_continued(tmp_path):
    def run_again() -> Any:
        def by_size(graph: Any, model: nn.Module, statistics: Any) -> Any:  # another object each time
            return torch.as_tensor(L2()(graph, model, {}))

        rules = replace(RULES, limits=Limits(0.9, overrides={nn.Conv2d: 0.9}))
        return run_search(
            rounds=replace(THREE, criterion=by_size), rules=rules, folder=tmp_path, report=lines.append
        )

    lines: list[str] = []
    (first, _), (second, result) = run_again(), run_again()
    assert lines[-1].startswith("continuing after round 3")
    assert same(first, second)
    assert result.reached


def nan_if_pruned(net: nn.Module, batch: Any) -> Tensor:
    """Return a loss that is NaN if the first layer lost filters."""
    return loss(net, batch) * (float("nan") if width(net) < 8 else 1.0)


def test_a_candidate_with_nan_weights_is_dropped_even_if_its_metric_is_the_best(tmp_path):
    training = replace(
        TRAINING, loss=nan_if_pruned, evaluate=width
    )  # lower is better: the broken one would win
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        net, result = run_search(training, rounds=ONE, rules=MILD, folder=tmp_path)
    assert ["made its weights NaN" in str(warning.message) for warning in caught] == [True]
    assert result.rounds[0].block != "0"
    assert all(p.isfinite().all() for p in net.parameters())
    history = json.loads((tmp_path / "history.json").read_text(), parse_constant=pytest.fail)
    assert history[0]["metrics"]["0"] is None


def train_candidate(training: Training, steps: int, net: nn.Module | None = None) -> dict[str, Any]:
    """Compute a candidate that loses a filter of its first layer; return its metric, weights and optimizer state."""
    model = net or build()
    remove = trace(model, torch.zeros(1, 1, 8, 8)).layers["0.weight"][:1].tolist()
    context = CandidateContext(model, EXAMPLE, training, None, steps)
    (result,) = run_candidates(pack_context(context), [Candidate(0, "0", tuple(remove), 0)], Workers(1))
    return {"metric": result.metric, "weights": result.weights, "state": result.optimizer["state"]}


def skip_first_batch(net: nn.Module, batch: Any) -> Tensor | None:
    return None if torch.equal(batch[0], TRAINING.batches[0][0]) else loss(net, batch)


def test_a_batch_without_a_loss_is_skipped():
    steps = {
        float(state["step"])
        for state in train_candidate(replace(TRAINING, loss=skip_first_batch), 3)["state"].values()
    }
    assert steps == {2.0}
    assert run_search(replace(TRAINING, loss=skip_first_batch), rounds=Rounds(rounds=2, steps=1))[1].reached


def test_accumulated_batches_make_one_step_like_one_large_batch():
    def plain() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 1, 1))

    small = batches(4, 1)
    large = [tuple(torch.cat(pair) for pair in zip(*small[i : i + 2], strict=True)) for i in (0, 2)]

    def sgd(net: nn.Module) -> Any:
        return torch.optim.SGD(net.parameters(), lr=0.1)

    one = train_candidate(replace(TRAINING, batches=large, optimizer=sgd), 2, plain())
    two = train_candidate(replace(TRAINING, batches=small, optimizer=sgd, accumulate=2), 2, plain())
    for name, weight in one["weights"].items():
        torch.testing.assert_close(two["weights"][name], weight)
    assert two["metric"] == pytest.approx(one["metric"])


def test_gradients_are_clipped_by_before_step():
    def clip_to_zero(net: nn.Module, optimizer: Any) -> None:
        for group in optimizer.param_groups:
            torch.nn.utils.clip_grad_norm_(group["params"], 0.0)

    def sgd(net: nn.Module) -> Any:
        return torch.optim.SGD(net.parameters(), lr=1.0)

    weights = train_candidate(replace(TRAINING, optimizer=sgd, before_step=clip_to_zero), 3)["weights"]
    assert torch.equal(weights["3.weight"], build().state_dict()["3.weight"][:, 1:])


def test_norms_in_eval_mode_keep_their_statistics():
    def frozen() -> nn.Sequential:
        net = build()
        recalibrate_(net, [((batch[0],), {}) for batch in TRAINING.batches])
        net[4].eval()
        return net

    before, after = frozen().state_dict(), train_candidate(TRAINING, 1, frozen())["weights"]
    assert torch.equal(after["4.running_var"], before["4.running_var"])
    assert not torch.equal(after["7.running_var"], before["7.running_var"])


class TwoInputs(nn.Module):
    """A network with two images as inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.alignment, self.right = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(1, 8, 3, padding=1)
        self.norm, self.out = nn.BatchNorm2d(16), nn.Conv2d(16, 1, 1)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.out(self.norm(torch.cat([self.alignment(left), self.right(right)], 1)).relu())


def pairs(number: int, seed: int) -> list[Any]:
    """Return batches of the form ``((left, right), target)``."""
    return [((image, image.flip(-1)), target) for image, target in batches(number, seed)]


def two_input_loss(net: nn.Module, batch: Any) -> Tensor:
    return nn.functional.mse_loss(net(*batch[0]), batch[1])


def test_a_network_with_several_inputs_and_a_module_called_alignment():
    torch.manual_seed(0)
    net, held_out = TwoInputs(), pairs(2, 2)
    training = Training(
        pairs(5, 1),
        two_input_loss,
        lambda net: two_input_loss(net, held_out[0]).item(),
        higher_is_better=False,
    )
    rounds = Rounds(
        rounds=2, steps=1, criterion=IPAD(omega=0.5), blocks=["alignment"], align=3, tolerance=None
    )
    example = torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 8, 8)
    result = search(net, example, PruningPolicy({"macs": 0.75}), training, rounds, report=silent)
    assert [item.block for item in result.rounds] == ["alignment", "alignment", "(alignment)"]
    assert net.alignment.out_channels == 3
    assert net.right.out_channels == 8


def test_an_empty_list_of_blocks_is_refused():
    with pytest.raises(ValueError, match="blocks names no block: name some, or give None"):
        run_search(rounds=replace(THREE, blocks=[]))


def test_an_error_in_a_worker_is_raised_with_its_traceback():
    context = CandidateContext(
        build(), EXAMPLE, replace(TRAINING, loss=partial(_broken, message="no such batch")), None, 1
    )
    jobs = [Candidate(i, str(i), (0,), 0) for i in range(2)]
    with pytest.raises(IndexError, match="no such batch") as caught:
        list(run_candidates(pack_context(context), jobs, Workers(2)))
    assert "in _broken" in str(caught.value.__cause__)
    with pytest.raises(IndexError, match="no such batch"):
        attempt_candidate(pack_context(context), jobs[0], torch.device("cpu"), 1)


def _broken(net: nn.Module, batch: Any, message: str) -> Tensor:
    raise IndexError(message)


def test_a_terminal_shows_a_bar_and_each_line_ends_with_the_remaining_time(monkeypatch, capsys):
    lines: list[str] = []
    run_search(report=lines.append)
    assert [line.rpartition(" · ")[2].startswith("about") for line in lines] == [True, True, False]
    assert not capsys.readouterr().err
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    run_search(report=print, rounds=ONE, rules=MILD)
    printed = capsys.readouterr()
    assert printed.out.startswith("round 1/1: ")
    assert "0/3 " in printed.err
    assert printed.err.endswith("\r")


def test_the_bar_of_a_round_starts_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is forked beside a thread cannot train: ``ddp_fork`` failed after a search."""
    monkeypatch.setattr(tqdm, "monitor", None)
    before = threading.enumerate()
    assert list(_with_bar(iter([1, 2]), 1, 2, bar=True)) == [1, 2]
    assert threading.enumerate() == before
