"""RITnet and the U-Net: published sizes, pruning checked by two oracles, defects of IPAD's published code."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_prune import IPAD, Limits, RecordError, load_pruned, prune_, save_pruned, select, trace
from lightning_prune.criteria import Random, ipad_importance
from lightning_prune.distillation.config import Distillation
from lightning_prune.distillation.losses import attention, fsp
from lightning_prune.distillation.taps import record_outputs
from lightning_prune.segmentation.networks.ritnet import RITnet
from lightning_prune.segmentation.networks.unet import UNet
from lightning_prune.selection.dense_sizes import DenseSizes
from lightning_prune.testing import error, randomise_, with_dead_filters
from tests.support.nets import counted_macs, cut, parameters
from tests.support.students import ALL_LOSSES, QUIET, data, pruning, student, trainer

pytestmark = QUIET
SMALL: dict[str, Callable[[], nn.Module]] = {"RITnet": lambda: RITnet(width=8), "UNet": lambda: UNet(width=8)}


@pytest.fixture(params=SMALL)
def name(request: pytest.FixtureRequest) -> str:
    torch.set_num_threads(1)
    return str(request.param)


@pytest.fixture
def net(name: str) -> nn.Module:
    torch.manual_seed(0)
    return randomise_(SMALL[name]()).eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 1, 32, 48, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("kind", "size", "macs"), [(RITnet, 248_900, 16_420_864_000), (UNet, 17_266_436, 155_926_528_000)]
)
def test_parameters_and_macs_equal_the_published_ones(kind, size, macs):
    """248,900 and 17.27 M parameters, 16.42 and 155.93 GMAC. The meta device computes no values."""
    with torch.device("meta"):
        net, image = kind(), torch.zeros(1, 1, 640, 400)
    assert parameters(net) == size
    assert counted_macs(net, image) == macs


def test_costs_of_the_graph_equal_the_counted_ones(net, x):
    graph = trace(net, x[:1])
    assert graph.cost("params") == parameters(net)
    assert graph.cost("macs") == counted_macs(net, x[:1])


def test_removing_a_random_half_agrees_with_both_oracles(name, x):
    torch.manual_seed(0)
    result = cut(SMALL[name](), x)
    assert result.dead < 1e-5
    assert result.zeroed < 1e-5
    assert parameters(result.model) == result.graph.cost("params", result.remove) < parameters(result.dense)


def test_defect_1_removing_a_dead_filter_of_any_convolution_changes_nothing(net, x):
    """Published code: layers after a concatenation lost the producer's own index. Here one filter per layer goes."""
    graph = trace(net, x)
    last = {name: [u for u in units.tolist() if u in graph.prunable] for name, units in graph.layers.items()}
    remove = np.unique([units[-1] for units in last.values() if units])
    assert sum(bool(units) for units in last.values()) == len(graph.layers) - 1  # all but the classes
    dead = with_dead_filters(net, graph, remove)
    before = parameters(net)
    prune_(net, graph, remove)
    assert error(dead, net, x) < 1e-5
    assert parameters(net) < before


def test_defect_2_activations_are_of_all_batches_and_later_forwards_do_not_change_them(net, x):
    """Published code: of the last batch only, overwritten by a forward on zeros that counted FLOPs."""
    graph, batches = trace(net, x), [x, x[:1] * 3 + 1]
    layer = net.get_submodule("down.1.conv1" if isinstance(net, RITnet) else "down.1.3")
    weight = next(name for name, p in net.named_parameters() if p is layer.weight)
    outputs: list[Tensor] = []
    handle = layer.register_forward_hook(lambda module, args, out: outputs.append(out.detach()))
    criterion = IPAD(omega=0.0, scale=1.0, grid=None)
    collector = criterion.observer(graph, net)
    assert collector is not None
    collector.attach()
    for batch in batches:
        net(batch)
    collector.detach()
    handle.remove()
    mean = torch.cat(outputs).mean(0)
    expected = (mean - mean.mean(0)).abs().mean((1, 2))
    counted_macs(net, torch.zeros_like(x))
    trace(net, torch.zeros_like(x))
    statistics = collector.compute()
    np.testing.assert_allclose(statistics[weight], expected, rtol=1e-4)
    scores = criterion(graph, net, statistics)[graph.layers[weight]]
    np.testing.assert_allclose(scores, expected, rtol=1e-4)


def test_defect_3_no_noise_changes_the_order_of_scores(net, x):
    """Published code: noise of 1e3 added to scores in [0, 1]."""
    graph = trace(net, x)
    scores = ipad_importance(graph, net, omega=1)
    scores = scores / scores[np.isfinite(scores)].max()
    plans = [select(graph, scores, {"macs": 0.6}, limits=Limits(1.0)) for _ in range(2)]
    removed = scores[plans[0].remove]
    assert (np.diff(removed) >= 0).all()
    assert np.array_equal(plans[0].remove, plans[1].remove)


def test_defect_4_weights_that_do_not_fit_are_refused_and_those_that_do_are_loaded(name, net, x, tmp_path):
    """Published code: "pretrained" weights of which none was loaded."""
    graph, fresh = trace(net, x), SMALL[name]().eval()
    record = prune_(net, graph, select(graph, ipad_importance(graph, net, omega=1), {"macs": 0.5}))
    save_pruned(net, record, tmp_path / "small.safetensors")
    load_pruned(fresh, tmp_path / "small.safetensors")
    torch.testing.assert_close(fresh.eval()(x), net(x))
    other = SMALL["UNet" if name == "RITnet" else "RITnet"]()
    before = {key: tensor.clone() for key, tensor in other.state_dict().items()}
    with pytest.raises(RecordError):
        load_pruned(other, tmp_path / "small.safetensors")
    assert all(torch.equal(tensor, before[key]) for key, tensor in other.state_dict().items())


def test_defect_5_limits_that_exclude_every_filter_end_pruning(net, x):
    """Published code: a crash."""
    graph = trace(net, x)
    scores, no_removal = ipad_importance(graph, net, omega=1), Limits(layers=0.0)
    plan = select(graph, scores, {"macs": 0.5}, limits=no_removal, dense=DenseSizes.of(graph))
    assert (len(plan), plan.stopped, plan.reached) == (0, "limits", False)
    with pytest.raises(ValueError, match="cannot be met: limits, exclusions and pinned filters"):
        select(graph, scores, {"macs": 0.5}, limits=no_removal)


def test_defect_6_distillation_works_after_the_tapped_layers_are_pruned(net):
    """Published code: needs equal channel counts. Here FSP compares kept channels; attention maps work with any."""
    taps = ["down.1.conv1", "up.2.conv2"] if isinstance(net, RITnet) else ["down.1.3", "up.2.3"]
    for dropout in net.modules():
        if isinstance(dropout, nn.Dropout):
            dropout.p = 0.0
    teacher = copy.deepcopy(net.train())
    module = student(Distillation(teacher, **ALL_LOSSES, taps=taps, submodule="net"), net=net, example=False)
    module.lr = 0.0  # only cuts change the network
    callback, fit = pruning(amount={"macs": 0.3}, criterion=Random()), trainer(epochs=3)
    fit.callbacks.append(callback)
    (batch,) = data(number=8, size=32)
    fit.fit(module, data(number=8, size=32))

    widths = [net.get_submodule(tap).out_channels for tap in taps]
    assert all(
        width < teacher.get_submodule(tap).out_channels for width, tap in zip(widths, taps, strict=True)
    )
    assert [cut.epoch for cut in callback.history] == [0, 1]
    with (
        torch.no_grad(),
        record_outputs(net.train(), taps) as ours,
        record_outputs(teacher.eval(), taps) as theirs,
    ):
        net(batch[0]), teacher(batch[0])
    kept = [theirs[tap][:, list(callback.record.kept[f"{tap}.weight"][0])] for tap in taps]
    losses = {"attention": sum(attention(ours[tap], theirs[tap]) for tap in taps)}
    losses["fsp"] = fsp((ours[taps[0]], ours[taps[1]]), (kept[0], kept[1]))
    for name, expected in losses.items():
        assert expected > 0
        assert fit.callback_metrics[f"distill/{name}"].item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "amount"), [(RITnet, 1.0 / 16.42), (UNet, 10.0 / 155.93)])
def test_at_full_width_the_published_steps_lead_to_26_percent(kind, amount):
    """1 G and 10 G at a time, at most 75 % of a layer's parameters, each cut proven; torch counts the MACs left."""
    torch.manual_seed(0)
    net, image, cuts = randomise_(kind()).eval(), torch.randn(1, 1, 16, 16), 0
    dense, graph = counted_macs(net, image), trace(net, image)
    sizes = DenseSizes.of(graph)
    while graph.cost("macs") > 0.26 * dense:
        plan = select(
            graph, ipad_importance(graph, net, omega=1), {"macs": 0.26}, amount={"macs": amount}, dense=sizes
        )
        assert len(plan)
        prune_(net, graph, plan)
        graph, cuts = trace(net, image), cuts + 1
    assert cuts in (12, 13)
    assert 0.25 * dense < counted_macs(net, image) <= 0.26 * dense
    assert net(image).shape == (1, 4, 16, 16)
