"""Segmentation networks, implemented from their publications."""

from lightning_prune.segmentation.networks.atom_mobile import AtomMobile
from lightning_prune.segmentation.networks.ritnet import RITnet
from lightning_prune.segmentation.networks.unet import UNet

__all__ = ["AtomMobile", "RITnet", "UNet"]
