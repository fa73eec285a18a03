"""Let random residual blocks of a random network vanish, and check the result. Used by tests and benchmarks."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import numpy as np

from lightning_prune import SurgeryError
from lightning_prune.graph.block_search import blocks_of
from lightning_prune.testing import error
from tests.support.random_cuts import (
    TOLERANCE,
    CheckFailed,
    Outcome,
    cut_at_random,
    same_state,
    state,
    traced,
)
from tests.support.random_nets import Net
from tests.support.residual_nets import largest_difference, make_deterministic_

__all__ = ["BlockOutcome", "examine_blocks"]


@dataclass
class BlockOutcome:
    """What became of one network.

    Attributes:
        blocks: number of blocks that may vanish.
        vanished: number of those that did.
        refusal: message, if surgery refused it.
        channels: the cut of channels that followed.
    """

    blocks: int = 0
    vanished: int = 0
    refusal: str = ""
    channels: Outcome = field(default_factory=Outcome)


def examine_blocks(net: Net, seed: int, share: float) -> BlockOutcome:
    """Let blocks vanish; compare with zero times their branches; apply the record again; then cut channels.

    Args:
        net: the spec.
        seed: of the choice of blocks and units.
        share: of the blocks, and of the units, about.

    Raises:
        CheckFailed: outputs, gradients or buffers differ in eval or train mode, the record gives another network, a
            refusal left something changed, or the cut of channels is wrong.
    """
    generator, model = np.random.default_rng(seed), net.build()
    make_deterministic_(model)
    names = list(blocks_of(traced(net, model)))
    outcome = BlockOutcome(blocks=len(names))
    if not names:
        return outcome
    chosen = generator.permutation(names)[: max(1, round(share * len(names)))].tolist()
    before, dense = state(model), copy.deepcopy(model)
    try:
        difference, record = largest_difference(model, net.example(), chosen)
    except SurgeryError as refusal:
        if not same_state(before, state(model)):
            raise CheckFailed(f"refused, but not rolled back: {refusal}") from refusal
        outcome.refusal = str(refusal)
        return outcome
    if not difference <= TOLERANCE:
        raise CheckFailed(f"differs from the network without {chosen}: {difference}")
    again = record.apply_(dense)
    again.load_state_dict(model.state_dict())
    if error(again.eval(), model.eval(), net.example()) > 0:
        raise CheckFailed("the record, applied to the dense network, gives a different network")
    outcome.vanished = len(chosen)
    # Modules may keep what they computed with gradients, which cannot be copied; the other network has none.
    outcome.channels = cut_at_random(net, again, traced(net, again), generator, share)
    return outcome
