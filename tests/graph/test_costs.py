"""Resources other than MACs and parameters: exact in selection, and limited by a budget during training."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import FilterPruningCallback, LayerCost, prune_, select, trace
from lightning_prune.criteria import L2, CostAware, marginal_costs
from lightning_prune.graph.activation_costs import activations
from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.graph.costs import CostModel, Term
from lightning_prune.graph.layer_costs import layer_calls
from lightning_prune.selection.dense_sizes import DenseSizes
from lightning_prune.selection.incremental_cost import IncrementalCost
from lightning_prune.selection.limits import Limits
from tests.support.nets import Attention, Net, Small, assert_same, random_units, state

IMAGE = torch.zeros(1, 3, 8, 8)


def stairs(layer: str, channels_in: int, channels_out: int) -> float:
    """Cost that is not a product of the channels: it rises in steps of four."""
    return 0.1 + 1e-3 * math.ceil(channels_in / 4) * math.ceil(channels_out / 4) * (1 + len(layer) % 3)


def executed(model: nn.Module, *inputs: Tensor) -> list[tuple[str, int, int]]:
    """Return the layers in the order of their calls, with the numbers of input and output channels at run time."""
    calls: list[tuple[str, int, int]] = []
    names = {id(module): name for name, module in model.named_modules()}

    def hook(module: nn.Module, args: Any, out: Tensor) -> None:
        dim = -1 if isinstance(module, nn.Linear) else 1
        calls.append((names[id(module)], args[0].shape[dim], out.shape[dim]))

    kinds = (nn.modules.conv._ConvNd, nn.Linear)
    handles = [m.register_forward_hook(hook) for m in model.modules() if isinstance(m, kinds)]
    with torch.no_grad():
        model.eval()(*inputs)
    for handle in handles:
        handle.remove()
    return calls


class Kinds(nn.Module):
    """Grouped, depthwise with a multiplier, transposed, a layer called twice, a linear on tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.depthwise = nn.Conv2d(8, 16, 3, padding=1, groups=8)
        self.back = nn.Conv2d(16, 12, 1)
        self.twice = nn.Conv2d(12, 12, 3, padding=1)
        self.up = nn.ConvTranspose2d(12, 6, 2, stride=2)
        self.tokens = nn.Linear(6, 5)
        self.attention = Attention(12, 4)
        self.head = nn.Conv1d(5, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.back(self.depthwise(self.grouped(self.stem(x)).relu()))
        x = self.twice(self.twice(x).relu())
        x = x + self.attention(x.flatten(2).mT).mT.reshape(x.shape)
        x = self.tokens(self.up(x).flatten(2).mT)
        return self.head(x.mT)


@pytest.mark.parametrize("kind", [Kinds, Small])
def test_layer_cost_is_the_cost_of_the_executed_layers_before_and_after_a_cut(kind):
    model = kind().eval()
    cost = LayerCost(stairs)

    def expected() -> int:
        return sum(round(1_000_000 * stairs(*call)) for call in executed(model, IMAGE))

    graph = trace(model, IMAGE).with_resources({"stairs": cost})
    assert [(c.layer, len(c.reads), len(c.filters)) for c in layer_calls(graph)] == executed(model, IMAGE)
    assert graph.cost("stairs") == expected()
    remove = random_units(graph, seed=3)
    predicted = graph.cost("stairs", remove)
    prune_(model, graph, remove)
    assert predicted == expected() < graph.cost("stairs")
    assert trace(model, IMAGE).with_resources({"stairs": cost}).cost("stairs") == predicted


def test_bare_parameters_are_layers_and_products_of_activations_are_not():
    """In one head of attention, the values carry the ids of the layer that computed them into a matrix product."""
    model = Net(
        lambda self, x: self.out((x @ self.keys.mT).softmax(-1) @ self.values(x)) @ self.last,
        keys=nn.Parameter(torch.zeros(4, 6)),
        values=nn.Linear(6, 6),
        out=nn.Linear(6, 5),
        last=nn.Parameter(torch.zeros(5, 2)),
    )
    # four tokens, to fit the four channels of the keys
    calls = [
        (c.weight, len(c.reads), len(c.filters)) for c in layer_calls(trace(model, torch.zeros(1, 4, 6)))
    ]
    assert calls == [("keys", 6, 4), ("values.weight", 6, 6), ("out.weight", 6, 5), ("last", 5, 2)]


class WrittenElements(TorchDispatchMode):
    """Counts the elements of all tensors for which a forward allocates new memory."""

    def __init__(self, model: nn.Module, *inputs: Tensor) -> None:
        super().__init__()
        # References keep all tensors alive, so that no address is used twice.
        self.tensors: list[Tensor] = [*model.parameters(), *model.buffers(), *inputs]
        self.addresses = {tensor.untyped_storage().data_ptr() for tensor in self.tensors}
        self.elements = 0
        with torch.no_grad(), self:
            model.eval()(*inputs)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        results = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        for tensor in results[:1] if "native_layer_norm" in str(func) else results:
            if tensor.numel() and tensor.untyped_storage().data_ptr() not in self.addresses:
                self.addresses.add(tensor.untyped_storage().data_ptr())
                self.elements += tensor.numel()
            self.tensors.append(tensor)
        return out


class Pooled(nn.Module):
    """In-place operators, views, a pool with indices, resampling, a shuffle, a concatenation, layer norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.pool, self.up = nn.MaxPool2d(2), nn.Upsample(scale_factor=2)
        self.inner, self.shuffle = nn.Conv2d(8, 12, 1), nn.ChannelShuffle(2)
        self.norm, self.head = nn.LayerNorm(12), nn.Conv2d(15, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(self.shuffle(self.inner(self.pool(self.stem(x))).sigmoid()))
        return self.head(torch.cat([x, self.norm(y.movedim(1, -1)).movedim(-1, 1)], 1))


@pytest.mark.parametrize("kind", [Kinds, Small, Pooled])
def test_activations_are_the_elements_that_a_forward_writes_before_and_after_a_cut(kind):
    model, image = kind().eval(), torch.rand(2, 3, 8, 8)
    graph = trace(model, image).with_resources({"activations": activations})
    assert graph.cost("activations") == WrittenElements(model, image).elements
    remove = random_units(graph, seed=1, share=0.3, among=graph.prunable)
    predicted = graph.cost("activations", remove)
    prune_(model, graph, remove)
    assert predicted == WrittenElements(model, image).elements < graph.cost("activations")


def test_budget_in_activations_removes_filters_of_the_layer_with_most_activations():
    """The first layer has most activations, the second one most parameters."""
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.MaxPool2d(8), nn.Conv2d(16, 64, 3), nn.ReLU(), nn.Conv2d(64, 2, 1)
    )
    graph = trace(net, torch.zeros(1, 3, 50, 50)).with_resources({"activations": activations})
    score = CostAware(lambda graph, *_: np.ones(graph.num_units), resources={"activations": 1.0})
    plan = select(graph, score(graph, net, {}), {"activations": 0.6}, limits=Limits(layers=1.0))
    assert graph.widths(plan) == {"0.weight": graph.widths(plan)["0.weight"], "3.weight": 64, "5.weight": 2}
    assert plan.reached


def curved(seed: int = 0) -> ChannelGraph:
    """Return a graph of layers that share units, with functions among the terms of its resources."""
    layers = {"a.weight": np.arange(6), "b.weight": np.arange(4, 10), "c.weight": np.arange(10, 14)}
    factors = [
        (layers["a.weight"],),
        (layers["a.weight"], layers["b.weight"]),
        (np.repeat(np.arange(10), 2),),
    ]
    functions = [None, lambda *n: math.sqrt(sum(n)), lambda *n: math.prod(n) ** 1.5]
    terms = [Term("a.weight", 100 + i, f, g) for f in factors for i, g in enumerate(functions)]
    terms += terms[1:3]  # the same twice: twice the cost
    return ChannelGraph(14, {}, layers, dict.fromkeys(layers, 0), {}, {"macs": terms, "params": terms[::3]})


@pytest.mark.parametrize("seed", range(5))
def test_incremental_cost_agrees_with_the_cost_model_after_any_removals(seed):
    graph, rng = curved(), np.random.default_rng(seed)
    model = graph.cost_models["macs"]
    incremental = IncrementalCost(model, lambda layer: (0,), 1)
    removed: list[int] = []
    for unit in rng.permutation(graph.num_units).tolist():
        incremental.shift(unit, -1)
        removed.append(unit)
        if rng.random() < 0.4:
            incremental.shift(removed.pop(), 1)
        kept = graph.kept(removed)
        direct = sum(term.cost([int(kept[factor].sum()) for factor in term.factors]) for term in model.terms)
        assert incremental.total == incremental.accounts[0] == graph.cost("macs", removed) == direct


def test_marginal_cost_of_a_unit_is_the_cost_that_its_removal_saves():
    graph = curved()
    saved = marginal_costs(graph, "macs")
    assert saved.tolist() == [graph.cost("macs") - graph.cost("macs", [unit]) for unit in range(14)]
    assert len(set(saved[:10].tolist())) == 3
    assert (saved[10:] == 0).all()


def test_function_is_not_called_for_zero_channels():
    term = Term("a", 10, (np.arange(2),), lambda n: 1 / n)
    assert [CostModel([term], 2).total(np.array(kept)) for kept in ([1, 1], [0, 1], [0, 0])] == [5, 10, 0]


def test_each_cost_is_computed_once():
    arguments: list[tuple[str, int, int]] = []

    def cost(*call: Any) -> float:
        arguments.append(call)
        return 1.0

    graph = trace(Small(), IMAGE).with_resources({"calls": LayerCost(cost)})
    select(graph, L2()(graph, Small(), {}), {"macs": 0.5})
    assert len(arguments) == len(set(arguments)) > len(layer_calls(graph))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0, "3", None, True])
def test_invalid_cost_raises_and_names_the_layer(bad):
    model = Small()
    before = state(model)
    graph = trace(model, IMAGE).with_resources({"bad": LayerCost(lambda *call: bad)})
    with pytest.raises(ValueError, match=r"the cost of layer 'stem' with 3 channels in and 8 out must be"):
        select(graph, L2()(graph, model, {}), {"bad": 0.5})
    assert_same(state(model), before)


def test_built_in_resources_cannot_be_replaced_and_layer_costs_need_a_trace():
    with pytest.raises(ValueError, match="'macs' is built in"):
        curved().with_resources({"macs": LayerCost(stairs)})
    with pytest.raises(ValueError, match=r"needs a graph made by trace"):
        curved().with_resources({"stairs": LayerCost(stairs)})


class Classifier(L.LightningModule):
    """A small classifier without any code for pruning."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.example_input_array = IMAGE
        self.net = nn.Sequential(
            nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 24, 3), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 4),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.05)


def fitted(
    folder: Path, callback: FilterPruningCallback, epochs: int = 5, resume: Path | None = None
) -> tuple[Classifier, L.Trainer]:
    torch.manual_seed(1)
    data = TensorDataset(torch.randn(32, 3, 8, 8), torch.arange(32) % 4)
    keep = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    trainer = L.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[callback, keep],
    )  # fmt: skip
    module = Classifier()
    trainer.fit(module, DataLoader(data, 16), ckpt_path=resume, weights_only=True if resume else None)
    return module, trainer


quiet = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers.*:UserWarning",
    "ignore:.*LeafSpec.*",
    "ignore:.*GPU available but not used.*:UserWarning",
    "ignore:.*exists and is not empty.*:UserWarning",
    "ignore:The dirpath has changed.*:UserWarning",
)


def stairs_callback(**more: Any) -> FilterPruningCallback:
    return FilterPruningCallback(
        {"stairs": 0.5, "params": 0.6},
        amount={"stairs": 0.2, "params": 0.3},
        resources={"stairs": LayerCost(lambda *call: stairs(*call) - 0.1)},
        verbose=False,
        **more,
    )


@quiet
def test_budget_in_a_custom_resource_is_met_in_training_and_after_a_resume(tmp_path):
    callback = stairs_callback()
    module, trainer = fitted(tmp_path / "whole", callback)
    resumed_callback = stairs_callback()
    resumed, _ = fitted(tmp_path / "again", resumed_callback, resume=tmp_path / "whole" / "epoch=1.ckpt")
    assert_same(dict(resumed.state_dict()), dict(module.state_dict()))
    assert [cut.after for cut in resumed_callback.history] == [cut.after for cut in callback.history]
    assert len(callback.history) > 1

    def total(model: nn.Module) -> int:
        return sum(round(1e6 * (stairs(*call) - 0.1)) for call in executed(model, IMAGE))

    assert total(resumed) == callback.history[-1].after["stairs"] <= 0.5 * total(Classifier())
    assert callback.history[-1].share["stairs"] == pytest.approx(total(module) / total(Classifier()))
    assert trainer.callback_metrics["prune/stairs"] == total(module)
    assert trainer.callback_metrics["prune/stairs_share"] <= 0.5


@quiet
def test_budget_in_activations_is_met(tmp_path):
    callback = FilterPruningCallback({"activations": 0.7}, amount={"activations": 0.2}, verbose=False)
    module, _ = fitted(tmp_path, callback)
    assert WrittenElements(module, IMAGE).elements == callback.history[-1].after["activations"]
    assert WrittenElements(module, IMAGE).elements <= 0.7 * WrittenElements(Classifier(), IMAGE).elements


@quiet
def test_new_resource_after_a_resume_raises(tmp_path):
    plain = FilterPruningCallback({"params": 0.8}, amount={"params": 0.3}, verbose=False)
    fitted(tmp_path, plain, epochs=2)
    with pytest.raises(ValueError, match="'stairs' is unknown: the network was cut before"):
        fitted(tmp_path, stairs_callback(), resume=tmp_path / "epoch=1.ckpt")


@quiet
def test_missed_budget_in_a_custom_resource_is_reported(tmp_path):
    callback = stairs_callback(limits=Limits(layers=1.0), start_epoch=4)
    with pytest.warns(
        UserWarning, match=r"not met: stairs 0\.\d+, params 0\.\d+ of the dense network remain"
    ):
        fitted(tmp_path, callback, epochs=5)
    assert not callback.history[-1].share["stairs"] <= 0.5


def test_dense_sizes_store_every_resource():
    graph = trace(Small(), IMAGE).with_resources({"stairs": LayerCost(stairs)})
    sizes = DenseSizes.from_dict(DenseSizes.of(graph).to_dict())
    assert sizes.costs["stairs"] == graph.cost("stairs")


@quiet
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"limits": Limits(layers=0.1)}, r"cannot be met.*limits layers=0.1, which closes net"),
        ({"limits": Limits(overrides={"Conv3d": 0.1})}, "limit 'Conv3d' matches no layer"),
        ({"exclude": ["nets"]}, "exclude 'nets' matches no layer; did you mean 'net"),
        ({"resources": {"params": LayerCost(stairs)}}, "'params' is built in"),
        (
            {"budget": {"bad": 0.5}, "resources": {"bad": LayerCost(lambda *call: -1)}},
            "the cost of layer 'net.0'",
        ),
    ],
    ids=["budget", "type", "exclude", "engine", "cost"],
)
def test_invalid_arguments_raise_before_training(bad, message, tmp_path):
    module = Classifier()
    before = state(module.net)
    callback = FilterPruningCallback(**{"budget": {"macs": 0.5}, **bad})
    trainer = L.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[callback],
    )  # fmt: skip
    with pytest.raises(ValueError, match=message):
        trainer.fit(module, DataLoader(TensorDataset(torch.zeros(4, 3, 8, 8), torch.zeros(4).long())))
    assert_same(state(module.net), before)


@quiet
@pytest.mark.parametrize("channels", [True, False], ids=["new", "old"])
def test_limits_of_channels_keep_their_meaning_after_a_resume_also_from_an_old_checkpoint(channels, tmp_path):
    def callback() -> FilterPruningCallback:
        limits = Limits(layers=0.6, of="channels")
        return FilterPruningCallback({"macs": 0.3}, amount={"macs": 0.2}, limits=limits, verbose=False)

    module, _ = fitted(tmp_path / "whole", callback(), epochs=6)
    path = tmp_path / "whole" / "epoch=2.ckpt"
    saved = torch.load(path, weights_only=True)
    (sizes,) = [state["dense"] for state in saved["callbacks"].values() if "dense" in state]
    assert sizes["channels"] == {"net.0": 16, "net.3": 24, "net.7": 4, "net": 44}
    if not channels:
        del sizes["channels"]
        torch.save(saved, path)
    again, _ = fitted(tmp_path / "again", callback(), epochs=6, resume=path)
    assert_same(dict(again.state_dict()), dict(module.state_dict()))
    assert module.net[0].out_channels < 16 > 0.4 * 16 <= module.net[0].out_channels
