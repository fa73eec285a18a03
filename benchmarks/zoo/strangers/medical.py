"""MONAI's networks and nnU-Net's architectures, in small sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.zoo.strangers.case import Case, Inputs, images

__all__ = ["cases"]

FLAT, SOLID = images(1, 64, 64), images(1, 32, 32, 32)
UNET: dict[str, Any] = {"channels": (8, 16, 32), "strides": (2, 2)}
KL: dict[str, Any] = {
    "channels": (8, 16, 16), "attention_levels": (False, False, True), "num_res_blocks": 1, "norm_num_groups": 4,
}  # fmt: skip
MONAI: dict[str, tuple[str, dict[str, Any], Inputs]] = {
    "UNet-2d": ("UNet", {"spatial_dims": 2, "in_channels": 1, "out_channels": 3, **UNET}, FLAT),
    "UNet-3d-res": (
        "UNet", {"spatial_dims": 3, "in_channels": 1, "out_channels": 3, "num_res_units": 2, **UNET}, SOLID
    ),
    "AttentionUnet": ("AttentionUnet", {"spatial_dims": 2, "in_channels": 1, "out_channels": 3, **UNET}, FLAT),
    "BasicUNet": ("BasicUNet", {"spatial_dims": 2, "in_channels": 1, "features": (8, 8, 16, 16, 32, 8)}, FLAT),
    "BasicUNetPlusPlus": (
        "BasicUNetPlusPlus", {"spatial_dims": 2, "in_channels": 1, "features": (8, 8, 16, 16, 32, 8)}, FLAT
    ),
    "SegResNet": ("SegResNet", {"spatial_dims": 3, "init_filters": 8}, SOLID),
    "SegResNetVAE": ("SegResNetVAE", {"spatial_dims": 3, "init_filters": 8, "input_image_size": (32, 32, 32)}, SOLID),
    "SegResNetDS": ("SegResNetDS", {"spatial_dims": 3, "init_filters": 8, "dsdepth": 2}, SOLID),
    "SegResNetDS2": ("SegResNetDS2", {"spatial_dims": 2, "init_filters": 8, "dsdepth": 2}, FLAT),
    "DynUNet": (
        "DynUNet",
        {
            "spatial_dims": 2, "in_channels": 1, "out_channels": 3, "kernel_size": [3] * 4, "strides": [1, 2, 2, 2],
            "upsample_kernel_size": [2, 2, 2], "filters": [8, 16, 16, 32],
        },
        FLAT,
    ),
    "DynUNet-3d-deep-res": (
        "DynUNet",
        {
            "spatial_dims": 3, "in_channels": 1, "out_channels": 3, "kernel_size": [3] * 4, "strides": [1, 2, 2, 2],
            "upsample_kernel_size": [2, 2, 2], "filters": [8, 16, 16, 32], "deep_supervision": True,
            "deep_supr_num": 2, "res_block": True,
        },
        SOLID,
    ),
    "UNETR": (
        "UNETR",
        {
            "in_channels": 1, "out_channels": 3, "img_size": (32, 32, 32), "feature_size": 8, "hidden_size": 48,
            "mlp_dim": 96, "num_heads": 4,
        },
        SOLID,
    ),
    "SwinUNETR": (
        "SwinUNETR", {"in_channels": 1, "out_channels": 3, "feature_size": 12, "depths": (1, 1, 1, 1)},
        images(1, 64, 64, 64),
    ),
    "SwinUNETR-v2-2d": (
        "SwinUNETR",
        {
            "in_channels": 1, "out_channels": 3, "feature_size": 12, "depths": (2, 1, 1, 1), "spatial_dims": 2,
            "use_v2": True,
        },
        FLAT,
    ),
    "VNet": ("VNet", {"spatial_dims": 3, "in_channels": 1, "out_channels": 3}, SOLID),
    "DenseNet121": ("DenseNet121", {"spatial_dims": 2, "in_channels": 1, "out_channels": 3}, FLAT),
    "DenseNet-3d": (
        "DenseNet",
        {"spatial_dims": 3, "in_channels": 1, "out_channels": 3, "block_config": (2, 2, 2), "growth_rate": 8},
        SOLID,
    ),
    "SEResNet50": ("SEResNet50", {"spatial_dims": 2, "in_channels": 1, "num_classes": 3}, FLAT),
    "ResNet18-3d": (
        "ResNet",
        {
            "block": "basic", "layers": [1, 1, 1, 1], "block_inplanes": [8, 16, 32, 64], "n_input_channels": 1,
            "num_classes": 3,
        },
        SOLID,
    ),
    "EfficientNetBN": (
        "EfficientNetBN",
        {"model_name": "efficientnet-b0", "in_channels": 1, "num_classes": 3, "pretrained": False}, FLAT,
    ),
    "HighResNet": ("HighResNet", {"spatial_dims": 3, "in_channels": 1, "out_channels": 3}, images(1, 16, 16, 16)),
    "AHNet": (
        "AHNet", {"spatial_dims": 2, "in_channels": 1, "out_channels": 3, "upsample_mode": "nearest"},
        images(1, 128, 128),
    ),
    "RegUNet": (
        "RegUNet", {"spatial_dims": 2, "in_channels": 1, "num_channel_initial": 8, "depth": 2, "out_channels": 2},
        FLAT,
    ),
    "LocalNet": (
        "LocalNet",
        {"spatial_dims": 2, "in_channels": 1, "num_channel_initial": 8, "extract_levels": (0, 1), "out_channels": 2},
        FLAT,
    ),
    "GlobalNet": (
        "GlobalNet",
        {"spatial_dims": 2, "in_channels": 1, "num_channel_initial": 8, "depth": 2, "image_size": [64, 64]},
        FLAT,
    ),
    "ViT": (
        "ViT",
        {
            "in_channels": 1, "img_size": (32, 32), "patch_size": (8, 8), "hidden_size": 48, "mlp_dim": 96,
            "num_layers": 2, "num_heads": 4, "classification": True, "spatial_dims": 2,
        },
        images(1, 32, 32),
    ),
    "ViTAutoEnc": (
        "ViTAutoEnc",
        {
            "in_channels": 1, "img_size": (32, 32), "patch_size": (4, 4), "hidden_size": 48, "mlp_dim": 96,
            "num_layers": 2, "num_heads": 4, "spatial_dims": 2,
        },
        images(1, 32, 32),
    ),
    "FlexibleUNet": (
        "FlexibleUNet", {"in_channels": 3, "out_channels": 3, "backbone": "efficientnet-b0"}, images(3, 64, 64)
    ),
    "HoVerNet": ("HoVerNet", {"mode": "fast", "out_classes": 4}, images(3, 256, 256)),
    "MedNeXtS": ("MedNeXtS", {"spatial_dims": 2, "in_channels": 1, "out_channels": 3}, FLAT),
    "AutoEncoder": (
        "AutoEncoder",
        {"spatial_dims": 2, "in_channels": 1, "out_channels": 1, "channels": (8, 16, 16), "strides": (2, 2, 2)},
        FLAT,
    ),
    "AutoencoderKL": ("AutoencoderKL", {"spatial_dims": 2, "in_channels": 1, "latent_channels": 4, **KL}, FLAT),
    "VQVAE": (
        "VQVAE",
        {
            "spatial_dims": 2, "in_channels": 1, "out_channels": 1, "channels": (8, 16), "num_res_layers": 1,
            "num_res_channels": (8, 16), "num_embeddings": 16, "embedding_dim": 8,
            "downsample_parameters": ((2, 4, 1, 1), (2, 4, 1, 1)),
            "upsample_parameters": ((2, 4, 1, 1, 0), (2, 4, 1, 1, 0)),
        },
        FLAT,
    ),
    "DiffusionModelUNet": (
        "DiffusionModelUNet",
        {
            "spatial_dims": 2, "in_channels": 1, "out_channels": 1, "num_head_channels": 4, **KL,
        },
        lambda: (torch.randn(1, 1, 32, 32), torch.tensor([7])),
    ),
    "Quicknat": ("Quicknat", {"num_classes": 3, "num_filters": 8, "num_channels": 1}, FLAT),
    "VoxelMorphUNet": (
        "VoxelMorphUNet",
        {
            "spatial_dims": 2, "in_channels": 2, "unet_out_channels": 8, "channels": (8, 8, 16, 16, 16, 16),
            "final_conv_channels": (8, 8),
        },
        images(2, 64, 64),
    ),
    "PatchDiscriminator": (
        "PatchDiscriminator", {"spatial_dims": 2, "channels": 8, "in_channels": 1, "num_layers_d": 3}, FLAT
    ),
    "MaskedAutoEncoderViT": (
        "MaskedAutoEncoderViT",
        {
            "in_channels": 1, "img_size": (32, 32), "patch_size": (8, 8), "hidden_size": 48, "mlp_dim": 96,
            "num_layers": 2, "num_heads": 4, "spatial_dims": 2, "decoder_hidden_size": 24, "decoder_mlp_dim": 48,
            "decoder_num_layers": 1, "decoder_num_heads": 4, "masking_ratio": 0.5,
        },
        images(1, 32, 32),
    ),
    "DAF3D": ("DAF3D", {"in_channels": 1, "out_channels": 2, "visual_output": False}, SOLID),
    "MILModel": ("MILModel", {"num_classes": 2, "pretrained": False, "mil_mode": "att_trans"}, images(4, 3, 64, 64)),
    "TorchVisionFCModel": (
        "TorchVisionFCModel", {"model_name": "resnet18", "num_classes": 3, "pretrained": False}, images(3, 224, 224)
    ),
}  # fmt: skip


def cases() -> Iterator[Case]:
    """Yield the networks of MONAI and of nnU-Net."""
    for name, (kind, settings, inputs) in MONAI.items():
        yield Case(f"monai/{name}", "monai", partial(_monai, kind, settings), inputs)
    for name, (build, inputs) in NNUNET.items():
        yield Case(f"nnunet/{name}", "dynamic_network_architectures", build, inputs)


def _monai(kind: str, settings: dict[str, Any]) -> nn.Module:
    from monai.networks import nets

    network: nn.Module = getattr(nets, kind)(**settings)
    return network


def _nnunet(kind: str, dims: int, blocks: str, **more: Any) -> nn.Module:
    from dynamic_network_architectures.architectures import unet
    from dynamic_network_architectures.building_blocks.residual import BottleneckD

    convolution, norm = ((nn.Conv2d, nn.InstanceNorm2d), (nn.Conv3d, nn.InstanceNorm3d))[dims - 2]
    per_stage = {blocks: [1, 2, 2, 2], "n_conv_per_stage_decoder": [1, 1, 1]}
    if more.pop("bottleneck", False):
        more |= {"block": BottleneckD, "bottleneck_channels": [4, 8, 8, 16]}
    return getattr(unet, kind)(
        1, 4, [8, 16, 32, 48], convolution, 3, [1, 2, 2, 2], num_classes=3, conv_bias=True, norm_op=norm,
        norm_op_kwargs={"eps": 1e-5, "affine": True}, nonlin=nn.LeakyReLU, nonlin_kwargs={"inplace": True},
        **per_stage, **more,
    )  # fmt: skip


def _nnunet_resnet(name: str) -> nn.Module:
    from dynamic_network_architectures.architectures import resnet

    return getattr(resnet, name)(3, 1, 2)


def _nnunet_vgg(name: str) -> nn.Module:
    from dynamic_network_architectures.architectures import vgg

    return getattr(vgg, name)(3, 1, 2)


PLAIN, RESIDUAL = "n_conv_per_stage", "n_blocks_per_stage"
NNUNET: dict[str, tuple[Callable[[], nn.Module], Inputs]] = {
    "PlainConvUNet-2d": (partial(_nnunet, "PlainConvUNet", 2, PLAIN), FLAT),
    "PlainConvUNet-3d-deep": (partial(_nnunet, "PlainConvUNet", 3, PLAIN, deep_supervision=True), SOLID),
    "ResidualEncoderUNet-2d": (partial(_nnunet, "ResidualEncoderUNet", 2, RESIDUAL), FLAT),
    "ResidualEncoderUNet-3d-deep": (
        partial(_nnunet, "ResidualEncoderUNet", 3, RESIDUAL, deep_supervision=True), SOLID
    ),
    "ResidualEncoderUNet-2d-bottleneck": (
        partial(_nnunet, "ResidualEncoderUNet", 2, RESIDUAL, bottleneck=True), FLAT
    ),
    "ResidualUNet-2d": (partial(_nnunet, "ResidualUNet", 2, RESIDUAL), FLAT),
    "ResNet18_CIFAR": (partial(_nnunet_resnet, "ResNet18_CIFAR"), FLAT),
    "ResNet50bn_CIFAR": (partial(_nnunet_resnet, "ResNet50bn_CIFAR"), FLAT),
    "VGG16": (partial(_nnunet_vgg, "VGG16"), FLAT),
}  # fmt: skip
