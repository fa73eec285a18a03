"""Joint augmentation of image and mask with torchvision's transforms v2.

Any v2 transform can be used. It gets the image as `tv_tensors.Image` and the mask as `tv_tensors.Mask`, so that it
moves both by the same random parameters, resamples the mask by nearest neighbour, and changes the intensities of the
image only. Random numbers come from torch's global generator, which a data loader seeds differently in each worker.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torchvision import tv_tensors
from torchvision.transforms import v2

Transform = Callable[..., Any]


def default_augmentation(
    degrees: float = 10.0,
    translate: float = 0.05,
    scale: tuple[float, float] = (0.9, 1.1),
    intensity: float = 0.2,
    mask_fill: int = 0,
) -> v2.Transform:
    """Return the default transform: horizontal flip, small affine motion, brightness and contrast.

    Args:
        degrees: largest rotation to either side.
        translate: largest shift as a fraction of each side.
        scale: range of the zoom factor.
        intensity: largest change of brightness and contrast, as a fraction.
        mask_fill: class of pixels that move in from outside the image; use `ignore_index` if there is one.

    Example:
        >>> import torch
        >>> image, mask = torch.rand(1, 8, 8), torch.ones(8, 8, dtype=torch.int64)
        >>> image, mask = augment(default_augmentation(), image, mask)
        >>> image.shape, mask.shape, mask.dtype
        (torch.Size([1, 8, 8]), torch.Size([8, 8]), torch.int64)
    """
    fill: dict[Any, Any] = {tv_tensors.Image: 0, tv_tensors.Mask: mask_fill}
    bilinear = v2.InterpolationMode.BILINEAR
    return v2.Compose(
        [
            v2.RandomHorizontalFlip(),
            v2.RandomAffine(degrees, (translate, translate), scale, interpolation=bilinear, fill=fill),
            v2.ColorJitter(brightness=intensity, contrast=intensity),
        ]
    )


class CropAndFlip(nn.Module):
    """Crop and flip of :func:`crop_and_flip` in one pass: three times as fast as torchvision's two transforms.

    Args:
        size: side of the images.
        padding: pixels added on each side.
        fill: value of the added pixels, or one per channel.

    Raises:
        ValueError: when called: the image has another size.
    """

    def __init__(self, size: int, padding: int, fill: float | Sequence[float]) -> None:
        super().__init__()
        self.size = size
        self.padding = padding
        self.fill = torch.tensor(fill, dtype=torch.float32).reshape(-1, 1, 1)

    def forward(self, image: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Pad, crop and flip the image by random numbers; return it and the unchanged target."""
        image = image.as_subclass(Tensor)
        if image.shape[1:] != (self.size, self.size):
            raise ValueError(f"the images have shape {tuple(image.shape)}, but size={self.size}")
        shift, flip = torch.randint(2 * self.padding + 1, (2,)).tolist(), torch.rand(()) < 0.5
        padded = pad(image - self.fill, (self.padding,) * 4) + self.fill
        crop = padded[:, shift[0] : shift[0] + self.size, shift[1] : shift[1] + self.size]
        return (crop.flip(-1) if flip else crop), target


def crop_and_flip(size: int, padding: int = 4, fill: float | Sequence[float] = 0) -> nn.Module:
    """Return the usual transform of small images: pad, crop at random to the size before, flip horizontally.

    For classification only: a mask is not moved.

    Args:
        size: side of the images.
        padding: pixels added on each side, thus the largest shift.
        fill: value of the added pixels, or one per channel.

    Example:
        >>> import torch
        >>> augment(crop_and_flip(8, padding=2), torch.rand(1, 8, 8), torch.tensor(3))[0].shape
        torch.Size([1, 8, 8])
    """
    return CropAndFlip(size, padding, fill)


def augment(transform: Transform, image: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Apply a transform to image and target, and return both as plain tensors.

    Args:
        transform: called as ``transform(image, target)``, the image and a mask as `tv_tensors`; returns both.
        image: ``(c, h, w)`` float.
        target: mask ``(h, w)`` int64, or a class number, which transforms leave as it is.

    Example:
        >>> import torch
        >>> flip = v2.RandomHorizontalFlip(p=1.0)
        >>> augment(flip, torch.tensor([[[0.0, 1.0]]]), torch.tensor([[0, 1]]))
        (tensor([[[1., 0.]]]), tensor([[1, 0]]))
    """
    target = tv_tensors.Mask(target) if target.ndim == 2 else target
    image, target = transform(tv_tensors.Image(image), target)
    return image.as_subclass(Tensor), target.as_subclass(Tensor)
