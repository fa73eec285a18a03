"""The vision transformers of vit-pytorch, in small sizes."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from importlib import import_module
from typing import Any

from torch import nn

from benchmarks.zoo.strangers.case import Case, Inputs, images

__all__ = ["cases"]

NARROW: dict[str, Any] = {"num_classes": 5, "dim": 32, "depth": 2, "heads": 4, "mlp_dim": 64, "dim_head": 8}
SMALL: dict[str, Any] = {"image_size": 32, "patch_size": 8, **NARROW}
CLIP: dict[str, Any] = {
    "image_size": 32, "frames": 4, "image_patch_size": 8, "frame_patch_size": 2, **NARROW,
}  # fmt: skip
SERIES: dict[str, Any] = {"seq_len": 64, "patch_size": 8, **NARROW}
IMAGE, LARGER, MOVIE, SIGNAL = images(3, 32, 32), images(3, 64, 64), images(3, 4, 32, 32), images(3, 64)

#: name -> module of vit_pytorch, class, arguments, inputs
VITS: dict[str, tuple[str, str, dict[str, Any], Inputs]] = {
    "ViT": ("vit", "ViT", SMALL, IMAGE),
    "SimpleViT": ("simple_vit", "SimpleViT", SMALL, IMAGE),
    "ViT-3d": ("vit_3d", "ViT", CLIP, MOVIE),
    "SimpleViT-3d": ("simple_vit_3d", "SimpleViT", CLIP, MOVIE),
    "ViT-1d": ("vit_1d", "ViT", SERIES, SIGNAL),
    "ViViT": (
        "vivit", "ViViT",
        {**{k: v for k, v in CLIP.items() if k != "depth"}, "spatial_depth": 1, "temporal_depth": 1}, MOVIE,
    ),
    "CaiT": ("cait", "CaiT", {**SMALL, "cls_depth": 1}, IMAGE),
    "CCT": (
        "cct", "CCT",
        {
            "img_size": 32, "embedding_dim": 32, "num_layers": 2, "num_heads": 4, "mlp_ratio": 2.0,
            "num_classes": 5, "kernel_size": 3, "positional_embedding": "learnable",
        },
        IMAGE,
    ),
    "CrossViT": (
        "cross_vit", "CrossViT",
        {
            "image_size": 48, "num_classes": 5, "sm_dim": 24, "lg_dim": 32, "sm_enc_heads": 2, "sm_enc_mlp_dim": 32,
            "sm_enc_dim_head": 8, "lg_enc_depth": 1, "lg_enc_heads": 2, "lg_enc_mlp_dim": 32, "lg_enc_dim_head": 8,
            "cross_attn_depth": 1, "cross_attn_heads": 2, "cross_attn_dim_head": 8, "depth": 1,
        },
        images(3, 48, 48),
    ),
    "CrossFormer": (
        "crossformer", "CrossFormer",
        {
            "dim": (64, 64, 64, 64), "depth": (1, 1, 1, 1), "global_window_size": (4, 2, 2, 1),
            "local_window_size": 2, "num_classes": 5,
        },
        LARGER,
    ),
    "CvT": (
        "cvt", "CvT",
        {
            "num_classes": 5, "s1_emb_dim": 16, "s2_emb_dim": 32, "s2_heads": 2, "s2_depth": 1, "s3_emb_dim": 48,
            "s3_heads": 2, "s3_depth": 1,
        },
        LARGER,
    ),
    "DeepViT": ("deepvit", "DeepViT", SMALL, IMAGE),
    "LeViT": (
        "levit", "LeViT",
        {
            "image_size": 64, "num_classes": 5, "stages": 2, "dim": (32, 48), "depth": 1, "heads": (2, 3),
            "mlp_mult": 2, "dim_key": 8, "dim_value": 16,
        },
        LARGER,
    ),
    "MaxViT": (
        "max_vit", "MaxViT",
        {"num_classes": 5, "dim": 16, "dim_conv_stem": 16, "depth": (1, 1), "dim_head": 8, "window_size": 4}, LARGER,
    ),
    "MobileViT": (
        "mobile_vit", "MobileViT",
        {
            "image_size": (64, 64), "dims": [16, 24, 32], "channels": [8, 16, 16, 16, 24, 24, 32, 32, 40, 40, 48],
            "num_classes": 5, "depths": (1, 1, 1),
        },
        LARGER,
    ),
    "NesT": (
        "nest", "NesT",
        {
            "image_size": 32, "patch_size": 4, "dim": 16, "heads": 2, "num_hierarchies": 2, "block_repeats": (1, 1),
            "num_classes": 5, "dim_head": 8,
        },
        IMAGE,
    ),
    "ParallelViT": ("parallel_vit", "ViT", SMALL, IMAGE),
    "PiT": ("pit", "PiT", {**SMALL, "depth": (1, 1)}, IMAGE),
    "RegionViT": (
        "regionvit", "RegionViT",
        {"dim": (16, 32, 32, 64), "depth": (1, 1, 1, 1), "window_size": 2, "num_classes": 5}, LARGER,
    ),
    "RvT": ("rvt", "RvT", SMALL, IMAGE),
    "ScalableViT": (
        "scalable_vit", "ScalableViT",
        {
            "num_classes": 5, "dim": 16, "heads": (2, 2), "depth": (1, 1), "ssa_dim_key": (8, 8),
            "ssa_dim_value": 8, "reduction_factor": (2, 1), "window_size": (4, None), "iwsa_dim_key": 8,
            "iwsa_dim_value": 8,
        },
        LARGER,
    ),
    "SepViT": (
        "sep_vit", "SepViT",
        {"num_classes": 5, "dim": 16, "dim_head": 8, "heads": (1, 2), "depth": (1, 1), "window_size": 7},
        images(3, 56, 56),
    ),
    "TwinsSVT": (
        "twins_svt", "TwinsSVT",
        {
            "num_classes": 5, "s1_emb_dim": 16, "s1_local_patch_size": 4, "s1_global_k": 4, "s2_emb_dim": 16,
            "s2_local_patch_size": 4, "s2_global_k": 4, "s3_emb_dim": 32, "s3_local_patch_size": 2, "s3_global_k": 2,
            "s3_depth": 1, "s4_emb_dim": 32, "s4_local_patch_size": 2, "s4_global_k": 2, "s4_depth": 1,
        },
        LARGER,
    ),
    "XCiT": ("xcit", "XCiT", {**SMALL, "cls_depth": 1}, IMAGE),
    "ViT-small-dataset": ("vit_for_small_dataset", "ViT", SMALL, IMAGE),
    "ViT-patch-merger": ("vit_with_patch_merger", "ViT", {**SMALL, "patch_merge_num_tokens": 4}, IMAGE),
    "SimpleViT-qk-norm": ("simple_vit_with_qk_norm", "SimpleViT", SMALL, IMAGE),
    "SimpleViT-registers": ("simple_vit_with_register_tokens", "SimpleViT", SMALL, IMAGE),
    "SimpleViT-fft": ("simple_vit_with_fft", "SimpleViT", {**SMALL, "freq_patch_size": 8}, IMAGE),
    "SimpleViT-value-residual": ("simple_vit_with_value_residual", "SimpleViT", SMALL, IMAGE),
    "SimpleUViT": ("simple_uvit", "SimpleUViT", SMALL, IMAGE),
    "nViT": ("normalized_vit", "nViT", SMALL, IMAGE),
    "ATS-ViT": ("ats_vit", "ViT", {**SMALL, "max_tokens_per_depth": (16, 8)}, IMAGE),
    "LookViT": (
        "look_vit", "LookViT",
        {
            "dim": 32, "image_size": 64, "num_classes": 5, "depth": 1, "heads": 2, "dim_head": 8, "patch_size": 16,
            "highres_patch_size": 8, "cross_attn_heads": 2, "cross_attn_dim_head": 8,
        },
        LARGER,
    ),
}  # fmt: skip


def cases() -> Iterator[Case]:
    """Yield the networks of vit-pytorch."""
    for name, (module, kind, settings, inputs) in VITS.items():
        yield Case(f"vit-pytorch/{name}", "vit_pytorch", partial(_vit, module, kind, settings), inputs)


def _vit(module: str, kind: str, settings: dict[str, Any]) -> nn.Module:
    network: nn.Module = getattr(import_module(f"vit_pytorch.{module}"), kind)(**settings)
    return network
