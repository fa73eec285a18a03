"""Networks of the literature, written from their descriptions (level 0)."""

from lightning_prune.networks.atom_mobile import AtomMobile
from lightning_prune.networks.ritnet import RITnet
from lightning_prune.networks.unet import UNet

__all__ = ["AtomMobile", "RITnet", "UNet"]
