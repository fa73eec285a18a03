"""Only cuts of networks whose code is all of known packages may be proven without running the smaller network."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
import torchvision
from torch import Tensor, nn

from lightning_prune import prune_, trace
from lightning_prune.surgery import proof
from lightning_prune.surgery.known_code import is_known_code

KNOWN: dict[str, Callable[[], nn.Module]] = {
    "torchvision": torchvision.models.mobilenet_v3_small,
    "timm": lambda: timm.create_model("convnext_atto"),
    "smp": lambda: smp.Unet("resnet18", encoder_weights=None),
    "weight norm": lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 8, 1)),
}


class Own(nn.ReLU):
    """A class of one's own."""


def act(x: Tensor) -> Tensor:
    return x.relu()


def with_hook() -> nn.Module:
    net = nn.Conv2d(3, 8, 1)
    net.register_forward_hook(lambda module, args, out: out.relu())
    return net


def with_forward() -> nn.Module:
    net = nn.Conv2d(3, 8, 1)
    net.forward = lambda x: act(x)  # type: ignore[method-assign]
    return net


def holding(value: object) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        net = nn.Conv2d(3, 8, 1)
        net.value = value
        return net

    return build


UNKNOWN: dict[str, Callable[[], nn.Module]] = {
    "class": lambda: nn.Sequential(nn.Conv2d(3, 8, 1), Own()),
    "hook": with_hook,
    "forward of an instance": with_forward,
    "function": holding(act),
    "functions in a list": holding([act]),
    "callable object": holding({"act": Own}),
    "generated code": lambda: torch.fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 8, 1))),
    "script": lambda: torch.jit.script(nn.Conv2d(3, 8, 1)),
}


@pytest.mark.parametrize("name", KNOWN)
def test_networks_of_known_packages_are_known(name: str) -> None:
    assert is_known_code(KNOWN[name]())


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("name", UNKNOWN)
def test_networks_with_code_of_others_are_not(name: str) -> None:
    assert not is_known_code(UNKNOWN[name]())


def test_hooks_of_all_modules_are_code_of_others() -> None:
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: None)
    try:
        assert not is_known_code(nn.ReLU())
    finally:
        handle.remove()
    assert is_known_code(nn.ReLU())


@pytest.mark.parametrize(("act", "asked"), [(nn.ReLU, 1), (Own, 0)])
def test_a_network_with_own_code_is_run_after_the_cut(
    act: type[nn.Module], asked: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers: list[bool] = []
    is_proven = proof.is_proven

    def ask(*arguments: object) -> bool:
        answers.append(is_proven(*arguments))  # type: ignore[arg-type]
        return answers[-1]

    monkeypatch.setattr(proof, "is_proven", ask)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), act(), nn.Conv2d(8, 2, 1))
    graph = trace(net, torch.zeros(1, 3, 8, 8))
    assert prune_(net, graph, graph.prunable[:4])
    assert answers == [True] * asked
