"""Tests that observed statistics do not depend on accumulation, precision, compilation and clipping.

Two processes: ``test_ddp.py``. Resumed within an epoch: ``test_schedules.py``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from lightning_prune import trace
from tests.support.ddp_runs import LOOKING, Net, Normless, scored

pytestmark = pytest.mark.filterwarnings("ignore:.*(many workers|GPU available|LeafSpec)")


class Compiled(Normless):
    """The whole module is compiled, so that forward hooks do not run."""

    def __init__(self) -> None:
        super().__init__()
        self.compile(backend="eager")


class CompiledPart(Normless):
    """Only the network is compiled."""

    def __init__(self) -> None:
        super().__init__()
        self.net.compile(backend="eager")


def first_statistics(name: str, **options: Any) -> dict[str, np.ndarray]:
    """Return the statistics that the criterion received for its first cut."""
    (first, *_) = scored(name, devices=1, **options)["seen"]
    assert first
    return {key: np.array(values) for key, values in first.items()}


def assert_close(statistics: dict[str, np.ndarray], expected: dict[str, np.ndarray], rtol: float) -> None:
    assert statistics.keys() == expected.keys()
    for key, values in expected.items():
        assert (values > 0).any()
        np.testing.assert_allclose(statistics[key], values, rtol=rtol, atol=rtol * values.max())


@pytest.mark.parametrize("name", LOOKING)
def test_accumulated_gradients_equal_those_of_the_larger_batch(name: str) -> None:
    assert_close(
        first_statistics(name, batch=4, accumulate_grad_batches=2), first_statistics(name, batch=8), 1e-4
    )


@pytest.mark.parametrize("name", LOOKING)
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_other_precisions_differ_by_rounding_only(name: str, precision: str) -> None:
    rtol = {"bf16-mixed": 0.1, "bf16-true": 0.3, "64-true": 1e-3}[precision]
    assert_close(first_statistics(name, precision=precision), first_statistics(name), rtol)


@pytest.mark.parametrize("name", LOOKING)
@pytest.mark.parametrize("module", [Compiled, CompiledPart])
def test_compiled_code_is_observed(name: str, module: type[Net]) -> None:
    """Gradients are observed in training; activations in a separate pass, as with ``statistics="pass"``."""
    expected = first_statistics(name, statistics="pass")
    assert_close(first_statistics(name, module=module), expected, 1e-5)
    assert_close(first_statistics(name, module=module, statistics="pass"), expected, 1e-5)


@pytest.mark.parametrize("name", LOOKING)
def test_gradients_are_observed_before_clipping(name: str) -> None:
    """Only the first step is compared: clipping changes the weights of the next ones."""
    one = {"limit_train_batches": 1}
    assert_close(first_statistics(name, gradient_clip_val=1e-3, **one), first_statistics(name, **one), 1e-6)


def test_gradients_that_overflow_are_ignored() -> None:
    """If the scale of a gradient scaler is too large, gradients are infinite and the step is skipped."""
    net = Normless().net
    observer = LOOKING["weight"].observer(trace(net, torch.zeros(1, 1, 12, 12)), net)
    expected = {}
    for scale in (1.0, float("inf"), float("nan")):
        net.zero_grad()
        (net(torch.ones(2, 1, 12, 12)).square().sum() * scale).backward()
        observer.on_step(net.parameters())
        expected = expected or observer.compute()
    assert_close(observer.compute(), expected, 0)
