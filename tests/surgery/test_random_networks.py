"""Random networks, cut at random: proven and right, or refused and as before.

A few hundred here; ``python -m benchmarks.robustness.random_nets --cases 3000`` runs as many as you like.
"""

from __future__ import annotations

import hypothesis
import pytest
from hypothesis import HealthCheck, Phase, given
from hypothesis import strategies as st

from tests.support.random_blocks import examine_blocks
from tests.support.random_cuts import examine
from tests.support.random_nets import BLOCKS, N, Net, nets

hypothesis.settings.register_profile(
    "random-nets",
    max_examples=200,
    derandomize=True,
    deadline=None,
    database=None,
    phases=(Phase.explicit, Phase.generate, Phase.shrink),
    suppress_health_check=list(HealthCheck),
)
PROFILE = hypothesis.settings.get_profile("random-nets")
SEEDS = st.integers(0, 9)
SHARES = st.sampled_from([0.1, 0.3, 0.5, 0.8, 1.0])


@PROFILE
@given(net=nets(), seed=SEEDS, share=SHARES)
def test_a_cut_is_right_or_refused(net: Net, seed: int, share: float) -> None:
    examine(net, seed, share)


@hypothesis.settings(PROFILE, max_examples=60)
@given(net=nets(), seed=SEEDS, share=SHARES)
def test_units_whose_statistics_mix_go_as_predicted(net: Net, seed: int, share: float) -> None:
    examine(net, seed, share, mixing=True)


@hypothesis.settings(PROFILE, max_examples=60)
@given(net=st.one_of(nets(only="Skip"), nets()), seed=SEEDS, share=SHARES)
def test_residual_blocks_vanish_as_if_their_branches_were_zero(net: Net, seed: int, share: float) -> None:
    examine_blocks(net, seed, share)


@pytest.mark.parametrize("kind", sorted(BLOCKS))
def test_every_block_builds_runs_and_prints_what_makes_it(kind: str) -> None:
    found: list[Net] = []

    @hypothesis.settings(PROFILE, max_examples=3)
    @given(net=nets(depth=1, only=kind))
    def collect(net: Net) -> None:
        found.append(net)

    collect()
    for net in found:
        assert repr(eval(repr(net), {"Net": Net, "N": N})) == repr(net)
        net.build()(net.example())
