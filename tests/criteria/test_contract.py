"""Tests that each criterion agrees with Torch-Pruning or with a direct computation, alone and in training."""

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
LAYERS = ("inner", "mix", "hidden")  # no layer is coupled to another one


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


def torch_pruning_scores(net: nn.Module, layer: nn.Module, importance: Any) -> np.ndarray:
    """Return the scores of the filters of ``layer`` by an importance of Torch-Pruning."""
    dependency = tp.DependencyGraph().build_dependency(net, example_inputs=torch.randn(2, 3, 8, 8))
    linear = isinstance(layer, nn.Linear)
    prune = tp.prune_linear_out_channels if linear else tp.prune_conv_out_channels
    width = layer.out_features if linear else layer.out_channels
    return importance(dependency.get_pruning_group(layer, prune, idxs=list(range(width)))).numpy()


def backward(net: nn.Module, x: Tensor) -> None:
    F.cross_entropy(net(x), torch.tensor([0, 1, 0, 1])).backward()


def observed_statistics(criterion: Any, graph: Any, net: nn.Module, x: Tensor) -> dict[str, np.ndarray]:
    observer = criterion.observer(graph, net)
    backward(net, x)
    observer.on_step(net.parameters())
    return observer.compute()


@pytest.mark.parametrize("layer", LAYERS)
def test_fpgm_equals_torch_pruning(net, graph, layer):
    """Torch-Pruning uses distances of ``|w| ** p``: with p=1 and no negative weight, those of w."""
    for parameter in net.parameters():
        parameter.data.abs_()
    importance = tp.importance.FPGMImportance(p=1, group_reduction="first", normalizer=None)
    units = graph.layers[f"{layer}.weight"]
    expected = torch_pruning_scores(net, net.get_submodule(layer), importance)
    np.testing.assert_allclose(FPGM()(graph, net)[units], expected, rtol=1e-4)


@pytest.mark.parametrize("layer", LAYERS)
def test_lamp_equals_torch_pruning(net, graph, layer):
    importance = tp.importance.LAMPImportance(group_reduction="first")
    units = graph.layers[f"{layer}.weight"]
    expected = torch_pruning_scores(net, net.get_submodule(layer), importance)
    np.testing.assert_allclose(LAMP()(graph, net)[units], expected, rtol=1e-5)


@pytest.mark.parametrize("layer", LAYERS)
def test_taylor_equals_torch_pruning(net, graph, x, layer):
    criterion = TaylorWeight(p=1)
    scores = criterion(graph, net, observed_statistics(criterion, graph, net, x))
    importance = tp.importance.TaylorImportance(group_reduction="first", normalizer=None)
    expected = torch_pruning_scores(net, net.get_submodule(layer), importance)
    np.testing.assert_allclose(scores[graph.layers[f"{layer}.weight"]], expected, rtol=1e-4)


@pytest.mark.parametrize("layer", ["inner", "hidden"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "max"])
def test_the_scope_bound_covers_the_tensors_that_torch_pruning_covers(net, graph, layer, reduction):
    """With p=1 the missing root of Torch-Pruning makes no difference."""
    importance = tp.importance.GroupMagnitudeImportance(p=1, group_reduction=reduction, normalizer=None)
    expected = torch_pruning_scores(net, net.get_submodule(layer), importance)
    scores = L1(scope="bound", reduction=reduction)(graph, net)[graph.layers[f"{layer}.weight"]]
    np.testing.assert_allclose(scores, expected, rtol=1e-5)


@pytest.mark.parametrize("layer", ["stem", "mix"])
def test_units_of_a_residual_stream_sum_the_tensors_that_torch_pruning_sums(net, graph, layer):
    """Norms, concatenation and flattening are included; Torch-Pruning leaves out depthwise filters."""
    importance = tp.importance.GroupMagnitudeImportance(p=1, group_reduction="sum", normalizer=None)
    expected = torch_pruning_scores(net, net.get_submodule(layer), importance)
    depthwise = net.depthwise.weight.detach().abs().sum((1, 2, 3)).numpy() if layer == "stem" else 0
    scores = L1(scope="bound", reduction="sum")(graph, net)[graph.layers[f"{layer}.weight"]]
    np.testing.assert_allclose(scores, expected + depthwise, rtol=1e-5)


def test_taylor_with_scope_bound_equals_autograd(net, graph, x):
    criterion = TaylorWeight(p=2, scope="bound", reduction="sum")
    scores = criterion(graph, net, observed_statistics(criterion, graph, net, x))
    units = graph.layers["inner.weight"]
    inner, back = net.inner.weight, net.back.weight
    filters, readers = (
        (inner * inner.grad).square().sum((1, 2, 3)),
        (back * back.grad).square().sum((0, 2, 3)),
    )
    np.testing.assert_allclose(scores[units], (filters + readers).detach(), rtol=1e-4)


def test_a_computed_gate_gradient_equals_that_of_a_real_gate(net, graph, x):
    """Gates are inserted after the norms, and after layers without a norm; two steps."""
    criterion = TaylorGate(reduction="sum")
    observer, expected = (
        criterion.observer(graph, net),
        dict.fromkeys(["norm", "mix_norm", "inner", "hidden"], 0),
    )
    for batch in (x, x.flip(0) + 0.5):
        net.zero_grad()
        backward(net, batch)
        observer.on_step(net.parameters())
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
    scores = criterion(graph, net, observer.compute())
    for name, value in expected.items():
        units = graph.bindings[f"{name}.weight"][0]
        np.testing.assert_allclose(scores[units], value, rtol=2e-3, atol=1e-9, err_msg=name)


def test_norm_scale_is_gamma_and_units_without_a_norm_are_never_removed(net, graph):
    scores = NormScale()(graph, net)
    gamma = net.mix_norm.weight.detach().abs()
    np.testing.assert_allclose(scores[graph.layers["mix.weight"]], gamma)
    np.testing.assert_allclose(scores[graph.layers["stem.weight"]], net.norm.weight.detach().abs())
    assert np.isinf(scores[graph.layers["inner.weight"]]).all()
    plain = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1))
    with pytest.raises(ValueError, match="no filter of this network passes through one"):
        NormScale()(trace(plain, torch.zeros(1, 3, 4, 4)), plain)


def test_activation_mean_is_the_mean_over_all_batches(net, graph, x):
    criterion, batches, outputs = ActivationMean(), [x, x[:1] * 3], []
    net.inner.register_forward_hook(lambda module, args, out: outputs.append(out.detach()))
    with criterion.observer(graph, net) as collector:
        for batch in batches:
            net(batch)
    scores = criterion(graph, net, collector.compute())[graph.layers["inner.weight"]]
    np.testing.assert_allclose(scores, torch.cat(outputs).abs().mean((0, 2, 3)), rtol=1e-5)
    with pytest.raises(ValueError, match="did any batch run"):
        criterion(graph, net, {})


def test_marginal_costs_are_differences_of_costs(graph):
    for resource in ("macs", "params"):
        costs = marginal_costs(graph, resource)
        exact = [graph.cost(resource) - graph.cost(resource, [unit]) for unit in graph.prunable]
        np.testing.assert_allclose(costs[graph.prunable], exact)


def test_cost_awareness_divides_by_weighted_shares(net, graph):
    base = L2()(graph, net)
    scores = CostAware(L2(), gamma=0.5, resources={"macs": 2, "params": 1})(graph, net)
    share = {r: marginal_costs(graph, r) / graph.cost(r) for r in ("macs", "params")}
    units = graph.prunable
    expected = base[units] / np.sqrt(2 * share["macs"] + share["params"])[units]
    np.testing.assert_allclose(scores[units], expected)
    np.testing.assert_allclose(CostAware(L2(), gamma=0)(graph, net)[units], base[units])
    with pytest.raises(ValueError, match="0 or more"):
        CostAware(lambda *_: -base)(graph, net)
    with pytest.raises(ValueError, match="unknown resource"):
        CostAware(L2(), resources={"seconds": 1})(graph, net)


@pytest.mark.parametrize("bad", [{"gamma": -1}, {"resources": {"macs": -1}}, {"resources": {}}])
def test_bad_arguments_of_cost_awareness(bad):
    with pytest.raises(ValueError, match="must be 0 or more"):
        CostAware(L2(), **bad)


def test_normalisation_makes_the_means_1(net, graph):
    layer = L2(normalise="layer")(graph, net)
    group = L2(normalise="group")(graph, net)
    over_network = L2(normalise="global")(graph, net)
    coupled = np.unique(graph.layers["stem.weight"])  # of stem, back and depthwise, which are one group
    for name in ("inner.weight", "mix.weight", "hidden.weight"):
        assert layer[graph.layers[name]].mean() == pytest.approx(1)
        assert group[graph.layers[name]].mean() == pytest.approx(1)
    assert group[coupled].mean() == pytest.approx(1)
    norms = {name: L2()(graph, net)[units] for name, units in graph.layers.items()}
    assert over_network[np.isfinite(over_network)].mean() == pytest.approx(1)
    assert norms["mix.weight"].mean() != pytest.approx(1, abs=0.01)
    wrapped = Normalised(lambda graph, model, statistics: L2()(graph, model), by="group")
    np.testing.assert_allclose(wrapped(graph, net), group)


def propagated(net: nn.Module, *shape: int) -> tuple[Any, np.ndarray]:
    graph = trace(net, torch.randn(*shape))
    return graph, propagate(graph, net, np.ones(graph.num_units), weight=1.0)


def shares(weight: Tensor) -> np.ndarray:
    flat = weight.detach().abs().flatten(2).sum(2) if weight.dim() > 2 else weight.detach().abs()
    return (flat / flat.sum(1, keepdim=True)).double().numpy()


def test_importance_is_propagated_through_a_chain_registered_in_any_order():
    c, a, b = nn.Conv2d(6, 2, 1), nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, 1)
    net = Net(lambda self, x: self.c(self.b(self.a(x))), c=c, a=a, b=b)
    graph, scores = propagated(net, 1, 3, 8, 8)
    of_b = np.ones(2) @ shares(c.weight)
    np.testing.assert_allclose(scores[graph.layers["b.weight"]], of_b, rtol=1e-5)
    np.testing.assert_allclose(scores[graph.layers["a.weight"]], of_b @ shares(b.weight), rtol=1e-5)


def test_importance_is_propagated_through_concatenation_residual_depthwise_and_groups():
    def forward(self: Any, x: Tensor) -> Tensor:
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
    net = Net(forward, **parts)
    graph, scores = propagated(net, 1, 3, 8, 8)
    weight = {name: shares(part.weight) for name, part in parts.items()}
    head_shares = np.ones(3) @ weight["head"]  # for the 4 filters of `grouped`, which are removed in pairs
    unit = np.unique(graph.layers["grouped.weight"])
    of_grouped = scores[graph.layers["grouped.weight"]]
    np.testing.assert_allclose(scores[unit].sum(), head_shares.sum(), rtol=1e-5)
    propagated_shares = of_grouped @ weight["grouped"]
    assert propagated_shares.sum() == pytest.approx(of_grouped.sum())
    # The stream gets importance from all its readers; `inner` passes its importance on to the stream.
    assert scores[graph.layers["inner.weight"]].sum() > 0
    assert (scores[graph.layers["stem.weight"]] > 0).all()


def test_importance_is_propagated_to_the_inputs_of_attention():
    from tests.support.nets import Attention

    net = Net(lambda self, x: self.out(self.attention(self.embed(x))), embed=nn.Linear(5, 12),
              attention=Attention(), out=nn.Linear(12, 3))  # fmt: skip
    graph, scores = propagated(net, 2, 7, 5)
    out = np.ones(3) @ shares(net.out.weight)
    np.testing.assert_allclose(scores[graph.layers["attention.proj.weight"]], out, rtol=1e-5)
    assert (scores[graph.layers["embed.weight"]] > 0).all()


def test_propagated_importance_is_mixed_by_its_weight(net, graph):
    base = L2()(graph, net)
    alone = Propagated(L2(), weight=0.0)(graph, net)
    finite = np.isfinite(base)
    np.testing.assert_allclose(alone[finite], (base / base[finite].mean())[finite])
    mixed = Propagated(L2(), weight=0.3)(graph, net)
    hidden, head = graph.layers["hidden.weight"], graph.layers["head.weight"]
    base_or_1 = np.where(finite, base / base[finite].mean(), 1.0)
    expected = 0.7 * base_or_1[hidden] + 0.3 * (base_or_1[head] @ shares(net.head.weight))
    np.testing.assert_allclose(mixed[hidden], expected, rtol=1e-5)
    with pytest.raises(ValueError, match="weight must lie"):
        Propagated(L2(), weight=1.5)


class Regression(L.LightningModule):
    """A small trained network that computes the Taylor scores of one layer by itself."""

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
    """Train one epoch that ends with a cut; return the callback."""
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
    def test_taylor_observes_the_gradients_of_the_steps_without_further_backwards(self):
        scores, taylor = [], TaylorWeight()

        class Spy(TaylorWeight):
            def __call__(self, graph, model, statistics=None):
                scores.append(taylor(graph, model, statistics)[graph.layers["inner.weight"]])
                return taylor(graph, model, statistics)

        module = Regression()
        callback = fit(Spy(), module, accumulate_grad_batches=2, gradient_clip_val=0.01)
        assert module.backwards == 6
        assert len(callback.history) == 1
        assert module.net.inner.weight.shape[0] <= 6
        np.testing.assert_allclose(scores[0], module.expected, rtol=1e-5)

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
    def test_each_criterion_prunes(self, criterion):
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
    def test_a_function_that_returns_invalid_scores_changes_nothing(self, criterion, message):
        module = Regression()
        shapes = {name: p.shape for name, p in module.named_parameters()}
        with pytest.raises(ValueError, match=message):
            fit(criterion, module)
        assert {name: p.shape for name, p in module.named_parameters()} == shapes

    @pytest.mark.parametrize("criterion", [TaylorWeight(), TaylorGate(), CostAware(TaylorWeight())])
    def test_missing_gradients_raise_with_advice_and_change_nothing(self, criterion):
        module = Regression(frozen=True)
        before = copy.deepcopy(module.net.state_dict())
        with pytest.raises(ValueError, match="unfreeze the layers to prune"):
            fit(criterion, module)
        for name, tensor in module.net.state_dict().items():
            assert tensor.shape == before[name].shape


def test_gradient_sums_continue_from_a_checkpoint_and_skip_values_that_are_not_finite(net, graph, x):
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


def test_random_in_a_wrapper_is_reproducible(net, graph):
    wrapped = Normalised(Random(3), "global")
    assert np.array_equal(wrapped(graph, net), wrapped(graph, net))
