"""One thread, a fixed seed and no compiled code for every test and example: no result depends on their order."""

from __future__ import annotations

import sys

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread_and_a_fixed_seed():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if compiler := sys.modules.get("torch._dynamo"):
        compiler.reset()  # else code that earlier tests compiled counts towards the limit of recompilations
    yield
    torch.set_num_threads(threads)
