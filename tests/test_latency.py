"""Latency as a resource: what is measured, predicted and refused. No test looks at how long anything took."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from scipy.interpolate import RegularGridInterpolator
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import FilterPruningCallback, LatencyError, LatencyTable, prune_, select, trace
from lightning_prune.cli import main
from lightning_prune.compiled import compiled_operators, compiled_whole
from lightning_prune.criteria import L2, CostAware
from lightning_prune.graph import ChannelGraph
from lightning_prune.latency_build import Correction, _entry, _Point, fitted, random_units
from lightning_prune.latency_table import Measurements, load
from lightning_prune.lookup import Lookup, levels
from lightning_prune.onnx_pieces import onnx_operators
from lightning_prune.operators import operators
from lightning_prune.sizes import TracedInt

IMAGE = torch.zeros(1, 3, 12, 12)


class Mixed(nn.Module):
    """Plain, grouped, depthwise and transposed convolutions, group norm, a concatenation, a linear layer."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.Hardswish(inplace=True)
        )
        self.grouped = nn.Conv2d(width, 2 * width, 3, padding=1, groups=2)
        self.norm = nn.GroupNorm(2, 2 * width)
        self.depthwise = nn.Conv2d(2 * width, 2 * width, 3, padding=1, groups=2 * width)
        self.up = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.head = nn.Linear(2 * width, 4)

    def forward(self, x: Tensor) -> Tensor:
        early = self.stem(x)
        late = self.up(self.depthwise(torch.relu(self.norm(self.grouped(early)))))
        both = torch.cat([nn.functional.interpolate(early, scale_factor=2), late], 1)
        return self.head(both.mean((2, 3)))


def table(**given: Any) -> LatencyTable:
    return LatencyTable(**{"threads": 1, "cuts": 0, **given})


def made(graph: ChannelGraph) -> Measurements:
    return table().build(graph)


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    return Mixed().eval()


@pytest.fixture(scope="module")
def graph(net: nn.Module) -> ChannelGraph:
    return trace(net, IMAGE)


@pytest.fixture(scope="module")
def measured(graph: ChannelGraph) -> Measurements:
    return made(graph)


@pytest.fixture
def saved(measured: Measurements, tmp_path: Path) -> Path:
    path = tmp_path / "table.json"
    path.write_text(json.dumps(measured.to_dict()))
    return path


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


def test_levels_end_at_the_most_and_keep_to_steps() -> None:
    for most, step in ((1, 1), (5, 1), (64, 8), (96, 32), (1000, 1)):
        found = levels(most, step)
        assert found[-1] == most
        assert all(count % step == 0 for count in found)


def test_operators_run_with_any_number_of_channels_as_in_the_smaller_network(net: nn.Module) -> None:
    """The arguments that a template gives for the counts of a cut are those that the cut network really has."""
    graph = trace(net, IMAGE)
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


def test_no_traced_number_is_left_in_a_template(graph: ChannelGraph) -> None:
    assert not any(isinstance(leaf, TracedInt) for operator in operators(graph) for leaf in operator.leaves)


def test_identical_operators_are_measured_once() -> None:
    def stack(layers: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 8, 1), *(nn.Conv2d(8, 8, 1) for _ in range(layers)), nn.Conv2d(8, 2, 1)
        )

    few, many = made(trace(stack(2), IMAGE)), made(trace(stack(6), IMAGE))
    assert list(few.entries) == list(many.entries)
    assert few.info["points"] == many.info["points"]


def steadily_rising(measured: Measurements) -> Measurements:
    """Times made up of the channel counts: real ones of a tiny network need not fall when channels go."""
    entries = {
        kind: replace(
            entry,
            lookup=Lookup(
                entry.lookup.axes, tuple(1000.0 * math.prod(at) for at in product(*entry.lookup.axes))
            ),
        )
        for kind, entry in measured.entries.items()
    }
    return replace(measured, entries=entries, correction=Correction())


def test_a_cut_costs_what_was_predicted(
    net: nn.Module, graph: ChannelGraph, measured: Measurements, tmp_path: Path
) -> None:
    """Before and after surgery the same operators are looked up at the same counts."""
    saved = tmp_path / "rising.json"
    saved.write_text(json.dumps(steadily_rising(measured).to_dict()))
    with_time = graph.with_resources({"latency": table(path=saved)})
    gone = random_units(graph, np.random.default_rng(2))
    small = copy.deepcopy(net)
    prune_(small, trace(small, IMAGE), gone)
    after = trace(small, IMAGE).with_resources({"latency": table(path=saved)})
    assert after.cost("latency") == with_time.cost("latency", gone)
    assert after.cost("latency") < with_time.cost("latency")


def test_costs_are_those_of_the_table(graph: ChannelGraph, measured: Measurements, tmp_path: Path) -> None:
    """By hand: every operator at its own counts, corrected."""
    correction = replace(measured.correction, constant=5000.0, even=2.0, odd=3.0)
    path = tmp_path / "corrected.json"
    path.write_text(json.dumps(replace(measured, correction=correction).to_dict()))
    whole = 5000
    for operator in operators(graph):
        factor = 2.0 if all(count % 8 == 0 for count in operator.most) else 3.0
        entry = load(path).entries[operator.signature]
        whole += round(factor * entry.time(operator, *operator.most))
    assert graph.with_resources({"latency": table(path=path)}).cost("latency") == whole


def test_correction_recovers_what_it_was_made_of() -> None:
    generator = np.random.default_rng(3)
    sums = generator.uniform(1e6, 9e6, (9, 2))
    sums[0, 1] = 0.0
    found = fitted(sums, 5e5 + sums @ [1.5, 1.6])
    assert (found.constant, found.even, found.odd) == pytest.approx((5e5, 1.5, 1.6), rel=0.02)
    assert found.error is not None
    assert found.error < 0.01


def test_a_fit_holds_most_to_what_weighs_most() -> None:
    sums = np.array([[8.0, 0.0], [0.0, 4.0], [1.0, 2.0], [0.0, 1.0]])
    times = 1 + sums @ [2.0, 2.0] + [0.0, 1.0, -1.0, 2.0]

    def error(weights: list[float]) -> float:
        found = fitted(sums, times, np.array(weights))
        return abs(found.constant + float(sums[3] @ [found.even, found.odd]) - float(times[3]))

    assert error([10, 1, 1, 10]) < 0.2 * error([1, 1, 1, 1])


def test_a_table_is_refitted_to_the_cut_that_is_wanted(graph: ChannelGraph) -> None:
    known = table(cuts=1)
    with pytest.raises(ValueError, match="nothing is measured yet"):
        known.refit(graph, [])
    before = known.build(graph)
    correction = known.refit(graph, random_units(graph, np.random.default_rng(4)))
    assert correction.cuts == 2
    assert known.measured == replace(before, correction=correction)


def test_whole_networks_are_measured_and_the_traced_one_is_left_alone(net: nn.Module) -> None:
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    found = table(cuts=3).build(trace(net, IMAGE))
    assert found.correction.cuts == 3
    assert found.correction.constant + found.correction.even + found.correction.odd > 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_a_table_is_built_once_and_reused(graph: ChannelGraph, tmp_path: Path) -> None:
    first = graph.with_resources({"latency": table(path=tmp_path / "folder")})
    (file,) = (tmp_path / "folder").iterdir()
    written = file.stat().st_mtime_ns
    again = graph.with_resources({"latency": table(path=tmp_path / "folder")})
    assert first.cost("latency") == again.cost("latency")
    assert file.stat().st_mtime_ns == written


@pytest.mark.parametrize(
    ("apart", "told"),
    [
        ({"device": "cuda: Another"}, "device 'cuda: Another', here it is 'cpu: "),
        ({"threads": 7}, "threads 7, here it is 1"),
        ({"versions": {"torch": "1.0"}}, "versions {'torch': '1.0'}, here it is "),
    ],
)
def test_a_table_of_another_place_is_refused(
    graph: ChannelGraph, saved: Path, apart: dict[str, Any], told: str
) -> None:
    saved.write_text(json.dumps({**json.loads(saved.read_text()), **apart}))
    with pytest.raises(LatencyError, match="build a table of your own") as error:
        graph.with_resources({"latency": table(path=saved)})
    assert told in str(error.value)
    assert graph.with_resources({"latency": table(path=saved, elsewhere=True)}).cost("latency") > 0


def test_a_table_of_another_network_is_refused(net: nn.Module, saved: Path) -> None:
    others = {
        "for inputs": trace(net, torch.zeros(1, 3, 16, 16)),
        "it lacks 3 of 3 operators, aten::convolution": trace(
            nn.Sequential(nn.Conv2d(3, 8, 5), nn.ReLU(), nn.Conv2d(8, 4, 3)), IMAGE
        ),
        "16 channels, measured were up to 8": trace(Mixed(16), IMAGE),
    }
    for told, graph in others.items():
        with pytest.raises(LatencyError, match=told):
            graph.with_resources({"latency": table(path=saved)})


def test_a_grouped_convolution_with_one_channel_left_per_group(net: nn.Module, saved: Path) -> None:
    """It looks like a depthwise one then, which the table does not know; training must go on."""
    small = copy.deepcopy(net)
    graph = trace(small, IMAGE)
    units = np.unique(graph.layers["stem.0.weight"])
    prune_(small, graph, units[1:])
    with pytest.warns(UserWarning, match=r"lacks 1 of 12 operators, .*grouped\.weight'; they"):
        after = trace(small, IMAGE).with_resources({"latency": table(path=saved)})
    assert after.cost("latency") > 0


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "is not JSON"),
        ("[]", "not a latency table"),
        ('{"version": 1}', "damaged latency table"),
        ("entries", "damaged latency table"),
    ],
)
def test_a_damaged_table_is_refused(graph: ChannelGraph, saved: Path, text: str, told: str) -> None:
    if text == "entries":
        plain = json.loads(saved.read_text())
        next(iter(plain["entries"].values()))["ns"].pop()
        text = json.dumps(plain)
    saved.write_text(text)
    with pytest.raises(LatencyError, match=told):
        graph.with_resources({"latency": table(path=saved)})


@pytest.mark.parametrize(
    "given", [{"execution": "fast"}, {"cuts": -1}, {"threads": 0}, {"cuts": 1, "execution": "compiled"}]
)
def test_arguments_that_make_no_sense(given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(given))):
        LatencyTable(**given)


def test_a_graph_made_by_hand_has_no_operators() -> None:
    with pytest.raises(ValueError, match="made by trace"):
        ChannelGraph(0, {}, {}, {}, {}, {}).with_resources({"latency": table()})


def slower(measured: Measurements) -> Measurements:
    """Nothing but what grows with channels, so that tests do not hang on the machine."""
    return replace(
        measured,
        entries={
            kind: replace(
                each,
                lookup=Lookup(
                    each.lookup.axes, tuple(1000.0 * (n + 1) for n in range(len(each.lookup.values)))
                ),
            )
            for kind, each in measured.entries.items()
        },
    )


def test_budgets_sensitivity_and_criteria_in_time(
    net: nn.Module, graph: ChannelGraph, measured: Measurements
) -> None:
    known = table()
    known.measured = slower(measured)
    timed = graph.with_resources({"latency": known})
    plan = select(timed, L2()(timed, net, {}), {"latency": 0.85})
    assert plan.reached
    assert (
        timed.cost("latency", plan.remove)
        <= 0.85 * timed.cost("latency")
        < timed.cost("latency", plan.remove[:-1])
    )
    scores = CostAware(L2(), resources={"latency": 1.0})(timed, net, {})
    assert np.isfinite(scores[timed.prunable]).all()
    with pytest.raises(ValueError, match=r"latency=0.01 cannot be met: .* keep at least"):
        select(timed, L2()(timed, net, {}), {"latency": 0.01})


class Trained(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = Mixed()
        self.example_input_array = IMAGE

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, index: int) -> Tensor:
        return self(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.01)


@pytest.mark.filterwarnings("ignore:the latency table does not fit quite")
def test_the_callback_prunes_to_a_latency(measured: Measurements, tmp_path: Path) -> None:
    known = table()
    known.measured = slower(measured)
    pruning = FilterPruningCallback(
        {"latency": 0.7}, resources={"latency": known}, amount={"latency": 0.2}, start_epoch=0
    )
    data = DataLoader(TensorDataset(torch.rand(4, 3, 12, 12)), 2)
    trainer = L.Trainer(
        max_epochs=3, callbacks=[pruning], default_root_dir=tmp_path, accelerator="cpu", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Trained(), data)
    assert pruning.history[-1].share["latency"] <= 0.7


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
    point = _Point(piece, piece.most, times=[50.0, 70.0, 60.0])
    assert _entry([point], 20.0).lookup.values == (40.0,)  # type: ignore[union-attr]
    assert _entry([point], 80.0).lookup.values == (0.0,)  # type: ignore[union-attr]


def test_the_command_writes_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    given = ["net=unet_small", "data.size=32"]
    monkeypatch.setattr(
        "sys.argv",
        ["lightning-prune", "latency", str(tmp_path / "t.json"), *given, "--cuts=0", "--threads=1"],
    )
    main()
    assert "points in" in capsys.readouterr().out
    assert load(tmp_path / "t.json").inputs[0][0]["shape"][-1] == 32
    monkeypatch.setattr("sys.argv", ["lightning-prune", "latency", "t.json", "net=nothing"])
    with pytest.raises(SystemExit, match=r"latency: .*nothing"):
        main()
