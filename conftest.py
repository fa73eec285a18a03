"""One thread, fixed seeds and no compiled code for every test and example: no result depends on their order."""

from __future__ import annotations

import random
import sys

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread_and_fixed_seeds(monkeypatch: pytest.MonkeyPatch):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    monkeypatch.delenv(
        "PL_GLOBAL_SEED", raising=False
    )  # of an earlier test: samplers of processes shuffle by it
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - data sets of tests draw from the global generator, as people's do
    if compiler := sys.modules.get("torch._dynamo"):
        compiler.reset()  # else code that earlier tests compiled counts towards the limit of recompilations
    yield
    torch.set_num_threads(threads)
