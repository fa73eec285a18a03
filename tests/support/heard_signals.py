"""A fixture for tests that send SIGINT to their own process."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

__all__ = ["heard"]


@pytest.fixture(autouse=True)
def heard() -> Iterator[None]:
    """Let the process hear SIGINT, which shells have background jobs ignore."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
