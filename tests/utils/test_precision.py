"""Regressions multiply matrices in float32, whatever the process allows for training."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from lightning_prune import trace
from lightning_prune.compensation import cut_and_compensate_, layer_repair
from lightning_prune.utils.precision import exact_products

BACKENDS = (torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None))
NEW = pytest.mark.skipif(not hasattr(BACKENDS[0], "fp32_precision"), reason="torch before 2.9")


@pytest.fixture(autouse=True)
def _precision() -> Iterator[None]:
    yield
    torch.set_float32_matmul_precision("highest")
    for backend in filter(lambda each: hasattr(each, "fp32_precision"), BACKENDS):
        backend.fp32_precision = "none"


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_the_precision_of_products_is_restored(precision: str):
    torch.set_float32_matmul_precision(precision)
    with exact_products():
        assert torch.get_float32_matmul_precision() == "highest"
    assert torch.get_float32_matmul_precision() == precision


@NEW
def test_the_precision_that_was_set_for_one_back_end_is_restored():
    torch.backends.cuda.matmul.fp32_precision = (
        "tf32"  # torch.get_float32_matmul_precision() raises from here on
    )
    with exact_products():
        assert torch.backends.cuda.matmul.fp32_precision == "ieee"
        assert torch.equal(torch.eye(3) @ torch.eye(3), torch.eye(3))
    assert torch.backends.cuda.matmul.fp32_precision == "tf32"


def test_a_repair_computes_its_regressions_in_float32(monkeypatch: pytest.MonkeyPatch):
    seen, original = [], layer_repair.fit

    def fit(*args, **kwargs):
        seen.append(torch.get_float32_matmul_precision())
        return original(*args, **kwargs)

    monkeypatch.setattr(layer_repair, "fit", fit)
    torch.set_float32_matmul_precision("high")
    net, images = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 1)), torch.rand(8, 3, 8, 8)
    graph = trace(net, images[:1])
    cut_and_compensate_(net, graph, graph.layers["0.weight"][:4], [images])
    assert seen
    assert set(seen) == {"highest"}
    assert torch.get_float32_matmul_precision() == "high"
