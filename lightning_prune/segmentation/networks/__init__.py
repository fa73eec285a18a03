"""Networks of the literature, written from their descriptions (level 0)."""

from lightning_prune.segmentation.networks.atom_mobile import AtomMobile
from lightning_prune.segmentation.networks.ritnet import RITnet
from lightning_prune.segmentation.networks.unet import UNet

__all__ = ["AtomMobile", "RITnet", "UNet"]
