"""Data for segmentation: batches of images ``(n, c, h, w)`` float32 and masks ``(n, h, w)`` int64.

For classification: batches of images and class numbers ``(n,)`` int64.
"""

from lightning_prune.data.base import SegmentationData
from lightning_prune.data.brain import BrainSlices
from lightning_prune.data.cifar import CIFAR10
from lightning_prune.data.classification import ClassificationData
from lightning_prune.data.distance_maps import signed_distances
from lightning_prune.data.eye import MOBIUS, SBVPI
from lightning_prune.data.fashion import FashionMNIST, FashionScenes
from lightning_prune.data.folder import FolderDataModule
from lightning_prune.data.image_folder import ImageFolder
from lightning_prune.data.transforms import augment, crop_and_flip, default_augmentation

__all__ = [
    "CIFAR10",
    "MOBIUS",
    "SBVPI",
    "BrainSlices",
    "ClassificationData",
    "FashionMNIST",
    "FashionScenes",
    "FolderDataModule",
    "ImageFolder",
    "SegmentationData",
    "augment",
    "crop_and_flip",
    "default_augmentation",
    "signed_distances",
]
