"""Repairs bring the outputs nearer to the dense ones, exactly where that is possible, or change nothing."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_prune import SurgeryError, prune_, trace
from lightning_prune.compensation import (
    CompensationError,
    CompensationSettings,
    collect_targets,
    compensate_,
    cut_and_compensate_,
    layer_repair,
)
from lightning_prune.compensation.fit import Fit
from lightning_prune.testing import randomise_
from tests.support.nets import Attention, Net, Small, assert_same, random_units, state

IMAGES = torch.randn(24, 3, 12, 12, generator=torch.Generator().manual_seed(3))
TOKENS = torch.randn(24, 7, 12, generator=torch.Generator().manual_seed(4))


def repaired(model: nn.Module, inputs: Tensor, share: float = 0.4, seed: int = 0, remove=None, **settings):
    """Cut and repair a model; return the report."""
    graph = trace(model, inputs[:2])
    remove = random_units(graph, seed, share) if remove is None else graph.layers[remove[0]][remove[1]]
    return cut_and_compensate_(model, graph, remove, [inputs], settings=CompensationSettings(**settings))[1]


def double_channels(weight: Tensor, dim: int = 0) -> None:
    """Make the second half of a weight's filters twice its first half."""
    with torch.no_grad():
        first, second = weight.chunk(2, dim)
        second.copy_(2 * first)


# -- exactness ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "consumer",
    [
        nn.Conv2d(8, 4, 3, padding=1),
        nn.Conv2d(8, 4, 3, bias=False),
        nn.ConvTranspose2d(8, 4, 3, stride=2, padding=1),
        nn.Sequential(nn.Flatten(2), nn.Conv1d(8, 4, 3)),
        nn.Sequential(nn.Unflatten(2, (3, 4)), nn.Conv3d(8, 4, 3, padding=1)),
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)),
    ],
    ids=lambda consumer: type(consumer[-1] if isinstance(consumer, nn.Sequential) else consumer).__name__,
)
def test_what_other_channels_say_is_recovered(consumer):
    stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
    double_channels(stem.weight)
    model = nn.Sequential(stem, nn.ReLU(), copy.deepcopy(consumer)).double()
    report = repaired(model, IMAGES.double(), remove=("0.weight", slice(4, 8)))
    assert report.accepted
    assert report.change_before > 0.05
    assert report.change_after < 1e-7


@pytest.mark.parametrize("bias", [True, False])
def test_constant_channels_go_into_the_bias_or_the_norm_behind(bias):
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 6, 3, bias=bias), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 2, 1)),
    )
    randomise_(model)
    with torch.no_grad():
        model[1].weight[4:] = 0
        model[1].bias[4:] = 3
    weight, mean = model[3].weight.clone(), model[4].running_mean.clone()
    report = repaired(model, IMAGES, remove=("0.weight", slice(4, 8)))
    assert report.accepted
    assert report.change_after < 1e-8 < 1e-2 < report.change_before
    torch.testing.assert_close(model[3].weight, weight[:, :4], atol=1e-4, rtol=1e-3)
    assert torch.equal(model[4].running_mean, mean) == bias


# -- all kinds of networks ------------------------------------------------------------------------------


class Siamese(nn.Module):
    """A backbone that is called twice, with norms of its own for each call."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, bias=False), nn.Conv2d(8, 8, 3, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(2))
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        views = [
            norm(self.second(F.relu(self.first(view)))).relu().mean((2, 3))
            for norm, view in zip(self.norms, (x, x.flip(3) * 2), strict=True)
        ]
        return self.head(torch.cat(views, 1))


class Tied(nn.Module):
    """Two layers with the same weight, and biases of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(12, 16)
        self.up, self.again = nn.Linear(16, 16), nn.Linear(16, 16)
        self.again.weight = self.up.weight
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(self.up(x))
        return self.head(F.relu(self.again(x)))


def encoder(batch_first: bool = True) -> nn.Module:
    layer = nn.TransformerEncoderLayer(12, 3, 24, batch_first=batch_first)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


class SequenceFirst(nn.Module):
    """An encoder that lists tokens before images."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.encoder, self.head = nn.Linear(12, 12), encoder(batch_first=False), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.stem(x).transpose(0, 1)).transpose(0, 1))


def grouped() -> nn.Module:
    return nn.Sequential(
        *(
            nn.Conv2d(3, 8, 3),
            nn.GroupNorm(2, 8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, groups=8),
            nn.Conv2d(8, 12, 1),
        ),
        *(nn.ReLU(), nn.ConvTranspose2d(12, 12, 2, stride=2, groups=12), nn.Conv2d(12, 2, 1)),
    )


NETWORKS = {
    "small": (Small, IMAGES),
    "grouped": (grouped, IMAGES),
    "siamese": (Siamese, IMAGES),
    "tied": (Tied, TOKENS),
    "attention": (lambda: nn.Sequential(nn.Linear(12, 12), Attention(), nn.Linear(12, 5)), TOKENS),
    "encoder": (lambda: nn.Sequential(nn.Linear(12, 12), encoder(), nn.Linear(12, 3)), TOKENS),
    "sequence first": (SequenceFirst, TOKENS),
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("seed", [0, 1])
def test_outputs_come_nearer_also_on_new_images(name, seed):
    build, inputs = NETWORKS[name]
    model = build().eval()
    new = torch.randn(64, *inputs.shape[1:], generator=torch.Generator().manual_seed(7))
    expected = model(new).detach()
    cut = copy.deepcopy(model)
    graph = trace(cut, inputs[:2])
    prune_(cut, graph, random_units(graph, seed, 0.4))
    report = repaired(model, inputs, seed=seed)
    assert report.accepted, report
    assert report.change_after < 0.7 * report.change_before
    assert not report.left_alone
    assert (model(new) - expected).square().mean() < 0.9 * (cut(new) - expected).square().mean()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_projections_of_attention_are_repaired():
    model = nn.Sequential(nn.Linear(12, 12), encoder(), nn.Linear(12, 3))
    report = repaired(model, TOKENS)
    changed = {name for name, layer in report.layers.items() if layer.changed}
    assert {f"1.layers.1.self_attn.{part}" for part in "qkv"} <= changed
    assert "1.layers.1.self_attn.out_proj" in report.layers


def test_an_attention_with_separate_projections_is_repaired():
    def run(net: nn.Module, x: Tensor) -> Tensor:
        query = F.relu(net.stem(x))
        return net.attention(query, key=net.keys(x), value=x, need_weights=False)[0] + net.head(query)

    attention = nn.MultiheadAttention(16, 2, kdim=10, vdim=12, batch_first=True)
    model = Net(
        run, stem=nn.Linear(12, 16), keys=nn.Linear(12, 10), attention=attention, head=nn.Linear(16, 16)
    )
    report = repaired(model, TOKENS, remove=("keys.weight", slice(0, 4)))
    assert report.accepted
    assert report.layers["attention.k"].after < 0.9 * report.layers["attention.k"].before


def test_parameters_given_to_a_function_are_repaired():
    def run(net: nn.Module, x: Tensor) -> Tensor:
        return F.linear(net.hidden(net.stem(x).relu()).relu(), net.head.weight, bias=net.head.bias)

    model = Net(run, stem=nn.Linear(12, 16), hidden=nn.Linear(16, 16), head=nn.Linear(16, 3))
    report = repaired(model, TOKENS, remove=("hidden.weight", slice(0, 6)))
    assert report.layers["head"].changed
    assert report.layers.keys() == {"head"}


# -- sums -----------------------------------------------------------------------------------------------


def sum_targets(run, inputs: Tensor = IMAGES) -> set[str]:
    """Return the layers that are fitted to a sum."""
    parts = {name: nn.Conv2d(3, 3, 3, padding=1) for name in ("first", "second")}
    targets = collect_targets(Net(run, **parts, norm=nn.BatchNorm2d(3)), {}, [inputs])
    return {name for name, (call,) in targets.calls.items() if call.sums is not None}


def test_branches_are_fitted_to_the_sum_that_reads_them():
    def in_place(net: nn.Module, x: Tensor) -> Tensor:
        y = net.norm(net.second(net.first(x).relu()))
        y += x
        return y

    assert sum_targets(lambda net, x: x + net.second(net.first(x).relu())) == {"second"}
    assert sum_targets(lambda net, x: torch.add(F.dropout(net.second(net.first(x)), training=False), x)) == {
        "second"
    }
    assert sum_targets(lambda net, x: net.first(x) + net.second(x)) == {"second"}
    assert sum_targets(in_place) == {"second"}


def test_outputs_that_something_else_reads_are_not_fitted_to_a_sum():
    def read_before(net: nn.Module, x: Tensor) -> Tensor:
        y = net.first(x)
        return y.sigmoid() + y

    def input_changes(net: nn.Module, x: Tensor) -> Tensor:
        x = x.clone()
        y = net.first(x)
        return y + x.relu_()

    assert sum_targets(read_before) == set()
    assert sum_targets(lambda net, x: net.first(x) + x.mean()) == set()
    assert sum_targets(input_changes) == set()
    assert sum_targets(lambda net, x: net.first(x).relu() + x) == set()


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("spelling", ["plus", "add_"])
def test_a_branch_corrects_the_residual_stream(normed, spelling):
    """The stream has lost a term that is linear in what the branch reads, so the branch can supply it."""

    def run(net: nn.Module, x: Tensor) -> Tensor:
        stream, branch = net.narrow(net.wide(x)), net.norm(net.branch(x))
        return branch + stream if spelling == "plus" else branch.add_(stream)

    parts = {"wide": nn.Conv2d(3, 8, 1), "narrow": nn.Conv2d(8, 4, 1), "branch": nn.Conv2d(3, 4, 1)}
    model = Net(run, **parts, norm=nn.BatchNorm2d(4) if normed else nn.Identity())
    model = randomise_(model).double()
    remove = "wide.weight", slice(1, 8)
    reports = [repaired(copy.deepcopy(model), IMAGES.double(), remove=remove, sums=x) for x in (False, True)]
    assert reports[0].change_after > 1e-2
    assert reports[1].change_after < 1e-5


def test_a_sum_that_does_not_come_again_is_named():
    def run(net: nn.Module, x: Tensor) -> Tensor:
        y = net.branch(net.wide(x))
        return y + x if len(net.wide.weight) == 8 else torch.stack([y, x]).sum(0)

    model = Net(run, wide=nn.Conv2d(3, 8, 1), branch=nn.Conv2d(8, 3, 1))
    targets = collect_targets(model, {"wide.weight": {0: [0, 1]}, "branch.weight": {1: [0, 1]}}, [IMAGES])
    model.wide, model.branch = nn.Conv2d(3, 2, 1), nn.Conv2d(2, 3, 1)
    report = compensate_(model, targets, [IMAGES])
    assert report.left_alone == {"branch": "the sum that reads it in the dense network did not come"}


# -- nothing gets worse ---------------------------------------------------------------------------------


def test_the_held_out_images_decide(monkeypatch):
    """A change that seems good for a layer, but is bad for the network, is undone to the bit."""

    def harmful(calls, dampings):
        width = calls[0].x.shape[2], calls[0].residual.shape[2]
        change = torch.full((len(calls[0].x), *width), 9.0)
        constants = {call.slot: torch.ones(len(change) * width[1]) for call in calls if call.slot is not None}
        return Fit(1.0, 0.5, 0.1, change, constants)

    model = randomise_(Small())
    graph = trace(model, IMAGES[:2])
    targets = collect_targets(model, {}, [IMAGES])
    prune_(model, graph, graph.layers["inner.weight"][:3])
    before = state(model)
    monkeypatch.setattr(layer_repair, "fit", harmful)
    report = compensate_(model, targets, [IMAGES])
    assert not report.accepted
    assert report.change_after > report.change_before
    assert_same(state(model), before)
    assert str(report).startswith("not repaired: the outputs of held-out images did not come nearer")


def test_a_fit_to_other_images_is_refused():
    """What fits the first images is wrong for the last ones, which are of another kind."""
    images = IMAGES.clone()
    images[18:] = 100 * images[18:].abs().flip(2)
    images[:18] *= 1e-3
    model = randomise_(Small()).eval()
    dense = copy.deepcopy(model)
    cut = copy.deepcopy(model)
    graph = trace(cut, IMAGES[:2])
    prune_(cut, graph, random_units(graph, 0, 0.4))
    report = repaired(model, images)
    distances = [(dense(images[18:]) - net(images[18:])).square().sum() for net in (cut, model)]
    assert distances[1] <= distances[0]
    assert all(layer.after <= layer.before for layer in report.layers.values())


def test_without_a_cut_nothing_changes():
    model = randomise_(Small())
    before = state(model)
    report = compensate_(model, collect_targets(model, {}, [IMAGES]), [IMAGES])
    assert not report.accepted
    assert report.reason == "its outputs are the dense ones"
    assert_same(state(model), before)


@pytest.mark.parametrize("name", ["small", "siamese", "encoder"])
def test_a_repeat_gives_the_same_bits(name):
    build, inputs = NETWORKS[name]
    models = [build()]
    models.append(copy.deepcopy(models[0]))
    reports = []
    for seed, model in enumerate(models):
        torch.manual_seed(seed)
        reports.append(repaired(model, inputs))
    assert reports[0] == reports[1]
    for first, second in zip(models[0].state_dict().values(), models[1].state_dict().values(), strict=True):
        assert torch.equal(first, second)


def test_modes_random_numbers_gradients_and_buffers_stay():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(), nn.ReLU(), nn.Conv2d(8, 2, 1))
    model.register_buffer("calls", torch.zeros(()))
    model.register_forward_hook(lambda module, args, output: module.calls.add_(1) and None)
    model[2].eval()
    random_state, running_mean = torch.get_rng_state(), model[1].running_mean[4:].clone()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    report = repaired(model, IMAGES, remove=("0.weight", slice(0, 4)))
    assert report.accepted
    assert torch.equal(torch.get_rng_state(), random_state)
    assert model.training
    assert not model[2].training
    assert model.calls <= 2  # of the trace
    assert torch.equal(model[1].running_mean, running_mean)
    assert {id(p) for p in model.parameters()} == {id(p) for p in optimizer.param_groups[0]["params"]}


# -- what is left alone, and bad input ------------------------------------------------------------------


def test_what_cannot_be_repaired_is_named():
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    parts = {
        "stem": nn.Linear(12, 16),
        "frozen": nn.Linear(16, 16).requires_grad_(False),
        "own": Doubled(16, 16),
        "normed": nn.utils.parametrizations.weight_norm(nn.Linear(16, 16)),
        "unused": nn.Linear(16, 16),
        "head": nn.Linear(16, 3),
    }

    def run(net: nn.Module, x: Tensor) -> Tensor:
        return net.head(F.relu(net.normed(F.relu(net.own(F.relu(net.frozen(F.relu(net.stem(x)))))))))

    model = Net(run, **parts)
    frozen = model.frozen.weight.clone()
    report = repaired(model, TOKENS, remove=("stem.weight", slice(0, 5)))
    assert report.left_alone == {
        "frozen": "frozen",
        "own": "it has a forward of its own",
        "normed": "its weight is computed",
        "unused": "it did not run",
    }
    assert report.layers.keys() == {"head"}
    assert torch.equal(model.frozen.weight, frozen[:, 5:])


def test_a_network_that_is_frozen_as_a_whole_is_repaired():
    report = repaired(Small().requires_grad_(False), IMAGES)
    assert report.accepted
    assert not report.left_alone


def test_a_weight_that_an_embedding_reads_is_left_alone():
    def run(net: nn.Module, tokens: Tensor) -> Tensor:
        return net.head(F.relu(net.mix(net.embedding(tokens))))

    model = Net(run, embedding=nn.Embedding(9, 8), mix=nn.Linear(8, 8), head=nn.Linear(8, 9, bias=False))
    model.head.weight = model.embedding.weight
    tokens = torch.randint(9, (16, 5), generator=torch.Generator().manual_seed(0))
    report = repaired(model, tokens, 0.3)
    assert report.left_alone == {"head": "a module of another kind reads its weight"}


def test_layers_too_large_are_named():
    report = repaired(Small(), IMAGES, max_elements=64 * 20)
    assert "too large" in report.left_alone["inner"]
    assert "head" in report.layers


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions(dtype):
    model = Small().to(dtype)
    report = repaired(model, IMAGES.to(dtype))
    assert report.accepted
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


@pytest.mark.parametrize("name", ["small", "siamese", "encoder"])
def test_mixed_precision(name):
    build, inputs = NETWORKS[name]
    model = build()
    graph = trace(model, inputs[:2])
    full = copy.deepcopy(model)
    remove, dense = random_units(graph, 0, 0.4), copy.deepcopy(model)
    record = prune_(model, graph, remove)
    with torch.autocast("cpu", torch.bfloat16):
        report = compensate_(model, collect_targets(dense, record.kept, [inputs]), [inputs])
    expected = repaired(full, inputs)
    assert report.accepted
    assert report.change_after < 1.2 * expected.change_after + 1e-3
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_a_single_position_does_not_make_it_singular():
    report = repaired(Small(), IMAGES, positions=1)
    assert report.change_after <= report.change_before or not report.accepted


def test_constant_images_do_not_make_it_singular():
    report = repaired(Small(), torch.ones(8, 3, 12, 12))
    assert all(layer.after <= layer.before for layer in report.layers.values())


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "needs a batch"),
        ([{"label": "cat"}], "needs a batch"),
        ([IMAGES[:1]], "at least two images, got 1"),
        ([torch.where(IMAGES > 2, torch.nan, IMAGES)], "not finite"),
        ([IMAGES[:, :2]], "cannot run"),
        ([IMAGES, IMAGES[..., :5]], "images of sizes"),
    ],
)
def test_bad_images_change_nothing(batches, message):
    model = randomise_(Small())
    before = state(model)
    graph = trace(model, IMAGES[:2])
    with pytest.raises(CompensationError, match=message):
        cut_and_compensate_(model, graph, graph.layers["inner.weight"][:3], batches)
    assert_same(state(model), before)


def test_a_refused_cut_changes_nothing():
    model = Small()
    graph = trace(model, IMAGES[:2])
    before = state(model)
    with pytest.raises(SurgeryError, match="nothing would be left"):
        cut_and_compensate_(model, graph, graph.layers["inner.weight"], [IMAGES])
    assert_same(state(model), before)


def test_other_images_than_those_of_the_targets_are_refused():
    model = Small()
    targets = collect_targets(model, {}, [IMAGES])
    with pytest.raises(CompensationError, match="24 images, not 8"):
        compensate_(model, targets, [IMAGES[:8]])


def test_a_failure_in_the_middle_undoes_everything(monkeypatch):
    model = randomise_(Small())
    graph = trace(model, IMAGES[:2])
    targets = collect_targets(model, {}, [IMAGES])
    prune_(model, graph, graph.layers["inner.weight"][:3])
    before, original = state(model), layer_repair.fit
    calls = []

    def failing(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(layer_repair, "fit", failing)
    with pytest.raises(KeyboardInterrupt):
        compensate_(model, targets, [IMAGES])
    assert_same(state(model), before)


def test_batches_with_labels_are_joined():
    model = Small()
    twin = copy.deepcopy(model)
    graph, graph_of_twin = trace(model, IMAGES[:2]), trace(twin, IMAGES[:2])
    remove = random_units(graph)
    _, report = cut_and_compensate_(model, graph, remove, [IMAGES])
    batches = [(IMAGES[:10], torch.zeros(10)), (IMAGES[10:], torch.zeros(14))]
    assert cut_and_compensate_(twin, graph_of_twin, remove, batches)[1] == report
