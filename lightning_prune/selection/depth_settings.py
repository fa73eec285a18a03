"""Which residual blocks of a network may vanish."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal, get_args

from lightning_prune.criteria.block_scores import BlockMethod
from lightning_prune.graph.residual_blocks import ResidualBlocks
from lightning_prune.selection.layer_patterns import names_and_containers
from lightning_prune.utils.arguments import check_choice
from lightning_prune.utils.vanished import vanished_blocks

__all__ = ["BlockComparison", "DepthSettings", "candidate_blocks"]

BlockComparison = Literal["repaired", "scores"]


@dataclass(frozen=True)
class DepthSettings:
    """Which residual blocks may vanish, how many, and how they are scored.

    Args:
        score: how blocks are scored, see :func:`~lightning_prune.criteria.block_scores.block_scores`.
        blocks: exactly so many vanish; None: as many as cost the network least, together with the channels that then
            have to go for the budget.
        compare: how numbers of blocks are compared if ``blocks`` is None. ``"repaired"``: for each number a copy of
            the network is cut and repaired on the batches at hand, and the one whose outputs change least is taken;
            of more than eight numbers some are left out. ``"scores"``: by sums of scores, which takes no time, but
            lets too few blocks vanish.
        max_depth_ratio: at most this share of all blocks that may vanish.
        min_blocks: so many of the blocks of each stage (a run of blocks with one shape) that may vanish must stay.
        include: names or globs of blocks, or of modules in them or around them; only these may vanish.
        exclude: likewise; these stay.
        images: number of images for the scores.

    Raises:
        ValueError: a number is out of range, or the score is unknown.

    Example:
        >>> DepthSettings(max_depth_ratio=0.3, exclude=["layer1.*"]).score
        'outputs'
    """

    score: BlockMethod = "outputs"
    blocks: int | None = None
    compare: BlockComparison = "repaired"
    max_depth_ratio: float = 0.5
    min_blocks: int = 0
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    images: int = 64

    def __post_init__(self) -> None:
        check_choice("the score of blocks", self.score, get_args(BlockMethod))
        check_choice("compare", self.compare, get_args(BlockComparison))
        for argument in ("include", "exclude"):
            if isinstance(getattr(self, argument), str):
                raise ValueError(
                    f"{argument} is a list of names or globs, got a text: write [{getattr(self, argument)!r}]"
                )
        if not 0 <= self.max_depth_ratio <= 1:
            raise ValueError(f"max_depth_ratio must be a share from 0 to 1, got {self.max_depth_ratio}")
        if self.min_blocks < 0 or self.images < 1 or (self.blocks is not None and self.blocks < 0):
            raise ValueError("min_blocks and blocks must be 0 or more, images 1 or more")

    @classmethod
    def of(cls, depth: bool | DepthSettings | None) -> DepthSettings | None:
        """Return the settings that an argument ``depth`` stands for; None: no block vanishes."""
        if isinstance(depth, DepthSettings) or depth is None:
            return depth
        if not isinstance(depth, bool):
            raise ValueError(f"depth must be True, False or DepthSettings, got {depth!r}")
        return cls() if depth else None


def candidate_blocks(blocks: ResidualBlocks, settings: DepthSettings) -> list[str]:
    """Return the blocks that the settings let vanish, in the order of the forward.

    Raises:
        ValueError: a pattern matches no block, ``include`` names one that cannot vanish, or no block is left, unless
            some have vanished before.
    """
    gone = vanished_blocks(blocks.model)
    if not blocks.blocks and gone:
        return []
    if not blocks.blocks:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(blocks.fixed.items())[:3])
        raise ValueError(
            f"no residual block can vanish ({reasons or 'the network adds no branch to its input'})"
        )
    included = _matching(blocks, settings.include, "include") if settings.include else set(blocks)
    excluded = _matching(blocks, settings.exclude, "exclude")
    blocks.check(name for name in settings.include if name in blocks.fixed)
    if not included & {*blocks.blocks, *gone}:
        blocks.check(sorted(included))
    candidates = [name for name in blocks if name in included and name not in excluded]
    if not candidates and not gone:
        raise ValueError("include and exclude leave no residual block that could vanish")
    return candidates


def _matching(blocks: ResidualBlocks, patterns: Sequence[str], argument: str) -> set[str]:
    """Return the blocks, also those that cannot vanish, that patterns match by their own or a module's name."""
    others = (*blocks.fixed, *vanished_blocks(blocks.model))
    names = {name: {*names_and_containers([name])} for name in others}
    for name, block in blocks.blocks.items():
        names[name] = {*names_and_containers([name]), *block.modules}
    matched = set()
    for pattern in patterns:
        found = {name for name, aliases in names.items() if any(fnmatchcase(a, pattern) for a in aliases)}
        if not found:
            raise ValueError(
                f"{argument} {pattern!r} matches no residual block; there are {', '.join(list(names)[:6])}"
                f"{' and more' if len(names) > 6 else ''}"
            )
        matched |= found
    return matched
