"""Compose scenes of Fashion-MNIST's items on smooth noise, with masks; many scenes at a time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample, interpolate, max_pool2d

from lightning_prune.data.fashion_files import Items

__all__ = ["CLASS_NAMES", "CLASS_OF_ITEM", "SceneMaker", "SceneSamples"]

CLASS_NAMES = ("background", "tops", "trousers", "dress", "shoes", "bag")
#: class in the masks of each of Fashion-MNIST's ten classes
CLASS_OF_ITEM = torch.tensor([1, 2, 1, 3, 1, 4, 1, 4, 5, 4])
CHUNK = 256  # scenes that are drawn together from one generator
COARSE = 6  # side of the grid of random values that is enlarged to smooth noise


class SceneSamples:
    """Scenes in memory: images ``(n, s, s)`` and masks ``(n, s, s)``, both uint8."""

    def __init__(self, images: Tensor, masks: Tensor) -> None:
        self.images = images
        self.masks = masks

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return an image ``(1, s, s)`` float32 in 0 to 1 and its mask ``(s, s)`` int64."""
        return self.images[index, None].float() / 255, self.masks[index].long()


@dataclass(frozen=True)
class SceneMaker:
    """Draw scenes: each has ``per_scene`` items, the later ones in front, on smooth noise.

    The class of an item is drawn first, each of the five with equal probability. An item is mirrored, turned by up
    to 15 degrees, enlarged by 0.7 to 1.1, and its centre lies at least 8 pixels of a 48-pixel scene from the border.

    Args:
        size: side of the scenes in pixels.
        per_scene: number of items.
        noise: standard deviation of the noise that is added to each pixel.
    """

    size: int = 48
    per_scene: int = 3
    noise: float = 0.05

    def make(self, items: Items, count: int, seed: tuple[int, ...]) -> SceneSamples:
        """Return ``count`` scenes; fewer scenes of the same seed are the first ones of more.

        Args:
            items: the items to draw from.
            count: number of scenes.
            seed: numbers that determine the scenes.

        Raises:
            ValueError: there are no items of a class.
        """
        pools = self._pools(items)
        chunks = range(-(-count // CHUNK))
        parts = [self._chunk(items.images, pools, _generator(*seed, number)) for number in chunks]
        if not parts:
            empty = torch.empty(0, self.size, self.size, dtype=torch.uint8)
            return SceneSamples(empty, empty)
        images, masks = (torch.cat(tensors)[:count] for tensors in zip(*parts, strict=True))
        return SceneSamples(images.clone(), masks.clone())

    def _pools(self, items: Items) -> list[Tensor]:
        """Return the indices of the items of each class but the background."""
        classes = CLASS_OF_ITEM[items.labels.long()]
        pools = [(classes == number).nonzero()[:, 0] for number in range(1, len(CLASS_NAMES))]
        missing = [CLASS_NAMES[1 + n] for n, pool in enumerate(pools) if not len(pool)]
        if missing:
            raise ValueError(f"no items of {missing} among {len(items.labels)}: use the whole data set")
        return pools

    def _chunk(
        self, images: Tensor, pools: list[Tensor], generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Return the images and masks of ``CHUNK`` scenes, uint8."""
        shape = (CHUNK, self.per_scene)
        drawn = torch.randint(len(pools), shape, generator=generator)
        place = torch.rand(shape, generator=generator)
        index = torch.stack([pool[(place * len(pool)).long()] for pool in pools])  # (classes, CHUNK, items)
        index = index.gather(0, drawn[None])[0]
        pixels, inside = self._placed(images[index], generator)
        scene, mask = self._background(generator), torch.zeros(CHUNK, self.size, self.size, dtype=torch.int64)
        for n in range(self.per_scene):
            scene = torch.where(inside[:, n], pixels[:, n], scene)
            mask = torch.where(inside[:, n], 1 + drawn[:, n, None, None], mask)
        scene = scene + self.noise * torch.randn(scene.shape, generator=generator)
        return (255 * scene).round().clamp(0, 255).byte(), mask.byte()

    def _placed(self, images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return items ``(CHUNK, items, s, s)`` at random places, and whether a pixel belongs to the item."""
        grey = images.flatten(0, 1)[:, None].float() / 255
        layers = torch.cat([grey, _silhouettes(grey)], 1)
        grid = affine_grid(self._motions(len(grey), generator), [len(grey), 2, self.size, self.size], False)
        placed = grid_sample(layers, grid, align_corners=False).unflatten(0, images.shape[:2])
        brightness = 0.4 + 0.6 * torch.rand(*images.shape[:2], 1, 1, generator=generator)
        return placed[:, :, 0] * brightness, placed[:, :, 1] >= 0.5

    def _motions(self, count: int, generator: torch.Generator) -> Tensor:
        """Return the affine maps ``(count, 2, 3)`` from coordinates in the scene to those in the item."""
        draws = torch.rand(5, count, generator=generator)
        angle = (2 * draws[0] - 1) * (15 * torch.pi / 180)
        # As in a scene of 48 pixels: larger scenes show the same with more pixels.
        zoom = 48 / (28 * (0.7 + 0.4 * draws[1]))
        mirror = torch.where(draws[2] < 0.5, -1.0, 1.0)
        x, y = (2 * draws[3:] - 1) * (2 / 3)
        linear = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).view(-1, 2, 2)
        linear = linear * zoom[:, None, None]
        linear = torch.stack([linear[:, 0] * mirror[:, None], linear[:, 1]], 1)
        shift = -(linear @ torch.stack([x, y], 1)[:, :, None])
        return torch.cat([linear, shift], 2)

    def _background(self, generator: torch.Generator) -> Tensor:
        """Return smooth noise ``(CHUNK, s, s)`` in 0 to 1."""
        coarse = torch.rand(CHUNK, 1, COARSE, COARSE, generator=generator)
        smooth = interpolate(coarse, size=(self.size, self.size), mode="bicubic", align_corners=True)
        return smooth[:, 0].clamp(0, 1)


def _silhouettes(grey: Tensor) -> Tensor:
    """Return 1 where an item is, and 0 elsewhere, with small dark holes filled: a closing by 3 x 3 pixels."""
    dilated = max_pool2d((grey > 0).float(), 3, stride=1, padding=1)
    return 1 - max_pool2d(1 - dilated, 3, stride=1, padding=1)


def _generator(*numbers: int) -> torch.Generator:
    """Return a generator whose seed depends on all numbers."""
    state = np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))
