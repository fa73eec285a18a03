"""Oracles for tests: three ways to compute what a pruned network must return, independent of how it was pruned.

All set parameters of the dense network to zero instead of removing them, and know nothing of the surgery:

- *Dead filters* (:func:`with_dead_filters`): the parameters of the removed filters are zero: rows of weights, biases,
  scale and shift of norms. This oracle holds where a zero stays zero on its way to the next layer: activation
  functions with f(0) = 0, multiplicative gates.
- *Zeroed consumers* (:func:`with_zeroed_consumers`): the weights are zero where they read the removed filters. This
  oracle holds where nothing else than weights reads them.
- *Masked statistics* (:func:`with_masked_statistics`): both at once, and norms, means and softmax across channels
  leave the removed channels out.

The first two do not hold for units whose removal changes statistics across channels (``graph.statistics_units``), the
third one does. Use double precision for sharp comparisons: there, correct networks differ by less than 1e-12.

Example:
    Check the pruning of a small network:

    >>> import copy
    >>> import torch
    >>> from torch import nn
    >>> import lightning_prune as lp
    >>> dense = randomise_(nn.Sequential(
    ...     nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)
    ... )).double()
    >>> pruned, image = copy.deepcopy(dense), torch.randn(2, 3, 16, 16).double()
    >>> graph = lp.trace(pruned, image)
    >>> remove = graph.prunable[:5]
    >>> record = lp.prune_(pruned, graph, remove)
    >>> error(with_dead_filters(dense, graph, remove), pruned, image) < 1e-12
    True
    >>> error(with_zeroed_consumers(dense, graph, remove), pruned, image) < 1e-12
    True
    >>> error(dense, pruned, image) > 1e-3
    True
"""

from __future__ import annotations

from lightning_prune.testing.masked_statistics import with_masked_statistics
from lightning_prune.testing.oracles import error, randomise_, with_dead_filters, with_zeroed_consumers

__all__ = ["error", "randomise_", "with_dead_filters", "with_masked_statistics", "with_zeroed_consumers"]
