"""Blocks with a seed leave no trace in the generators, those of GPUs included."""

from __future__ import annotations

import pytest
import torch

from lightning_prune.utils import seeding
from lightning_prune.utils.seeding import seeded, torch_generators


def test_generators_of_all_gpus_are_restored(monkeypatch: pytest.MonkeyPatch):
    second = torch.Generator().manual_seed(3)
    monkeypatch.setattr(seeding, "torch_generators", lambda: [torch.default_generator, second])
    expected = torch.rand(2, generator=torch.Generator().manual_seed(3))
    with seeded(0):
        torch.rand(5, generator=second)
    assert torch.equal(torch.rand(2, generator=second), expected)


def test_gpus_that_are_not_in_use_yet_get_the_seed_of_the_process_again(monkeypatch: pytest.MonkeyPatch):
    seeds: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    torch.manual_seed(42)
    with seeded(0):
        pass
    assert seeds[-1] == 42
    assert torch_generators() == [torch.default_generator]
