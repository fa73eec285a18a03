"""The pieces of a network as a latency table measures them. No test looks at how long anything took."""

from __future__ import annotations

import copy
import platform
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from scipy.interpolate import RegularGridInterpolator
from torch import Tensor, nn

from lightning_prune import LatencyTable, prune_, trace
from lightning_prune.latency.calibration import fitted, random_units
from lightning_prune.latency.inductor import compiled_operators, compiled_whole
from lightning_prune.latency.interpolation import Lookup, levels
from lightning_prune.latency.onnxruntime import onnx_operators, profiled
from lightning_prune.latency.operators import operators
from lightning_prune.latency.profiler import _entry, _Point
from lightning_prune.latency.timing import beside, timed
from lightning_prune.tracing.traced_int import TracedInt
from tests.support.latency_networks import IMAGE, Mixed


def test_timed_runs_follow_one_for_nothing_of_the_same_network() -> None:
    """oneDNN keeps 1024 kernels: 30 networks in turn had theirs compiled anew in every run, some more than others."""
    ran: list[str] = []
    runs = [lambda: ran.append("a"), lambda: ran.append("b")]
    timed(runs, torch.device("cpu"), 1, times=6)
    assert ran == [*"aaaa", *"bbbb", *"bbbb", *"aaaa"]


def test_the_network_that_others_are_held_against_has_more_turns() -> None:
    ran: list[str] = []
    runs = [lambda name=name: ran.append(name) for name in "dabc"]
    found = beside(runs[0], runs[1:], torch.device("cpu"), 1, times=3)
    assert ran == [*"dddd", *"aaaa", *"dddd", *"bbbb", *"cccc", *"dddd"]
    assert len(found) == 4


def test_lookup_is_multilinear() -> None:
    generator = np.random.default_rng(0)
    axes, values = ((1, 4, 9), (2, 3, 10, 20)), generator.random((3, 4))
    lookup, theirs = Lookup(axes, tuple(values.ravel())), RegularGridInterpolator(axes, values)
    for point in zip(
        generator.integers(1, 10, 30).tolist(), generator.integers(2, 21, 30).tolist(), strict=True
    ):
        assert lookup(*point) == pytest.approx(float(theirs([point])[0]))
    assert lookup(0, 30) == values[0, -1]
    assert Lookup((), (7.0,))() == 7.0


@pytest.mark.parametrize(
    ("axes", "values"),
    [(((2, 1),), (1.0, 2.0)), (((1, 2),), (1.0,)), (((1,),), (-1.0,)), (((1, 2.5),), (1.0, 2.0))],
)
def test_lookup_refuses_what_is_no_table(axes: Any, values: Any) -> None:
    with pytest.raises(ValueError, match="not a table"):
        Lookup(axes, values)


@pytest.mark.parametrize("multiples", [(0,), (4, 4), (2.0,)])
def test_lookup_refuses_multiples_that_make_no_sense(multiples: Any) -> None:
    with pytest.raises(ValueError, match="not a table"):
        Lookup(((1, 4),), (1.0, 2.0), multiples)


def test_counts_that_are_run_differently_are_not_interpolated_with_one_another() -> None:
    """Fast at multiples of four, slow between: no count is half fast."""
    axis = levels(64, multiple=4)
    steep = Lookup(
        (axis, (1, 9)), tuple(v for n in axis for v in (n * (1.0 if n % 4 == 0 else 10.0),) * 2), (4, 1)
    )
    for count in range(4, 65):
        assert steep(count, 5) == pytest.approx(count * (1.0 if count % 4 == 0 else 10.0))
    plain = Lookup(((4, 8),), (1.0, 2.0), (4,))
    assert plain(6) == 1.5  # where there is nothing but multiples, they must do


def test_levels_end_at_the_most_and_keep_to_steps() -> None:
    for most, step in ((1, 1), (5, 1), (64, 8), (96, 32), (1000, 1)):
        found = levels(most, step)
        assert found[-1] == most
        assert all(count % step == 0 for count in found)
        mixed = levels(most, step, multiple=4)
        assert mixed[-1] == most
        assert all(count % step == 0 for count in mixed)


def test_operators_run_with_any_number_of_channels_as_in_the_smaller_network() -> None:
    """The arguments that a template gives for the counts of a cut are those that the cut network really has."""
    graph = trace(net := Mixed().eval(), IMAGE)
    gone = random_units(graph, np.random.default_rng(1))
    kept, small = graph.kept(gone), copy.deepcopy(net)
    prune_(small, trace(small, IMAGE), gone)
    before, after = operators(graph), operators(trace(small, IMAGE))
    assert len(gone) > 5
    assert [each.signature for each in before] == [each.signature for each in after]
    for dense, cut in zip(before, after, strict=True):
        counts = [int(kept[factor].sum()) for factor in dense.factors]
        args, kwargs = dense.arguments(counts, torch.device("cpu"))
        real, _ = cut.arguments(cut.most, torch.device("cpu"))
        assert described(args) == described(real)
        with torch.inference_mode():
            dense.op(*args, **kwargs)


def described(args: Any) -> Any:
    if isinstance(args, Tensor):
        return tuple(args.shape), args.stride()
    return [described(each) for each in args] if isinstance(args, list) else args


def test_no_traced_number_is_left_in_a_template() -> None:
    found = operators(trace(Mixed().eval(), IMAGE))
    assert not any(isinstance(leaf, TracedInt) for operator in found for leaf in operator.leaves)


def test_correction_recovers_what_it_was_made_of() -> None:
    generator = np.random.default_rng(3)
    sums = generator.uniform(1e6, 9e6, (12, 3))
    sums[0, 1] = 0.0
    found = fitted(sums, 5e5 + sums @ [1.5, 1.6, 0.3])
    assert (found.constant, found.even, found.odd, found.cold) == pytest.approx(
        (5e5, 1.5, 1.6, 0.3), rel=0.04
    )
    assert found.error is not None
    assert found.error < 0.01


def test_a_fit_holds_most_to_what_weighs_most() -> None:
    sums = np.array([[8.0, 0.0, 0.0], [0.0, 4.0, 0.0], [1.0, 2.0, 0.0], [0.0, 1.0, 0.0]])
    times = 1 + sums @ [2.0, 2.0, 0.0] + [0.0, 1.0, -1.0, 2.0]

    def error(weights: list[float]) -> float:
        found = fitted(sums, times, np.array(weights))
        return abs(float(found.whole(sums[3])) - float(times[3]))

    assert error([10, 1, 1, 10]) < 0.2 * error([1, 1, 1, 1])


def convolutional() -> nn.Module:
    """What ONNX Runtime folds: norm and activation after a convolution; and what it does not: the pool, the head."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.MaxPool2d(2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    ).eval()  # fmt: skip


def test_onnx_pieces_compute_what_the_operators_do_with_any_number_of_channels() -> None:
    pieces = onnx_operators(trace(convolutional(), IMAGE))
    assert [piece.op._opname for piece in pieces] == [
        "convolution", "convolution", "max_pool2d_with_indices", "mean", "addmm",
    ]  # fmt: skip
    for piece in pieces:
        for counts in (piece.most, tuple(3 for _ in piece.most)):
            run = piece.run(counts, torch.device("cpu"))
            run()
            found = run.args[0].copy_outputs_to_cpu()[0].shape  # type: ignore[attr-defined]
            assert list(found) == [piece.size(size, counts) for size in piece.outputs[0]]


def activated() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 1), nn.BatchNorm2d(16), nn.Hardswish(inplace=True), nn.Conv2d(16, 16, 3, groups=16),
        nn.LeakyReLU(0.1), nn.ReLU(), nn.ConvTranspose2d(16, 8, 2), nn.Flatten(), nn.Linear(968, 4), nn.ReLU(),
    ).eval()  # fmt: skip


def test_an_activation_runs_along_with_its_convolution_in_onnx_runtime() -> None:
    first, depthwise, up, head, last = onnx_operators(trace(activated(), IMAGE))
    assert [each.op._opname for each in first.after] == ["hardswish_"]
    assert [each.op._opname for each in depthwise.after] == ["leaky_relu", "relu"]
    assert [piece.op._opname for piece in (up, head, last)] == ["convolution", "addmm", "relu"]
    assert len({piece.signature for piece in (first, depthwise, up, head, last)}) == 5
    assert "0.1" in depthwise.signature
    inputs = torch.rand(1, 16, 12, 12)
    model, (given,) = depthwise._model((16,))
    assert given.shape == inputs.shape
    kinds = [node.op_type for node in onnx.load_model_from_string(model).graph.node]
    assert kinds == ["Conv", "LeakyRelu", "Relu"]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the blocked layout is that of x86")
@pytest.mark.parametrize(("count", "reordered"), [(16, True), (12, True), (15, False), (14, False)])
def test_onnx_runtime_blocks_depthwise_convolutions_of_multiples_of_four_channels(
    count: int, reordered: bool
) -> None:
    """What the table's ``multiples`` rest on; and a piece's own time is that without the reorders."""
    _, depthwise, up, _, _ = onnx_operators(trace(activated(), IMAGE))
    assert (depthwise.multiples, up.multiples) == ((4,), (1, 1))
    kinds = [kind for kind, _ in profiled(*depthwise._model((count,)))]
    assert ("ReorderInput" in kinds) == reordered
    assert (depthwise.share((count,), torch.device("cpu")) < 1) == reordered


def test_latency_in_onnx_runtime() -> None:
    found = LatencyTable(execution="onnx", threads=1, cuts=2).build(trace(convolutional(), IMAGE))
    assert set(found.versions) == {"torch", "onnx", "onnxruntime"}
    assert found.alone == []
    assert found.correction.cuts == 2


def test_compiled_pieces_are_those_that_inductor_leaves() -> None:
    """A kernel per chain: batch norm with what follows it; a pool and what contracts are on their own."""
    pieces = compiled_operators(trace(convolutional(), IMAGE))
    assert [piece.op._opname for piece in pieces] == [
        "convolution", "native_batch_norm", "convolution", "max_pool2d_with_indices", "mean", "addmm",
    ]  # fmt: skip


def test_what_cannot_be_compiled_says_so() -> None:
    class Breaks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            torch._dynamo.graph_break()
            return x + 1

    with pytest.raises(RuntimeError, match=r"torch.compile cannot run Breaks: .*execution='eager'"):
        compiled_whole(Breaks(), (IMAGE,), {}, 1)


def test_every_cut_is_compiled_although_torch_keeps_only_eight_by_code(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the ninth, torch.compile would go on eagerly without a word."""
    compiled: list[Any] = []
    real = torch.compile

    def counting(graph: Any, example: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda fn, **given: real(fn, backend=counting, **given))
    for width in range(1, 11):
        net = nn.Conv2d(3, width, 1)
        assert compiled_whole(net, (IMAGE,), {}, 1)().shape[1] == width  # type: ignore[attr-defined]
    assert len(compiled) == 10


@pytest.mark.slow
def test_latency_when_compiled() -> None:
    found = LatencyTable(execution="compiled", threads=1, cuts=2).build(trace(convolutional(), IMAGE))
    assert found.correction.cuts == 2
    assert found.correction.constant + found.correction.even + found.correction.odd > 0


def test_calls_that_a_network_does_not_make_are_taken_off() -> None:
    """In ONNX Runtime every piece is a session of its own, the network is one."""
    piece = operators(trace(convolutional(), IMAGE))[0]
    point = _Point(piece, piece.most, times=[60.0] * 20)
    assert _entry([point], 20.0).lookup.values == (40.0,)  # type: ignore[union-attr]
    assert _entry([point], 80.0).lookup.values == (0.0,)  # type: ignore[union-attr]
    point.share = 0.5
    assert _entry([point], 20.0).lookup.values == (20.0,)  # type: ignore[union-attr]
