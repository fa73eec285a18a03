"""The criteria beside IPAD, each against another library or the same thing done the long way."""

from __future__ import annotations

import copy
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import FilterPruningCallback, trace
from lightning_prune.criteria import (
    FPGM,
    L1,
    L2,
    LAMP,
    ActivationMean,
    CostAware,
    Deviation,
    Normalised,
    NormScale,
    Propagated,
    Random,
    TaylorGate,
    TaylorWeight,
    marginal_costs,
    propagate,
)
from tests.support.nets import Net, Small

tp = pytest.importorskip("torch_pruning")
LAYERS = ("inner", "mix", "hidden")  # each in a group of its own


@pytest.fixture
def net() -> Small:
    torch.manual_seed(0)
    net = Small()
    for norm in (net.norm, net.mix_norm):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    return net


@pytest.fixture
def graph(net):
    return trace(net, torch.randn(2, 3, 8, 8))


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def theirs(net: nn.Module, layer: nn.Module, importance: Any) -> np.ndarray:
    dependency = tp.DependencyGraph().build_dependency(net, example_inputs=torch.randn(2, 3, 8, 8))
    linear = isinstance(layer, nn.Linear)
    prune = tp.prune_linear_out_channels if linear else tp.prune_conv_out_channels
    width = layer.out_features if linear else layer.out_channels
    return importance(dependency.get_pruning_group(layer, prune, idxs=list(range(width)))).numpy()


def backward(net: nn.Module, x: Tensor) -> None:
    F.cross_entropy(net(x), torch.tensor([0, 1, 0, 1])).backward()


def gathered(criterion: Any, graph: Any, net: nn.Module, x: Tensor) -> dict[str, np.ndarray]:
    gradients = criterion.observer(graph, net)
    backward(net, x)
    gradients.on_step(net.parameters())
    return gradients.compute()


@pytest.mark.parametrize("layer", LAYERS)
def test_fpgm_equals_torch_prunings(net, graph, layer):
    """Theirs takes distances of ``|w| ** p``; with p=1 and no negative weight those are the distances of w."""
    for parameter in net.parameters():
        parameter.data.abs_()
    importance = tp.importance.FPGMImportance(p=1, group_reduction="first", normalizer=None)
    units = graph.layers[f"{layer}.weight"]
    expected = theirs(net, net.get_submodule(layer), importance)
    np.testing.assert_allclose(FPGM()(graph, net)[units], expected, rtol=1e-4)


@pytest.mark.parametrize("layer", LAYERS)
def test_lamp_equals_torch_prunings(net, graph, layer):
    importance = tp.importance.LAMPImportance(group_reduction="first")
    units = graph.layers[f"{layer}.weight"]
    expected = theirs(net, net.get_submodule(layer), importance)
    np.testing.assert_allclose(LAMP()(graph, net)[units], expected, rtol=1e-5)


@pytest.mark.parametrize("layer", LAYERS)
def test_taylor_equals_torch_prunings(net, graph, x, layer):
    criterion = TaylorWeight(p=1)
    found = criterion(graph, net, gathered(criterion, graph, net, x))
    importance = tp.importance.TaylorImportance(group_reduction="first", normalizer=None)
    expected = theirs(net, net.get_submodule(layer), importance)
    np.testing.assert_allclose(found[graph.layers[f"{layer}.weight"]], expected, rtol=1e-4)


@pytest.mark.parametrize("layer", ["inner", "hidden"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "max"])
def test_everything_bound_to_a_unit_is_what_torch_pruning_takes(net, graph, layer, reduction):
    """With p=1 there is no root between the two."""
    importance = tp.importance.GroupMagnitudeImportance(p=1, group_reduction=reduction, normalizer=None)
    expected = theirs(net, net.get_submodule(layer), importance)
    found = L1(scope="bound", reduction=reduction)(graph, net)[graph.layers[f"{layer}.weight"]]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("layer", ["stem", "mix"])
def test_a_residual_stream_s_units_sum_what_torch_pruning_sums(net, graph, layer):
    """Over norms, concatenation and flattening as well; they leave out depthwise filters."""
    importance = tp.importance.GroupMagnitudeImportance(p=1, group_reduction="sum", normalizer=None)
    expected = theirs(net, net.get_submodule(layer), importance)
    depthwise = net.depthwise.weight.detach().abs().sum((1, 2, 3)).numpy() if layer == "stem" else 0
    found = L1(scope="bound", reduction="sum")(graph, net)[graph.layers[f"{layer}.weight"]]
    np.testing.assert_allclose(found, expected + depthwise, rtol=1e-5)


def test_taylor_over_everything_bound_equals_autograd(net, graph, x):
    criterion = TaylorWeight(p=2, scope="bound", reduction="sum")
    found = criterion(graph, net, gathered(criterion, graph, net, x))
    units = graph.layers["inner.weight"]
    inner, back = net.inner.weight, net.back.weight
    own, read = (inner * inner.grad).square().sum((1, 2, 3)), (back * back.grad).square().sum((0, 2, 3))
    np.testing.assert_allclose(found[units], (own + read).detach(), rtol=1e-4)


def test_a_gate_s_gradient_equals_that_of_a_real_gate(net, graph, x):
    """Gates put in by hand after the norms, and on the outputs of layers without one; two steps."""
    criterion = TaylorGate(reduction="sum")
    gradients, expected = (
        criterion.observer(graph, net),
        dict.fromkeys(["norm", "mix_norm", "inner", "hidden"], 0),
    )
    for batch in (x, x.flip(0) + 0.5):
        net.zero_grad()
        backward(net, batch)
        gradients.on_step(net.parameters())
        gates = {}
        for name in expected:
            shape = (1, -1, 1, 1) if name != "hidden" else (1, -1)
            width = graph.layers.get(f"{name}.weight", graph.bindings[f"{name}.weight"][0])
            gates[name] = torch.ones(len(width), requires_grad=True)
            net.get_submodule(name).register_forward_hook(
                lambda module, args, out, gate=gates[name], shape=shape: out * gate.view(shape)
            )
        F.cross_entropy(net(batch), torch.tensor([0, 1, 0, 1])).backward()
        for name, gate in gates.items():
            expected[name] = expected[name] + gate.grad.square().numpy()
            net.get_submodule(name)._forward_hooks.clear()
    found = criterion(graph, net, gradients.compute())
    for name, value in expected.items():
        units = graph.bindings[f"{name}.weight"][0]
        np.testing.assert_allclose(found[units], value, rtol=2e-3, atol=1e-9, err_msg=name)


def test_norm_scale_is_gamma_and_units_without_one_stay(net, graph):
    found = NormScale()(graph, net)
    gamma = net.mix_norm.weight.detach().abs()
    np.testing.assert_allclose(found[graph.layers["mix.weight"]], gamma)
    np.testing.assert_allclose(found[graph.layers["stem.weight"]], net.norm.weight.detach().abs())
    assert np.isinf(found[graph.layers["inner.weight"]]).all()
    plain = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1))
    with pytest.raises(ValueError, match="no filter of this network passes through one"):
        NormScale()(trace(plain, torch.zeros(1, 3, 4, 4)), plain)


def test_activation_mean_is_that_of_all_batches(net, graph, x):
    criterion, batches, seen = ActivationMean(), [x, x[:1] * 3], []
    net.inner.register_forward_hook(lambda module, args, out: seen.append(out.detach()))
    with criterion.observer(graph, net) as collector:
        for batch in batches:
            net(batch)
    found = criterion(graph, net, collector.compute())[graph.layers["inner.weight"]]
    np.testing.assert_allclose(found, torch.cat(seen).abs().mean((0, 2, 3)), rtol=1e-5)
    with pytest.raises(ValueError, match="did any batch run"):
        criterion(graph, net, {})


def test_marginal_costs_are_differences_of_costs(graph):
    for resource in ("macs", "params"):
        found = marginal_costs(graph, resource)
        exact = [graph.cost(resource) - graph.cost(resource, [unit]) for unit in graph.prunable]
        np.testing.assert_allclose(found[graph.prunable], exact)


def test_cost_awareness_divides_by_weighted_shares(net, graph):
    base = L2()(graph, net)
    found = CostAware(L2(), gamma=0.5, resources={"macs": 2, "params": 1})(graph, net)
    share = {r: marginal_costs(graph, r) / graph.cost(r) for r in ("macs", "params")}
    units = graph.prunable
    expected = base[units] / np.sqrt(2 * share["macs"] + share["params"])[units]
    np.testing.assert_allclose(found[units], expected)
    np.testing.assert_allclose(CostAware(L2(), gamma=0)(graph, net)[units], base[units])
    with pytest.raises(ValueError, match="0 or more"):
        CostAware(lambda *_: -base)(graph, net)
    with pytest.raises(ValueError, match="unknown resource"):
        CostAware(L2(), resources={"seconds": 1})(graph, net)


@pytest.mark.parametrize("bad", [{"gamma": -1}, {"resources": {"macs": -1}}, {"resources": {}}])
def test_bad_arguments_of_cost_awareness(bad):
    with pytest.raises(ValueError, match="must be 0 or more"):
        CostAware(L2(), **bad)


def test_normalisation_makes_means_one(net, graph):
    layer = L2(normalise="layer")(graph, net)
    group = L2(normalise="group")(graph, net)
    whole = L2(normalise="global")(graph, net)
    tied = np.unique(graph.layers["stem.weight"])  # with back and depthwise: three layers, one group
    for name in ("inner.weight", "mix.weight", "hidden.weight"):
        assert layer[graph.layers[name]].mean() == pytest.approx(1)
        assert group[graph.layers[name]].mean() == pytest.approx(1)
    assert group[tied].mean() == pytest.approx(1)
    norms = {name: L2()(graph, net)[units] for name, units in graph.layers.items()}
    assert whole[np.isfinite(whole)].mean() == pytest.approx(1)
    assert norms["mix.weight"].mean() != pytest.approx(1, abs=0.01)
    wrapped = Normalised(lambda graph, model, statistics: L2()(graph, model), by="group")
    np.testing.assert_allclose(wrapped(graph, net), group)


def propagated(net: nn.Module, *shape: int) -> tuple[Any, np.ndarray]:
    graph = trace(net, torch.randn(*shape))
    return graph, propagate(graph, net, np.ones(graph.num_units), weight=1.0)


def shares(weight: Tensor) -> np.ndarray:
    flat = weight.detach().abs().flatten(2).sum(2) if weight.dim() > 2 else weight.detach().abs()
    return (flat / flat.sum(1, keepdim=True)).double().numpy()


def test_importance_is_handed_down_a_chain_registered_in_any_order():
    c, a, b = nn.Conv2d(6, 2, 1), nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, 1)
    net = Net(lambda self, x: self.c(self.b(self.a(x))), c=c, a=a, b=b)
    graph, found = propagated(net, 1, 3, 8, 8)
    of_b = np.ones(2) @ shares(c.weight)
    np.testing.assert_allclose(found[graph.layers["b.weight"]], of_b, rtol=1e-5)
    np.testing.assert_allclose(found[graph.layers["a.weight"]], of_b @ shares(b.weight), rtol=1e-5)


def test_importance_is_handed_through_concatenation_residual_depthwise_and_groups():
    def run(self: Any, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.back(self.inner(x))
        return self.head(self.grouped(torch.cat([self.depthwise(x), self.side(x)], 1)))

    parts = {
        "head": nn.Conv2d(4, 3, 1),
        "stem": nn.Conv2d(3, 4, 1),
        "inner": nn.Conv2d(4, 5, 1),
        "back": nn.Conv2d(5, 4, 1),
        "depthwise": nn.Conv2d(4, 4, 3, padding=1, groups=4),
        "side": nn.Conv2d(4, 4, 1),
        "grouped": nn.Conv2d(8, 4, 1, groups=2),
    }
    net = Net(run, **parts)
    graph, found = propagated(net, 1, 3, 8, 8)
    weight = {name: shares(part.weight) for name, part in parts.items()}
    reads = np.ones(3) @ weight["head"]  # of the four filters of `grouped`, which live and die in pairs
    unit = np.unique(graph.layers["grouped.weight"])
    of_grouped = found[graph.layers["grouped.weight"]]
    np.testing.assert_allclose(found[unit].sum(), reads.sum(), rtol=1e-5)
    handed = of_grouped @ weight["grouped"]
    assert handed.sum() == pytest.approx(of_grouped.sum())
    # Everything that the stream's readers matter, it matters; and what `inner` got, it hands on again.
    assert found[graph.layers["inner.weight"]].sum() > 0
    assert (found[graph.layers["stem.weight"]] > 0).all()


def test_importance_reaches_what_attention_reads():
    from tests.support.nets import Attention

    net = Net(lambda self, x: self.out(self.attention(self.embed(x))), embed=nn.Linear(5, 12),
              attention=Attention(), out=nn.Linear(12, 3))  # fmt: skip
    graph, found = propagated(net, 2, 7, 5)
    out = np.ones(3) @ shares(net.out.weight)
    np.testing.assert_allclose(found[graph.layers["attention.proj.weight"]], out, rtol=1e-5)
    assert (found[graph.layers["embed.weight"]] > 0).all()


def test_propagation_mixes_by_its_weight(net, graph):
    base = L2()(graph, net)
    alone = Propagated(L2(), weight=0.0)(graph, net)
    finite = np.isfinite(base)
    np.testing.assert_allclose(alone[finite], (base / base[finite].mean())[finite])
    mixed = Propagated(L2(), weight=0.3)(graph, net)
    hidden, head = graph.layers["hidden.weight"], graph.layers["head.weight"]
    own = np.where(finite, base / base[finite].mean(), 1.0)
    expected = 0.7 * own[hidden] + 0.3 * (own[head] @ shares(net.head.weight))
    np.testing.assert_allclose(mixed[hidden], expected, rtol=1e-5)
    with pytest.raises(ValueError, match="weight must lie"):
        Propagated(L2(), weight=1.5)


class Regression(L.LightningModule):
    """Small, trained; it notes by itself what Taylor should find."""

    def __init__(self, frozen: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net, self.scale = Small(), nn.Linear(2, 2)
        self.net.requires_grad_(not frozen)
        self.example_input_array = torch.randn(2, 3, 8, 8)
        self.backwards, self.expected = 0, 0.0

    def forward(self, x: Tensor) -> Tensor:
        return self.scale(self.net(x))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def on_after_backward(self) -> None:
        self.backwards += 1

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        weight = self.net.inner.weight
        if weight.grad is not None:
            self.expected = self.expected + (weight * weight.grad).square().sum((1, 2, 3)).detach()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def fit(criterion: Any, module: Regression, **options: Any) -> FilterPruningCallback:
    callback = FilterPruningCallback(
        {"macs": 0.92}, start_epoch=0, criterion=criterion, submodule="net", verbose=False
    )
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(12, 3, 8, 8, generator=generator), torch.arange(12) % 2)
    quiet = dict.fromkeys(
        ["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"], False
    )
    trainer = L.Trainer(max_epochs=1, callbacks=[callback], accelerator="cpu", **quiet, **options)
    trainer.fit(module, DataLoader(data, batch_size=2))
    return callback


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
class TestInTraining:
    def test_taylor_takes_the_gradients_of_the_steps_and_runs_nothing(self):
        seen, inner = [], TaylorWeight()

        class Spy(TaylorWeight):
            def __call__(self, graph, model, statistics=None):
                seen.append(inner(graph, model, statistics)[graph.layers["inner.weight"]])
                return inner(graph, model, statistics)

        module = Regression()
        callback = fit(Spy(), module, accumulate_grad_batches=2, gradient_clip_val=0.01)
        assert module.backwards == 6
        assert len(callback.history) == 1
        assert module.net.inner.weight.shape[0] <= 6
        np.testing.assert_allclose(seen[0], module.expected, rtol=1e-5)

    @pytest.mark.parametrize(
        "criterion",
        [
            TaylorGate(),
            ActivationMean(),
            Deviation(p=2),
            FPGM(),
            LAMP(),
            Propagated(TaylorWeight(scope="bound"), 0.5),
            CostAware(Propagated(lambda g, m, s: L1()(g, m))),
            Normalised(lambda g, m, s: torch.rand(g.num_units, requires_grad=True)),
        ],
    )
    def test_each_prunes(self, criterion):
        assert len(fit(criterion, Regression()).history) == 1

    @pytest.mark.parametrize(
        ("criterion", "message"),
        [
            (lambda g, m, s: np.ones(3), "importance must have shape"),
            (lambda g, m, s: np.full(g.num_units, np.nan), "importance is NaN for"),
            (CostAware(lambda g, m, s: np.full(g.num_units, np.nan)), "importance is NaN for"),
            (Propagated(lambda g, m, s: np.ones((2, 2))), "importance must have shape"),
        ],
    )
    def test_a_function_that_returns_nonsense_changes_nothing(self, criterion, message):
        module = Regression()
        shapes = {name: p.shape for name, p in module.named_parameters()}
        with pytest.raises(ValueError, match=message):
            fit(criterion, module)
        assert {name: p.shape for name, p in module.named_parameters()} == shapes

    @pytest.mark.parametrize("criterion", [TaylorWeight(), TaylorGate(), CostAware(TaylorWeight())])
    def test_missing_gradients_say_what_to_do_and_change_nothing(self, criterion):
        module = Regression(frozen=True)
        before = copy.deepcopy(module.net.state_dict())
        with pytest.raises(ValueError, match="unfreeze the layers to prune"):
            fit(criterion, module)
        for name, tensor in module.net.state_dict().items():
            assert tensor.shape == before[name].shape


def test_gradients_go_on_from_a_checkpoint_and_skip_what_is_not_finite(net, graph, x):
    criterion = TaylorWeight()
    first, second = criterion.observer(graph, net), criterion.observer(graph, net)
    backward(net, x)
    first.on_step(net.parameters())
    second.load(copy.deepcopy(first.state()))
    net.inner.weight.grad.fill_(float("inf"))
    second.on_step([net.inner.weight])
    name = "inner.weight:0"
    np.testing.assert_array_equal(second.compute()[name], first.compute()[name])
    with pytest.raises(ValueError, match="gradients of"):
        second.load({"sums": {"other": torch.zeros(1)}, "steps": {}})


def test_random_with_a_wrapper_is_still_reproducible(net, graph):
    wrapped = Normalised(Random(3), "global")
    assert np.array_equal(wrapped(graph, net), wrapped(graph, net))
