"""Pieces of a network as a latency table measures them. No test checks how long anything takes."""

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
from lightning_prune.latency.calibration import fit_correction, random_units
from lightning_prune.latency.inductor import compiled_network, compiled_operators
from lightning_prune.latency.interpolation import Lookup, grid_counts
from lightning_prune.latency.onnxruntime import node_times, onnx_operators
from lightning_prune.latency.operators import operators
from lightning_prune.latency.profiler import TimedPiece, _curve
from lightning_prune.latency.timing import time_against_reference, time_calls
from lightning_prune.tracing.traced_int import TracedInt
from tests.support.latency_networks import IMAGE, Mixed


def test_each_turn_begins_with_a_call_to_warm_up() -> None:
    """oneDNN caches 1024 kernels: without it, 30 networks in turn have theirs compiled again in every turn."""
    order: list[str] = []
    calls = [lambda: order.append("a"), lambda: order.append("b")]
    time_calls(calls, torch.device("cpu"), 1, times=6)
    assert order == [*"aaaa", *"bbbb", *"bbbb", *"aaaa"]


def test_the_reference_network_has_more_turns() -> None:
    order: list[str] = []
    calls = [lambda name=name: order.append(name) for name in "dabc"]
    times = time_against_reference(calls[0], calls[1:], torch.device("cpu"), 1, times=3)
    assert order == [*"dddd", *"aaaa", *"dddd", *"bbbb", *"cccc", *"dddd"]
    assert len(times) == 4


def test_lookup_is_multilinear() -> None:
    generator = np.random.default_rng(0)
    axes, values = ((1, 4, 9), (2, 3, 10, 20)), generator.random((3, 4))
    lookup, scipy_lookup = Lookup(axes, tuple(values.ravel())), RegularGridInterpolator(axes, values)
    for point in zip(
        generator.integers(1, 10, 30).tolist(), generator.integers(2, 21, 30).tolist(), strict=True
    ):
        assert lookup(*point) == pytest.approx(float(scipy_lookup([point])[0]))
    assert lookup(0, 30) == values[0, -1]
    assert Lookup((), (7.0,))() == 7.0


@pytest.mark.parametrize(
    ("axes", "values"),
    [(((2, 1),), (1.0, 2.0)), (((1, 2),), (1.0,)), (((1,),), (-1.0,)), (((1, 2.5),), (1.0, 2.0))],
)
def test_lookup_refuses_invalid_tables(axes: Any, values: Any) -> None:
    with pytest.raises(ValueError, match="not a table"):
        Lookup(axes, values)


@pytest.mark.parametrize("multiples", [(0,), (4, 4), (2.0,)])
def test_lookup_refuses_invalid_multiples(multiples: Any) -> None:
    with pytest.raises(ValueError, match="not a table"):
        Lookup(((1, 4),), (1.0, 2.0), multiples)


def test_multiples_and_other_counts_are_interpolated_separately() -> None:
    """Multiples of four are fast, other counts slow; no count is in between."""
    axis = grid_counts(64, multiple=4)
    steep = Lookup(
        (axis, (1, 9)), tuple(v for n in axis for v in (n * (1.0 if n % 4 == 0 else 10.0),) * 2), (4, 1)
    )
    for count in range(4, 65):
        assert steep(count, 5) == pytest.approx(count * (1.0 if count % 4 == 0 else 10.0))
    plain = Lookup(((4, 8),), (1.0, 2.0), (4,))
    assert plain(6) == 1.5  # without other counts, the multiples are used


def test_grid_counts_end_at_the_largest_and_are_multiples_of_the_step() -> None:
    for largest, step in ((1, 1), (5, 1), (64, 8), (96, 32), (1000, 1)):
        counts = grid_counts(largest, step)
        assert counts[-1] == largest
        assert all(count % step == 0 for count in counts)
        mixed = grid_counts(largest, step, multiple=4)
        assert mixed[-1] == largest
        assert all(count % step == 0 for count in mixed)


def test_operators_run_with_any_number_of_channels_as_in_the_smaller_network() -> None:
    """A template's arguments for the counts of a cut are equal to the arguments in the network after the cut."""
    graph = trace(net := Mixed().eval(), IMAGE)
    remove = random_units(graph, np.random.default_rng(1))
    kept, small = graph.kept(remove), copy.deepcopy(net)
    prune_(small, trace(small, IMAGE), remove)
    before, after = operators(graph), operators(trace(small, IMAGE))
    assert len(remove) > 5
    assert [operator.signature for operator in before] == [operator.signature for operator in after]
    for dense, cut in zip(before, after, strict=True):
        counts = [int(kept[factor].sum()) for factor in dense.factors]
        args, kwargs = dense.arguments(counts, torch.device("cpu"))
        expected, _ = cut.arguments(cut.dense_counts, torch.device("cpu"))
        assert shapes_and_strides(args) == shapes_and_strides(expected)
        with torch.inference_mode():
            dense.op(*args, **kwargs)


def shapes_and_strides(args: Any) -> Any:
    if isinstance(args, Tensor):
        return tuple(args.shape), args.stride()
    return [shapes_and_strides(arg) for arg in args] if isinstance(args, list) else args


def test_templates_hold_no_traced_integers() -> None:
    templates = operators(trace(Mixed().eval(), IMAGE))
    assert not any(isinstance(leaf, TracedInt) for operator in templates for leaf in operator.leaves)


def test_correction_recovers_the_coefficients_of_its_data() -> None:
    generator = np.random.default_rng(3)
    sums = generator.uniform(1e6, 9e6, (12, 3))
    sums[0, 1] = 0.0
    correction = fit_correction(sums, 5e5 + sums @ [1.5, 1.6, 0.3])
    assert (correction.constant, correction.even, correction.odd, correction.cold) == pytest.approx(
        (5e5, 1.5, 1.6, 0.3), rel=0.04
    )
    assert correction.error is not None
    assert correction.error < 0.01


def test_networks_with_larger_weights_are_fitted_more_closely() -> None:
    sums = np.array([[8.0, 0.0, 0.0], [0.0, 4.0, 0.0], [1.0, 2.0, 0.0], [0.0, 1.0, 0.0]])
    times = 1 + sums @ [2.0, 2.0, 0.0] + [0.0, 1.0, -1.0, 2.0]

    def error(weights: list[float]) -> float:
        correction = fit_correction(sums, times, np.array(weights))
        return abs(float(correction.network_time(sums[3])) - float(times[3]))

    assert error([10, 1, 1, 10]) < 0.2 * error([1, 1, 1, 1])


def convolutional() -> nn.Module:
    """A network with layers that ONNX Runtime folds into a convolution, and a pool and a head, which it keeps."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.MaxPool2d(2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    ).eval()  # fmt: skip


def test_onnx_pieces_have_the_outputs_of_the_operators_with_any_number_of_channels() -> None:
    pieces = onnx_operators(trace(convolutional(), IMAGE))
    assert [piece.op._opname for piece in pieces] == [
        "convolution", "convolution", "max_pool2d_with_indices", "mean", "addmm",
    ]  # fmt: skip
    for piece in pieces:
        for counts in (piece.dense_counts, tuple(3 for _ in piece.dense_counts)):
            call = piece.make_call(counts, torch.device("cpu"))
            call()
            shape = call.args[0].copy_outputs_to_cpu()[0].shape  # type: ignore[attr-defined]
            assert list(shape) == [piece.size(size, counts) for size in piece.outputs[0]]


def activated() -> nn.Module:
    """Return a network with activations after plain, depthwise and transposed convolutions and a linear layer."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 1), nn.BatchNorm2d(16), nn.Hardswish(inplace=True), nn.Conv2d(16, 16, 3, groups=16),
        nn.LeakyReLU(0.1), nn.ReLU(), nn.ConvTranspose2d(16, 8, 2), nn.Flatten(), nn.Linear(968, 4), nn.ReLU(),
    ).eval()  # fmt: skip


def test_onnx_pieces_of_convolutions_include_their_activations() -> None:
    first, depthwise, up, head, last = onnx_operators(trace(activated(), IMAGE))
    assert [activation.op._opname for activation in first.activations] == ["hardswish_"]
    assert [activation.op._opname for activation in depthwise.activations] == ["leaky_relu", "relu"]
    assert [piece.op._opname for piece in (up, head, last)] == ["convolution", "addmm", "relu"]
    assert len({piece.signature for piece in (first, depthwise, up, head, last)}) == 5
    assert "0.1" in depthwise.signature
    inputs = torch.rand(1, 16, 12, 12)
    model, (model_input,) = depthwise.build_model((16,))
    assert model_input.shape == inputs.shape
    kinds = [node.op_type for node in onnx.load_model_from_string(model).graph.node]
    assert kinds == ["Conv", "LeakyRelu", "Relu"]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the blocked layout is that of x86")
@pytest.mark.parametrize(("count", "reordered"), [(16, True), (12, True), (15, False), (14, False)])
def test_onnx_runtime_blocks_depthwise_convolutions_of_multiples_of_four_channels(
    count: int, reordered: bool
) -> None:
    """Check the assumption behind ``multiples``, and that reordering is left out of a piece's own time."""
    _, depthwise, up, _, _ = onnx_operators(trace(activated(), IMAGE))
    assert (depthwise.multiples, up.multiples) == ((4,), (1, 1))
    kinds = [kind for kind, _ in node_times(*depthwise.build_model((count,)))]
    assert ("ReorderInput" in kinds) == reordered
    assert (depthwise.own_share((count,), torch.device("cpu")) < 1) == reordered


def test_latency_in_onnx_runtime() -> None:
    measured = LatencyTable(execution="onnx", threads=1, cuts=2).build(trace(convolutional(), IMAGE))
    assert set(measured.versions) == {"torch", "onnx", "onnxruntime"}
    assert measured.alone == []
    assert measured.correction.cuts == 2


def test_compiled_pieces_are_the_kernels_that_inductor_makes() -> None:
    """One kernel for a batch norm and the activation after it, one for each pool and contraction."""
    pieces = compiled_operators(trace(convolutional(), IMAGE))
    assert [piece.op._opname for piece in pieces] == [
        "convolution", "native_batch_norm", "convolution", "max_pool2d_with_indices", "mean", "addmm",
    ]  # fmt: skip


def test_a_network_that_cannot_be_compiled_raises_an_error_with_advice() -> None:
    class Breaks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            torch._dynamo.graph_break()
            return x + 1

    with pytest.raises(RuntimeError, match=r"torch.compile cannot run Breaks: .*execution='eager'"):
        compiled_network(Breaks(), (IMAGE,), {}, 1)


def test_every_cut_is_compiled_although_torch_caches_only_eight_per_code_object(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """For the ninth, torch.compile would silently run eagerly."""
    compiled: list[Any] = []
    real_compile = torch.compile

    def counting_backend(graph: Any, example: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    monkeypatch.setattr(
        torch, "compile", lambda fn, **options: real_compile(fn, backend=counting_backend, **options)
    )
    for width in range(1, 11):
        net = nn.Conv2d(3, width, 1)
        assert compiled_network(net, (IMAGE,), {}, 1)().shape[1] == width  # type: ignore[attr-defined]
    assert len(compiled) == 10


@pytest.mark.slow
def test_latency_when_compiled() -> None:
    correction = (
        LatencyTable(execution="compiled", threads=1, cuts=2).build(trace(convolutional(), IMAGE)).correction
    )
    assert correction.cuts == 2
    assert correction.constant + correction.even + correction.odd > 0


def test_the_time_of_an_empty_call_is_subtracted_from_each_piece() -> None:
    """In ONNX Runtime every piece is a session, but the whole network is a single one."""
    piece = operators(trace(convolutional(), IMAGE))[0]
    point = TimedPiece(piece, piece.dense_counts, times=[60.0] * 20)
    assert _curve([point], 20.0).lookup.values == (40.0,)  # type: ignore[union-attr]
    assert _curve([point], 80.0).lookup.values == (0.0,)  # type: ignore[union-attr]
    point.own_share = 0.5
    assert _curve([point], 20.0).lookup.values == (20.0,)  # type: ignore[union-attr]
