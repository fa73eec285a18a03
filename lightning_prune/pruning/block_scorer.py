"""Scores of residual blocks, and comparison of plans in which different numbers of them vanish, on some images."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_prune.compensation.calibration import CompensationError, CompensationSettings
from lightning_prune.compensation.repair import cut_and_compensate_
from lightning_prune.criteria.block_scores import Loss, block_scores
from lightning_prune.graph.block_search import blocks_of
from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.graph.layer_costs import dense_trace_of
from lightning_prune.graph.trace import trace
from lightning_prune.pruning.cut_repair import num_images
from lightning_prune.selection.depth_settings import DepthSettings
from lightning_prune.selection.plan import Plan
from lightning_prune.surgery.prune import SurgeryError
from lightning_prune.utils.passing import is_passing

__all__ = ["BlockScorer"]

#: network, number of images -> batches with so many images in all
Images = Callable[[nn.Module, int], Sequence[Any]]
REPAIR = CompensationSettings(refit=False)  # the second fit does not change how far the outputs are off


@dataclass(frozen=True)
class BlockScorer:
    """Scores the residual blocks of a network on batches, and says what the network loses by a plan.

    Args:
        settings: of the blocks.
        images: returns batches.
        loss: for scores that need one.
        context: within which the network runs.

    Example:
        >>> import torch
        >>> from lightning_prune import trace
        >>> from lightning_prune.classification.networks.cifar_resnet import CifarResNet
        >>> net, images = CifarResNet(depth=8, width=4), torch.rand(8, 1, 16, 16)
        >>> scorer = BlockScorer(DepthSettings(), lambda network, number: [images[:number]])
        >>> list(scorer(trace(net, images[:1])))
        ['blocks.0']
    """

    settings: DepthSettings
    images: Images
    loss: Loss | None = None
    context: Callable[[], AbstractContextManager[Any]] = nullcontext

    def __call__(self, graph: ChannelGraph) -> Mapping[str, float]:
        """Return the importance of each residual block that may vanish."""
        blocks = blocks_of(graph)
        batches = self.images(blocks.model, self.settings.images)
        with self.context():
            return block_scores(blocks, batches, self.settings.score, self.loss)

    def change(self, graph: ChannelGraph, plan: Plan) -> float:
        """Return how far the outputs are off when a copy is cut by a plan and repaired: a share of their variance.

        It is measured on images that the repair does not see. It is infinite if surgery refuses the plan, and NaN if
        the outputs cannot be compared on these batches, or memory does not suffice for that.
        """
        try:
            return self._change(graph, plan)
        except SurgeryError:
            return math.inf
        except CompensationError:
            return math.nan
        except Exception as error:
            if is_passing(error):
                return math.nan
            raise

    def _change(self, graph: ChannelGraph, plan: Plan) -> float:
        examples = dense_trace_of(graph).examples
        network = copy.deepcopy(blocks_of(graph).model)
        (args, kwargs), others = examples[0], [inputs or named for inputs, named in examples[1:]]
        same = trace(network, *args, others=others, **kwargs)
        with self.context():
            number = num_images(network, examples[0], REPAIR)
        batches = self.images(network, number)
        with self.context():
            _, report = cut_and_compensate_(
                network, same, plan.remove, batches, settings=REPAIR, blocks=plan.blocks
            )
        return min(report.change_before, report.change_after)
