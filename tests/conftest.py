"""One thread and a fixed seed for every test, so that results do not depend on their order or the machine."""

from __future__ import annotations

import pytest
import torch

collect_ignore = ["support/ray_search.py"]  # a program that a test starts; Ray need not be installed


@pytest.fixture(autouse=True)
def _one_thread_and_a_fixed_seed():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
