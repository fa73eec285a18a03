"""One thread, a fixed seed and no compiled code for every test: results do not depend on order or machine."""

from __future__ import annotations

import sys

import pytest
import torch

torch.manual_seed(0)  # for networks that are built while tests are collected
collect_ignore = ["support/ray_search.py"]  # a program that a test starts; Ray need not be installed


@pytest.fixture(autouse=True)
def _one_thread_and_a_fixed_seed():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if compiler := sys.modules.get("torch._dynamo"):
        compiler.reset()  # else code that earlier tests compiled counts towards the limit of recompilations
    yield
    torch.set_num_threads(threads)
