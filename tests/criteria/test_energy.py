"""Tests of output energy and of IPAD with terms of energy, against ablation and invariances."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from lightning_prune import IPAD, ChannelGraph, trace
from lightning_prune.criteria import (
    ActivationMean,
    ChannelVariance,
    ConsumerInputs,
    Criterion,
    OutputEnergy,
    energy_importance,
    output_energy,
    remaining_shares,
    weight_energy,
)
from lightning_prune.criteria.channel_variance import batch_moments, merged
from lightning_prune.criteria.reduction import groups
from lightning_prune.testing import randomise_
from tests.support.nets import Attention, Net, Small

SHARES = OutputEnergy(normalise="none")
CRITERIA = (
    SHARES,
    OutputEnergy(),
    IPAD(0.0, terms="energy"),
    IPAD(0.5, terms="energy"),
    IPAD(1.0, terms="energy"),
)


def scores(criterion: Criterion, model: nn.Module, *batches: Tensor) -> np.ndarray:
    """Return the importance of the units of a network, with the statistics of some batches."""
    graph = trace(model, batches[0])
    observer = criterion.observer(graph, model)
    if observer is None:
        return criterion(graph, model, {})
    observer.attach()
    for batch in batches:
        with torch.no_grad():
            model(batch)
    observer.detach()
    return criterion(graph, model, observer.compute())


def batches(*shape: int, number: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(8, *shape, generator=generator) for _ in range(number)]


# --- the formula ---


def ablated_shares(layer: nn.Module, x: Tensor) -> np.ndarray:
    """Return each input channel's share of how the outputs of ``layer`` vary if single channels are at their mean.

    Each output channel has shares of its own, of which the mean is returned.
    """
    dims = [dim for dim in range(x.dim()) if dim != 1]
    mean, energies = x.mean(dims, keepdim=True).expand_as(x), []
    for channel in range(x.shape[1]):
        ablated = x.clone()
        ablated[:, channel] = mean[:, channel]
        energies.append((layer(x) - layer(ablated)).square().mean(dims))
    energy = torch.stack(energies)
    return (energy / energy.sum(0)).mean(1).numpy()


@torch.no_grad()
def test_output_energy_of_pointwise_consumers_equals_ablation_of_each_channel():
    """Two consumers of one layer, behind a norm; one of them reads it concatenated with the input."""

    def run(net: Net, x: Tensor) -> Tensor:
        y = F.relu(net.norm(net.first(x)))
        return net.left(y) + net.right(torch.cat([x, y], 1))

    parts = {"first": nn.Conv2d(2, 5, 3, padding=1), "norm": nn.BatchNorm2d(5)}
    net = randomise_(Net(run, **parts, left=nn.Conv2d(5, 4, 1), right=nn.Conv2d(7, 4, 1))).double().eval()
    x = torch.cat(batches(2, 9, 9)).double()
    y = F.relu(net.norm(net.first(x)))
    both = torch.cat([x, y], 1)
    expected = ablated_shares(net.left, y) + ablated_shares(net.right, both)[2:]
    graph = trace(net, x)
    units = graph.layers["first.weight"]
    np.testing.assert_allclose(scores(SHARES, net, *x.split(8))[units], expected, rtol=1e-6)


@torch.no_grad()
def test_flattened_inputs_sum_the_columns_of_a_channel():
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Flatten(), nn.Linear(12, 2)).double()
    x = torch.cat(batches(1, 4, 4)).double()
    columns = net[:2](x)
    expected = ablated_shares(net[2], columns).reshape(3, 4).sum(1)
    np.testing.assert_allclose(scores(SHARES, net, x)[trace(net, x).layers["0.weight"]], expected)


@torch.no_grad()
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("transposed", [False, True])
def test_grouped_and_transposed_consumers_equal_ablation_of_each_unit(groups, transposed):
    kind = nn.ConvTranspose1d if transposed else nn.Conv1d
    net = nn.Sequential(nn.Conv1d(1, 6, 1), kind(6, 4, 1, groups=groups), nn.Conv1d(4, 1, 1)).double()
    x = torch.cat(batches(1, 5)).double()
    units = trace(net, x).layers["0.weight"]
    expected = np.bincount(units, ablated_shares(net[1], net[0](x)))
    np.testing.assert_allclose(scores(SHARES, net, x)[: len(expected)], expected)


@torch.no_grad()
def test_a_depthwise_convolution_hands_the_unit_on_to_what_reads_it():
    net = nn.Sequential(nn.Conv2d(1, 4, 1), nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 2, 1)).double()
    x = torch.cat(batches(1, 6, 6)).double()
    units = trace(net, x).layers["0.weight"]
    np.testing.assert_allclose(scores(SHARES, net, x)[units], ablated_shares(net[2], net[:2](x)))


@torch.no_grad()
def test_projections_of_multihead_attention_read_tokens_and_heads():
    torch.manual_seed(0)

    def run(net: Net, x: Tensor) -> Tensor:
        tokens = net.embed(x)
        return net.out(net.attention(tokens, tokens, tokens, need_weights=False)[0])

    attention = nn.MultiheadAttention(4, 2, batch_first=True)
    net = Net(run, embed=nn.Linear(3, 4), attention=attention, out=nn.Linear(4, 1)).double().eval()
    x = torch.cat(batches(5, 3)).double()
    with ConsumerInputs(trace(net, x), net) as inputs:
        expected = net(x)
    assert torch.equal(expected, net(x))
    statistics = inputs.compute()
    tokens = net.embed(x).flatten(0, 1)
    q, k, v = (
        F.linear(tokens, attention.in_proj_weight, attention.in_proj_bias).view(8 * 2, 5, 3, 2, 2).unbind(2)
    )
    heads = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2).flatten(2)
    for read in ("query", "key", "value"):
        measured = statistics[f"attention.in_proj_weight:1:{read}"]
        np.testing.assert_allclose(measured, tokens.var(0, correction=0))
    measured = statistics["attention.out_proj.weight:1"]
    np.testing.assert_allclose(measured, heads.flatten(0, 1).var(0, correction=0))


@torch.no_grad()
def test_observing_an_attention_leaves_the_random_numbers_of_its_dropout_alone():
    def run(net: Net, x: Tensor) -> Tensor:
        x = net.embed(x)
        return net.out(net.attention(x, x, x, need_weights=False)[0])

    parts = {
        "embed": nn.Linear(3, 4),
        "attention": nn.MultiheadAttention(4, 2, dropout=0.5),
        "out": nn.Linear(4, 1),
    }
    net, x = Net(run, **parts), torch.randn(5, 2, 3)
    graph = trace(net, x)
    torch.manual_seed(1)
    plain = [net(x), net(x)]
    torch.manual_seed(1)
    with ConsumerInputs(graph, net):
        observed = [net(x), net(x)]
    assert all(torch.equal(*pair) for pair in zip(plain, observed, strict=True))


@torch.no_grad()
def test_a_layer_called_twice_through_tied_weights_is_observed_in_every_call():
    def run(net: Net, x: Tensor) -> Tensor:
        return net.twin(net.head(net.stem(x)))

    net = Net(run, stem=nn.Linear(2, 3), head=nn.Linear(3, 3), twin=nn.Linear(3, 3)).double()
    net.twin.weight = net.head.weight
    x = torch.cat(batches(2)).double()
    graph = trace(net, x)
    with ConsumerInputs(graph, net) as inputs:
        net(x)
    reads = torch.cat([net.stem(x), net.head(net.stem(x))])
    if len(inputs.metrics):  # the tie to the output pins the units
        np.testing.assert_allclose(inputs.compute()["head.weight:1"], reads.var(0, correction=0))
    else:
        assert not len(graph.prunable)


def shares_of(energy: Tensor) -> Tensor:
    """Return shares along dimension 1, averaged over filters."""
    return (energy / energy.sum(1, keepdim=True)).mean(0).detach()


def small_classifier() -> nn.Sequential:
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(96, 5), nn.Tanh(), nn.Linear(5, 2))


@pytest.mark.filterwarnings("ignore:.*(weight_norm.*deprecated|is deprecated in favor of)")
@pytest.mark.parametrize(
    "compute",
    [
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        nn.utils.weight_norm,
        nn.utils.spectral_norm,
    ],
    ids=["weight_norm", "spectral_norm", "old weight_norm", "old spectral_norm"],
)
@pytest.mark.parametrize("criterion", [SHARES, ActivationMean()], ids=["energy", "activation"])
def test_layers_with_computed_weights_score_as_those_with_the_same_plain_ones(compute, criterion):
    """Energy is a share of what a filter computes, so that the scale that a norm of weights sets does not matter."""
    torch.manual_seed(0)
    plain = small_classifier().eval()
    computed, x = copy.deepcopy(plain), torch.randn(8, 3, 8, 8)
    for layer, own in zip(plain, computed, strict=True):
        if isinstance(layer, nn.Conv2d | nn.Linear):
            compute(own).eval()
    computed(x)  # the older norms compute their weights in a forward
    for layer, own in zip(plain, computed, strict=True):
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.weight.data = own.weight.detach().clone()
    torch.testing.assert_close(computed(x), plain(x))
    found, expected = scores(criterion, computed, x), scores(criterion, plain, x)
    graph, of_plain = trace(computed, x[:1]), trace(plain, x[:1])
    compared = 0
    for own, name in zip(graph.layers, of_plain.layers, strict=True):
        prunable = np.isin(
            graph.layers[own], graph.prunable
        )  # spectral norm pins the inputs of linear layers
        scored, wanted = found[graph.layers[own]], expected[of_plain.layers[name]]
        np.testing.assert_allclose(scored[prunable], wanted[prunable], rtol=1e-4)
        compared += int(prunable.sum())
    assert compared >= 8


def test_weight_energy_predicts_variances_from_scales_of_norms_else_through_the_filters():
    net = nn.Sequential(
        nn.Conv2d(1, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1), nn.ReLU(), nn.Conv2d(2, 1, 1)
    )
    randomise_(net)
    graph = trace(net, torch.zeros(1, 1, 4, 4))
    first = net[2].weight.square().flatten(1) * net[1].weight.square()
    second = net[4].weight.square().flatten(1) * first.sum(1)
    expected = torch.cat([shares_of(first), shares_of(second)])
    units = np.concatenate([graph.layers["0.weight"], graph.layers["2.weight"]])
    np.testing.assert_allclose(weight_energy(graph, net)[units], expected, rtol=1e-5)


def test_omega_weighs_two_terms_of_mean_one_and_groups_are_compared_by_what_remains():
    net = randomise_(Small()).eval()
    x = torch.cat(batches(3, 8, 8))
    graph, criterion = trace(net, x), IPAD(0.3, terms="energy", beta=0.75)
    with ConsumerInputs(graph, net) as inputs, torch.no_grad():
        net(x)
    measured, predicted = output_energy(graph, net, inputs.compute()), weight_energy(graph, net)
    actual, labels = criterion(graph, net, inputs.compute()), groups(graph)
    for label in np.unique(labels[graph.prunable]):
        units = np.flatnonzero(labels == label)
        mixed = (
            0.3 * predicted[units] / predicted[units].mean() + 0.7 * measured[units] / measured[units].mean()
        )
        remaining = np.array([mixed[mixed >= value].sum() for value in mixed])
        np.testing.assert_allclose(actual[units], mixed / remaining * len(units) ** 0.75, rtol=1e-9)


@pytest.mark.parametrize(("beta", "widths"), [(1.0, {"a": 3, "b": 6}), (0.0, {"a": 4, "b": 4})])
def test_beta_says_whether_layers_keep_the_same_share_or_the_same_number(beta, widths):
    graph = ChannelGraph(18, {}, {"a": np.arange(6), "b": np.arange(6, 18)}, {"a": 0, "b": 0}, {}, {})
    importance = remaining_shares(graph, np.ones(18), beta)
    kept = importance >= np.sort(importance)[18 - sum(widths.values())]
    assert {name: int(kept[units].sum()) for name, units in graph.layers.items()} == widths


# --- invariances ---


@pytest.mark.parametrize("criterion", CRITERIA, ids=str)
def test_scores_do_not_change_where_a_norm_or_a_consumer_makes_up_for_a_scale(criterion):
    torch.manual_seed(0)
    parts = (
        nn.Conv2d(2, 4, 3),
        nn.BatchNorm2d(4, eps=0),
        nn.ReLU(),
        nn.Conv2d(4, 5, 1),
        nn.ReLU(),
        nn.Conv2d(5, 2, 1),
    )
    net = randomise_(nn.Sequential(*parts)).double().eval()
    x = torch.cat(batches(2, 6, 6)).double()
    scaled = copy.deepcopy(net)
    with torch.no_grad():
        for tensor, factor in ((scaled[0].weight, 7.0), (scaled[0].bias, 7.0), (scaled[1].running_mean, 7.0)):
            tensor[1] *= factor
        scaled[1].running_var[1] *= 49.0
        for tensor in (scaled[1].weight, scaled[1].bias):
            tensor[2] *= 3.0
        scaled[3].weight[:, 2] /= 3.0
        scaled[3].weight[0] *= 0.2
        scaled[3].bias[0] *= 0.2
        scaled[5].weight[:, 0] /= 0.2
    torch.testing.assert_close(net(x), scaled(x))
    np.testing.assert_allclose(scores(criterion, scaled, x), scores(criterion, net, x), rtol=1e-9)


@pytest.mark.parametrize("criterion", CRITERIA, ids=str)
def test_scores_of_networks_are_finite_and_rank_a_dead_channel_last(criterion):
    net = randomise_(Small()).eval()
    net.norm.weight.data[:], net.norm.bias.data[:] = 1.0, 1.0
    net.inner.weight.data[2], net.inner.bias.data[2] = 0, 0
    graph = trace(net, torch.zeros(2, 3, 8, 8))
    importance = scores(criterion, net, *batches(3, 8, 8))
    assert np.isfinite(importance[graph.prunable]).all()
    assert importance[graph.layers["inner.weight"]].argmin() == 2


def test_attention_written_out_scores_all_units():
    def run(net: Net, x: Tensor) -> Tensor:
        return net.out(net.attention(net.embed(x)))

    net = Net(run, embed=nn.Linear(3, 12), attention=Attention(), out=nn.Linear(12, 2)).eval()
    graph = trace(net, torch.zeros(2, 5, 3))
    for criterion in CRITERIA:
        assert np.isfinite(scores(criterion, net, *batches(5, 3))[graph.prunable]).all()


# --- the observer ---


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_variance_does_not_depend_on_how_data_is_split_even_with_a_large_mean(offset):
    data = torch.randn(97, 3, 5, generator=torch.Generator().manual_seed(0)) + offset
    expected = data.double().movedim(1, 0).flatten(1).var(1, correction=0)
    for sizes in ([97], [1, 96], [30, 30, 37], [1] * 97):
        metric = ChannelVariance()
        for batch in data.split(sizes):
            metric.update(batch)
        torch.testing.assert_close(metric.compute(), expected, rtol=1e-4, atol=0)


def test_half_precision_is_computed_in_float32_and_kept_in_double():
    metric = ChannelVariance().to(torch.bfloat16)
    data = torch.randn(4000, 2).bfloat16()
    for batch in data.split(40):
        metric.update(batch)
    torch.testing.assert_close(metric.compute(), data.double().var(0, correction=0), rtol=1e-5, atol=0)


def test_processes_are_merged_exactly_also_one_without_data():
    data = torch.randn(50, 3, dtype=torch.float64) * 5 + 2
    ranks = [batch_moments(part.T) for part in (data[:10], data[10:])]
    total = merged(merged(torch.zeros(3, 3, dtype=torch.float64), ranks[0]), ranks[1])
    metric = ChannelVariance()
    metric.update(data)
    metric.moments = torch.stack(
        [*ranks, torch.zeros(3, 3, dtype=torch.float64)]
    )  # as gathered over processes
    torch.testing.assert_close(metric.compute(), data.var(0, correction=0))
    torch.testing.assert_close(total[2] / total[0], data.var(0, correction=0))


def test_an_empty_batch_changes_nothing():
    metric = ChannelVariance()
    metric.update(torch.tensor([[1.0, 2.0], [3.0, 2.0]]))
    metric.update(torch.zeros(0, 2))
    assert metric.compute().tolist() == [1.0, 0.0]


def test_the_state_of_the_observer_is_restored_bit_for_bit():
    net, (first, second) = Small().eval(), batches(3, 8, 8)
    graph = trace(net, first)
    with ConsumerInputs(graph, net) as whole, torch.no_grad():
        net(first)
        state = copy.deepcopy(whole.state())
        net(second)
    resumed = ConsumerInputs(graph, net)
    resumed.load(state)
    with resumed, torch.no_grad():
        net(second)
    expected = whole.compute()
    assert resumed.compute().keys() == expected.keys()
    assert all(np.array_equal(values, expected[key]) for key, values in resumed.compute().items())


def test_hooks_are_removed_and_paused_observers_do_not_count():
    net, (first, second) = Small().eval(), batches(3, 8, 8)
    with ConsumerInputs(trace(net, first), net) as inputs, torch.no_grad():
        net(first)
        expected = inputs.compute()
        inputs.active = False
        net(second)
    assert all(np.array_equal(values, expected[key]) for key, values in inputs.compute().items())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in net.modules())


@torch.no_grad()
def test_a_layer_given_to_a_function_is_taken_to_read_equal_variances():
    def run(net: Net, x: Tensor) -> Tensor:
        x = F.relu(net.first(x))
        return F.linear(x, net.second.weight) + net.third(F.relu(net.other(x)))

    net = Net(
        run, first=nn.Linear(2, 3), second=nn.Linear(3, 2), other=nn.Linear(3, 4), third=nn.Linear(4, 2)
    )
    x = torch.cat(batches(2))
    graph = trace(net, x)
    with ConsumerInputs(graph, net) as inputs:
        net(x)
    assert "second.weight:1" not in inputs.compute()
    energy = net.other.weight.square() * F.relu(net.first(x)).var(0)
    expected = shares_of(net.second.weight.square()) + shares_of(energy)
    values = output_energy(graph, net, inputs.compute())[graph.layers["first.weight"]]
    np.testing.assert_allclose(values, expected, rtol=1e-5)


def test_no_batch_raises_and_says_what_to_do():
    net = Small().eval()
    graph = trace(net, torch.zeros(1, 3, 8, 8))
    for criterion in (OutputEnergy(), IPAD(0.5, terms="energy")):
        with pytest.raises(ValueError, match="did any batch run"):
            criterion(graph, net, {})
    assert np.isfinite(energy_importance(graph, net, omega=1.0)[graph.prunable]).all()


def test_activations_that_are_not_finite_are_named():
    net = Small().eval()
    x = torch.full((1, 3, 8, 8), float("nan"))
    with pytest.raises(ValueError, match=r"activations of '\w+' were NaN or infinite"):
        scores(SHARES, net, torch.zeros(1, 3, 8, 8), x)


def test_unknown_terms_are_refused():
    with pytest.raises(ValueError, match="terms"):
        IPAD(terms="power")
