"""What holds while tests are collected; conftest.py above has what holds for each of them."""

from __future__ import annotations

import torch

torch.manual_seed(0)  # for networks that are built while tests are collected
collect_ignore = ["support/ray_search.py"]  # a program that a test starts; Ray need not be installed
