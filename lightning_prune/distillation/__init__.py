"""Distillation of a frozen dense teacher into the network that is pruned."""

from lightning_prune.distillation.callback import DistillationCallback
from lightning_prune.distillation.config import Distillation, Ramp
from lightning_prune.distillation.logit_losses import cwd, dist, hinton, standardised
from lightning_prune.distillation.losses import attention, attention_map, flow, fsp
from lightning_prune.distillation.mixin import DistillationMixin
from lightning_prune.distillation.teacher import TeacherError

__all__ = [
    "Distillation",
    "DistillationCallback",
    "DistillationMixin",
    "Ramp",
    "TeacherError",
    "attention",
    "attention_map",
    "cwd",
    "dist",
    "flow",
    "fsp",
    "hinton",
    "standardised",
]
