"""Classification of images: a LightningModule and the residual networks for small images."""

from lightning_prune.classification.module import ClassificationModule
from lightning_prune.classification.networks.cifar_resnet import CifarResNet, cifar_resnet

__all__ = ["CifarResNet", "ClassificationModule", "cifar_resnet"]
