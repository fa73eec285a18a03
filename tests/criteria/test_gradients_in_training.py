"""Criteria that look at training see the same, however it is run: accumulated, in half precision, compiled.

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
    """As a whole; hooks see nothing of it."""

    def __init__(self) -> None:
        super().__init__()
        self.compile(backend="eager")


class CompiledPart(Normless):
    """The network only."""

    def __init__(self) -> None:
        super().__init__()
        self.net.compile(backend="eager")


def told(name: str, **options: Any) -> dict[str, np.ndarray]:
    """What the criterion was told before its first cut."""
    (first, *_) = scored(name, devices=1, **options)["seen"]
    assert first
    return {key: np.array(values) for key, values in first.items()}


def assert_close(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], rtol: float) -> None:
    assert found.keys() == expected.keys()
    for key, values in expected.items():
        assert (values > 0).any()
        np.testing.assert_allclose(found[key], values, rtol=rtol, atol=rtol * values.max())


@pytest.mark.parametrize("name", LOOKING)
def test_accumulated_gradients_are_those_of_the_larger_batch(name: str) -> None:
    assert_close(told(name, batch=4, accumulate_grad_batches=2), told(name, batch=8), 1e-4)


@pytest.mark.parametrize("name", LOOKING)
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_other_precisions_differ_by_their_rounding(name: str, precision: str) -> None:
    rtol = {"bf16-mixed": 0.1, "bf16-true": 0.3, "64-true": 1e-3}[precision]
    assert_close(told(name, precision=precision), told(name), rtol)


@pytest.mark.parametrize("name", LOOKING)
@pytest.mark.parametrize("module", [Compiled, CompiledPart])
def test_compiled_code_is_seen_too(name: str, module: type[Net]) -> None:
    """Gradients as without; activations in a pass of its own, as ``statistics="pass"`` does."""
    expected = told(name, statistics="pass")
    assert_close(told(name, module=module), expected, 1e-5)
    assert_close(told(name, module=module, statistics="pass"), expected, 1e-5)


@pytest.mark.parametrize("name", LOOKING)
def test_clipping_comes_after(name: str) -> None:
    """The first step's gradients are the same, clipped or not, but the next weights are not."""
    one = {"limit_train_batches": 1}
    assert_close(told(name, gradient_clip_val=1e-3, **one), told(name, **one), 1e-6)


def test_gradients_that_overflow_do_not_count() -> None:
    """What a scaler leaves when its scale was too large is infinite, and the step is left out."""
    net = Normless().net
    gradients = LOOKING["weight"].observer(trace(net, torch.zeros(1, 1, 12, 12)), net)
    expected = {}
    for scale in (1.0, float("inf"), float("nan")):
        net.zero_grad()
        (net(torch.ones(2, 1, 12, 12)).square().sum() * scale).backward()
        gradients.on_step(net.parameters())
        expected = expected or gradients.compute()
    assert_close(gradients.compute(), expected, 0)
