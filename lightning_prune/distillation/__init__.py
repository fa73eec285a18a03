"""Distillation of a frozen dense teacher into the network that is pruned."""

from lightning_prune.distillation.config import Distillation, Ramp
from lightning_prune.distillation.losses import attention_loss, fsp_loss, hinton_loss
from lightning_prune.distillation.mixin import DistillationMixin

__all__ = ["Distillation", "DistillationMixin"]
