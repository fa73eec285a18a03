"""The hypothesis strategies of specs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

from tests.support.random_nets import (
    branches,
    caches,
    channels,
    gates,
    grouped,
    layers,
    numbers,
    positions,
    repeated,
    skips,
    tokens,
    values,
)
from tests.support.random_nets.network import HEADS, OUTPUTS, SIZES, Net
from tests.support.random_nets.registry import BLOCKS, BODIES, OPTIONS, N, flags, pick

# The order of blocks, which decides what a seed draws, must not depend on the order of imports.
_FILES = (
    layers,
    gates,
    branches,
    channels,
    tokens,
    repeated,
    grouped,
    positions,
    numbers,
    caches,
    values,
    skips,
)
_MODULES = [module.__name__.rpartition(".")[2] for module in _FILES]
KINDS = sorted(BLOCKS, key=lambda kind: _MODULES.index(BLOCKS[kind].__module__.rpartition(".")[2]))
PLAIN = [kind for kind in KINDS if not BODIES[kind]]
NESTING = [kind for kind in KINDS if BODIES[kind]]


@st.composite
def nodes(draw: Any, depth: int, kinds: Sequence[str] | None = None) -> N:
    """Draw a block, one of ``kinds`` if given; without that, blocks with bodies only if ``depth`` > 0."""
    plain = pick(["Conv", "Conv", *PLAIN])
    kind = draw(pick(kinds) if kinds else st.one_of(plain, pick(NESTING)) if depth else plain)
    bodies = [draw(st.lists(nodes(max(depth - 1, 0)), max_size=2)) for _ in range(BODIES[kind])]
    return N(kind, *bodies, **{name: draw(option) for name, option in OPTIONS[kind].items()})


@st.composite
def nets(draw: Any, depth: int = 2, only: str = "") -> Net:
    """Draw a network; of blocks of kind ``only`` if that is given, with any blocks in their bodies."""
    body = draw(st.lists(nodes(depth, [only] if only else None), min_size=1, max_size=4))
    return Net(tuple(body), draw(HEADS), draw(OUTPUTS), draw(SIZES), draw(flags))
