"""The networks that IPAD was published with, written from their descriptions (level 0)."""

from lightning_prune.networks.ritnet import RITnet
from lightning_prune.networks.unet import UNet

__all__ = ["RITnet", "UNet"]
