"""A lack of memory and the like is no verdict on a cut: it is rolled back, and tried again."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_prune import (
    L2,
    PassingFailure,
    PruningPolicy,
    PruningSession,
    SurgeryError,
    TraceError,
    prune_,
    trace,
)
from lightning_prune.selection.dense_sizes import DenseSizes
from lightning_prune.surgery import numerical_check, proof
from lightning_prune.utils import passing
from lightning_prune.utils.passing import is_passing, on_all

X = torch.zeros(2, 3, 12, 12)
POLICY = PruningPolicy({"macs": 0.5})
ERRORS: dict[str, Callable[[], Exception]] = {
    "no memory on the GPU": lambda: torch.OutOfMemoryError("CUDA out of memory"),
    "no memory on the CPU": lambda: RuntimeError("DefaultCPUAllocator: can't allocate memory: 8 bytes"),
    "no memory for Python": MemoryError,
    "an error of the GPU": lambda: torch.AcceleratorError("CUDA error: unspecified launch failure"),
    "an error of a library": lambda: RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR"),
    "an interrupted wait": lambda: InterruptedError(4, "Interrupted system call"),
}


class Faults:
    """Errors to raise; an object of its own, since tracing restores lists and numbers of a module."""

    def __init__(self) -> None:
        self.errors: list[Exception] = []
        self.due: Callable[[Failing], bool] = lambda model: model[0].out_channels < 8


class Failing(nn.Sequential):
    """Raises the next error in each forward that is due to fail."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 1))
        self.faults = Faults()

    def forward(self, x: Tensor) -> Tensor:
        if self.faults.errors and self.faults.due(self):
            raise self.faults.errors.pop()
        return super().forward(x)


def session_of(model: nn.Module) -> PruningSession:
    graph = trace(model, X)
    return PruningSession(model, ((X,), {}), graph, DenseSizes.of(graph))


def trained(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    model(torch.randn(4, 3, 12, 12)).square().mean().backward()
    optimizer.step()
    return optimizer


class FailsOnce(nn.Sequential):
    """Notes on itself that it has failed, in its smaller size, and does not fail again."""

    has_failed = False

    def forward(self, x: Tensor) -> Tensor:
        if self[0].out_channels < 8 and not self.has_failed:
            self.has_failed = True
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().forward(x)


def test_a_module_that_notes_on_itself_that_it_failed_is_cut_all_the_same():
    model = FailsOnce(*Failing())
    assert session_of(model).cut_(POLICY, L2())
    assert model.has_failed
    assert model[0].out_channels < 8
    assert model.training


@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
def test_a_cut_that_fails_in_passing_is_rolled_back_and_succeeds_the_next_time(error):
    model = Failing()
    optimizer, session = trained(model), session_of(model)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    momentum = optimizer.state[model[0].weight]["exp_avg"].clone()
    model.faults.errors = [error() for _ in range(4)]  # the trace on meta and on fake tensors, both attempts
    with pytest.warns(UserWarning, match="no cut this time.*tried again"):
        record = session.cut_(POLICY, L2(), [optimizer], now=3)
    assert not record
    assert (session.exhausted, session.owed, session.last_plan) == (False, 3, None)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert torch.equal(optimizer.state[model[0].weight]["exp_avg"], momentum)
    state = session.state()
    assert (state["exhausted"], state["owed"]) == (False, 3)
    assert session.cut_(POLICY, L2(), [optimizer], now=4)
    assert (session.exhausted, session.owed) == (False, None)
    assert POLICY.is_met(session.graph, session.dense)


def test_a_cut_that_fails_once_is_made_at_once_when_memory_was_freed(monkeypatch):
    freed = []
    monkeypatch.setattr(passing, "free_memory", lambda: freed.append(True))
    model = Failing()
    session = session_of(model)
    model.faults.errors = [torch.OutOfMemoryError("once") for _ in range(2)]
    assert session.cut_(POLICY, L2())
    assert freed == [True]
    assert session.owed is None


@pytest.mark.filterwarnings("ignore:.*selecting again")
def test_other_errors_of_the_smaller_network_are_still_verdicts():
    model = Failing()
    session = session_of(model)
    model.faults.errors = [ValueError("needs 8 channels") for _ in range(100)]
    with pytest.warns(UserWarning, match="no more cuts.*needs 8 channels"):
        assert not session.cut_(POLICY, L2())
    assert (session.exhausted, session.owed) == (True, None)


def test_a_cut_whose_smaller_network_cannot_be_traced_for_the_next_one_is_rolled_back(monkeypatch):
    model = Failing()
    session, dense = session_of(model), model[0].weight.detach().clone()
    original, traces = PruningPolicy.trace, []

    def fail(policy: PruningPolicy, *args: object) -> object:
        traces.append(model[0].out_channels)
        if len(traces) <= 2:
            raise TraceError("the network raises") from torch.OutOfMemoryError("CUDA out of memory")
        return original(policy, *args)

    monkeypatch.setattr(PruningPolicy, "trace", fail)
    with pytest.warns(UserWarning, match="no cut this time"):
        assert not session.cut_(POLICY, L2())
    assert traces[0] < 8
    assert torch.equal(model[0].weight, dense)
    assert session.graph.kept([]).sum() == len(session.graph.prunable) + len(session.graph.pinned)
    assert session.cut_(POLICY, L2())


def test_prune_raises_an_error_of_its_own_and_changes_nothing(monkeypatch):
    monkeypatch.setattr(proof, "is_proven", lambda *args: False)  # else the smaller network does not run
    model = Failing()
    graph, dense = trace(model, X), model[0].weight.detach().clone()
    model.faults.errors = [torch.OutOfMemoryError("CUDA out of memory") for _ in range(2)]
    with pytest.raises(PassingFailure, match="rolled back, and may succeed later") as raised:
        prune_(model, graph, graph.prunable[:3])
    assert not isinstance(raised.value, SurgeryError)
    assert torch.equal(model[0].weight, dense)
    assert prune_(model, graph, graph.prunable[:3])


@pytest.mark.parametrize("call", [1, 2])
def test_an_operator_that_cannot_be_checked_for_lack_of_memory_is_neither_proven_nor_refused(
    monkeypatch, call
):
    class Gate(nn.Module):  # no rule of masks covers its operator, which is therefore checked by numbers
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            return self.b(torch.flip(y, (3,)))

    model, run, calls = Gate(), numerical_check._run, []

    def fail(*args: object) -> object:
        calls.append(args)
        if len(calls) == call:  # the first is that of the dense operator, the second of the smaller one
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run(*args)

    graph = trace(model, X)
    monkeypatch.setattr(numerical_check, "_run", fail)
    with pytest.raises(PassingFailure):
        prune_(model, graph, graph.prunable[:3])
    assert model.a.out_channels == 8
    assert prune_(model, graph, graph.prunable[:3])
    assert len(calls) > 2


def test_a_mode_that_fails_for_lack_of_memory_is_not_left_out_of_the_trace():
    model = Failing()
    model.faults.due = lambda model: not model.training
    model.faults.errors = [torch.OutOfMemoryError("CUDA out of memory") for _ in range(2)]
    with pytest.raises(
        TraceError, match="failed in eval mode: OutOfMemoryError: CUDA out of memory"
    ) as raised:
        trace(model, X)
    assert is_passing(raised.value)
    assert trace(model, X).notes == trace(Failing(), X).notes


def test_all_processes_undo_and_repeat_what_failed_in_one(monkeypatch):
    answers = iter([["", "OutOfMemoryError: on rank 1"], ["", ""]])
    monkeypatch.setattr(passing, "gather_all", lambda value: next(answers))
    calls = []
    assert on_all(lambda: calls.append("cut") or 3, undo=lambda: calls.append("undone")) == 3
    assert calls == ["cut", "undone", "cut"]
    answers = iter([["", "OutOfMemoryError: on rank 1"]] * 2)
    with pytest.raises(PassingFailure, match="on rank 1"):
        on_all(lambda: 3)


def test_refusals_and_causes_are_told_from_failures_that_pass():
    assert not is_passing(SurgeryError("a filter would read the wrong channel"))
    assert not is_passing(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_passing(FileNotFoundError(2, "no such file"))
    error = RuntimeError("failed")
    error.__cause__ = MemoryError()
    assert is_passing(error)
