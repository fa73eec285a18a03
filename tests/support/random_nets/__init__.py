"""Random networks: a hypothesis strategy of specs, and the modules that they describe.

A spec is a list of :class:`N` nodes: each is the name of a block, with its options and its bodies, which are specs
again. The ``repr`` of a spec is the Python code that makes it. Every spec can be built for any number of input
channels (a number of groups is rounded down to a divisor), so hypothesis can shrink it freely.

All activations have f(0) = 0 and all gates multiply, so the dead-filter oracle is valid. In the blocks of
``NOT_BY_WEIGHTS`` activations are combined with activations of other positions or channels: there the
zeroed-consumer oracle is not valid.
"""

from tests.support.random_nets.network import Net
from tests.support.random_nets.registry import BLOCKS, N
from tests.support.random_nets.strategy import nets

__all__ = ["BLOCKS", "N", "Net", "nets"]
