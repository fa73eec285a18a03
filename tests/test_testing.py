"""Whole networks from other libraries: after a random cut, they compute what the two oracles expect.

Half of the prunable units are removed, without those under layer or group norm, for which the oracles do not hold
(see ``lightning_prune.testing``). Outputs are compared in eval mode on two samples, parameters and MACs with the
predicted ones. Finally the pruned network is trained for a few steps.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import segmentation_models_pytorch as smp
import timm
import torch
import torchvision.models as tv
from torch import nn
from torch.nn import functional as F

from lightning_prune import trace
from lightning_prune.tracing.calls import tensors_in
from tests.support.nets import Outcome, counted_macs, cut, parameters

TOLERANCE = 1e-5


@dataclass
class Case:
    """A network, the size of its input, and the reasons why an oracle or torch's counter does not apply to it."""

    build: Callable[[], nn.Module]
    size: int = 64
    not_dead: str = ""
    not_zeroed: str = ""
    not_counted: str = ""


def smp_case(decoder: str, encoder: str, size: int = 64) -> Case:
    return Case(lambda: getattr(smp, decoder)(encoder, encoder_weights=None, classes=3), size)


def tv_case(name: str, size: int = 64) -> Case:
    options = {"init_weights": True} if name == "googlenet" else {}
    return Case(lambda: getattr(tv, name)(weights=None, num_classes=10, **options), size)


def timm_case(name: str, size: int, **reasons: str) -> Case:
    return Case(lambda: timm.create_model(name, num_classes=10), size, **reasons)


FUSED = "torch's counter counts nothing for fused attention on the CPU"
PAIRED = "query and key channels meet each other, no weight reads them"
DECODERS = ["Unet", "UnetPlusPlus", "Linknet", "FPN", "PSPNet", "DeepLabV3", "DeepLabV3Plus", "PAN", "MAnet"]

CASES = {
    **{f"{name}-resnet34": smp_case(name, "resnet34", 128 if name == "PAN" else 64) for name in DECODERS},
    **{
        f"Unet-{name}": smp_case("Unet", name, 32)
        for name in ("mobilenet_v2", "efficientnet-b0", "densenet121")
    },
    **{
        name: tv_case(name)
        for name in (
            "resnet50",
            "resnext50_32x4d",
            "shufflenet_v2_x1_0",
            "googlenet",
            "mobilenet_v3_large",
            "regnet_y_400mf",
        )
    },
    "MAnet-resnet34": Case(smp_case("MAnet", "resnet34").build, 64, not_zeroed=PAIRED),
    "vgg16_bn": tv_case("vgg16_bn", 32),
    "vit_tiny": Case(
        lambda: timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=10), 64, not_counted=FUSED
    ),
    "res2net50_26w_4s": timm_case("res2net50_26w_4s", 64),
    "cspresnet50": timm_case("cspresnet50", 64),
    "levit_128s": timm_case("levit_128s", 224),
    "botnet26t_256": timm_case("botnet26t_256", 256),
}


@pytest.fixture(params=CASES, scope="module")
def case(request):
    return CASES[request.param]


@pytest.fixture(scope="module")
def x(case):
    return torch.randn(2, 3, case.size, case.size, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def outcome(case, x) -> Outcome:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    return cut(case.build(), x)


def test_pruned_network_equals_the_dense_one_with_dead_filters(case, outcome):
    if case.not_dead:
        pytest.skip(case.not_dead)
    assert outcome.dead < TOLERANCE


def test_pruned_network_equals_the_dense_one_with_zeroed_consumers(case, outcome):
    if case.not_zeroed:
        pytest.skip(case.not_zeroed)
    assert outcome.zeroed < TOLERANCE


def test_parameters_and_macs_are_as_predicted(case, outcome, x):
    assert (
        parameters(outcome.model) == outcome.graph.cost("params", outcome.remove) < parameters(outcome.dense)
    )
    after = trace(outcome.model, x)
    assert after.cost("macs") == outcome.graph.cost("macs", outcome.remove) < outcome.graph.cost("macs")
    if not case.not_counted:
        assert after.cost("macs") == counted_macs(outcome.model, x)


def test_all_dimensions_keep_channels_and_some_filters_are_removed(outcome):
    remaining = outcome.graph.widths(outcome.remove)
    assert min(remaining.values()) >= 1
    assert all(tensor.numel() for tensor in outcome.model.state_dict().values())
    before = outcome.graph.widths()
    assert sum(remaining.values()) < 0.95 * sum(before.values())
    for name, width in remaining.items():
        shape = dict(outcome.model.named_parameters())[name].shape
        assert shape[outcome.graph.filter_dims[name]] == width


def test_training_reduces_the_loss(outcome, x):
    model = copy.deepcopy(outcome.model).train()
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.5)
    target, losses = None, []
    for _ in range(4):
        torch.manual_seed(0)
        out = tensors_in(model(x))[0]
        target = torch.zeros_like(out[:, 0], dtype=torch.int64) if target is None else target
        loss = F.cross_entropy(out, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0]
    pairs = zip(model.parameters(), outcome.model.parameters(), strict=True)
    moved = [not torch.equal(now, before) for now, before in pairs if now.grad is not None]
    assert all(p.grad is None or p.grad.shape == p.shape for p in model.parameters())
    assert len(moved) > 10
    assert np.mean(moved) > 0.7  # a bias before a batch norm has no gradient
