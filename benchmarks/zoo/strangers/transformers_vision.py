"""Vision and audio models of Transformers, and others, built from their configuration in small sizes."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from benchmarks.zoo.strangers.case import Case, Inputs, images
from benchmarks.zoo.strangers.language import Named, from_configuration, main_outputs

__all__ = ["cases"]

IMAGE = images(3, 32, 32)
LARGER = images(3, 64, 64)
SOUND = images(800)
BODY: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
}  # fmt: skip
PATCHES: dict[str, Any] = {**BODY, "image_size": 32, "patch_size": 8}
CONVOLUTIONS: dict[str, Any] = {"embedding_size": 8, "hidden_sizes": [8, 16, 32], "depths": [1, 1, 1]}
WAVES: dict[str, Any] = {
    **BODY, "conv_dim": (16, 16, 16), "conv_stride": (5, 2, 2), "conv_kernel": (10, 3, 2), "vocab_size": 16,
    "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4, "num_feat_extract_layers": 3,
    "tdnn_dim": (16, 16), "tdnn_kernel": (3, 1), "tdnn_dilation": (1, 1), "xvector_output_dim": 16,
}  # fmt: skip
CLIP_TEXT: dict[str, Any] = {
    **BODY,
    "vocab_size": 64,
    "max_position_embeddings": 16,
    "eos_token_id": 2,
    "pad_token_id": 1,
}
TOWERS: dict[str, Any] = {"text_config": CLIP_TEXT, "vision_config": PATCHES}
SERIES: dict[str, Any] = {
    "num_input_channels": 2, "context_length": 32, "patch_length": 8, "patch_stride": 8, "prediction_length": 4,
    "d_model": 16,
}  # fmt: skip


def _video() -> tuple[Any, ...]:
    return (torch.randn(1, 4, 3, 32, 32),)


def _text_and_image() -> tuple[Any, ...]:
    return torch.randint(3, 60, (1, 8)), torch.randn(1, 3, 32, 32)


#: prefix -> task, arguments, inputs, names of the inputs
NETWORKS: dict[str, tuple[str, dict[str, Any], Inputs, tuple[str, ...]]] = {
    "ViT": ("ForImageClassification", PATCHES, IMAGE, ()),
    "DeiT": ("ForImageClassification", PATCHES, IMAGE, ()),
    "Beit": ("ForImageClassification", {**PATCHES, "use_relative_position_bias": True}, IMAGE, ()),
    "Dinov2": ("ForImageClassification", PATCHES, IMAGE, ()),
    "Dinov2WithRegisters": ("ForImageClassification", PATCHES, IMAGE, ()),
    "IJepa": ("ForImageClassification", PATCHES, IMAGE, ()),
    "ViTMAE": (
        "ForPreTraining",
        {
            **PATCHES, "decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 4,
            "decoder_intermediate_size": 32, "mask_ratio": 0.0,
        },
        IMAGE, (),
    ),
    "ViTMSN": ("ForImageClassification", PATCHES, IMAGE, ()),
    "Siglip": ("Model", TOWERS, _text_and_image, ("input_ids", "pixel_values")),
    "CLIP": ("Model", TOWERS, _text_and_image, ("input_ids", "pixel_values")),
    "Vilt": ("Model", {**CLIP_TEXT, **PATCHES, "pad_token_id": 0}, _text_and_image, ("input_ids", "pixel_values")),
    "Swin": (
        "ForImageClassification",
        {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4},
        IMAGE, (),
    ),
    "Swinv2": (
        "ForImageClassification",
        {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4},
        IMAGE, (),
    ),
    "ConvNext": ("ForImageClassification", {"hidden_sizes": [8, 16, 32, 32], "depths": [1, 1, 1, 1]}, LARGER, ()),
    "ConvNextV2": ("ForImageClassification", {"hidden_sizes": [8, 16, 32, 32], "depths": [1, 1, 1, 1]}, LARGER, ()),
    "Segformer": (
        "ForSemanticSegmentation",
        {
            "num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [16, 32],
            "patch_sizes": [7, 3], "strides": [4, 2], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2],
            "decoder_hidden_size": 32,
        },
        LARGER, (),
    ),
    "MobileViT": (
        "ForImageClassification",
        {
            "image_size": 64, "hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 16, 16, 24, 24, 32],
            "num_attention_heads": 4,
        },
        LARGER, (),
    ),
    "MobileViTV2": ("ForSemanticSegmentation", {"image_size": 64, "width_multiplier": 0.25}, LARGER, ()),
    "MobileNetV1": ("ForImageClassification", {"depth_multiplier": 0.25}, LARGER, ()),
    "MobileNetV2": ("ForSemanticSegmentation", {"depth_multiplier": 0.35}, LARGER, ()),
    "PoolFormer": (
        "ForImageClassification", {"hidden_sizes": [8, 16, 32, 32], "depths": [1, 1, 1, 1]}, LARGER, ()
    ),
    "ResNet": ("ForImageClassification", {**CONVOLUTIONS, "layer_type": "bottleneck"}, LARGER, ()),
    "RegNet": ("ForImageClassification", {**CONVOLUTIONS, "groups_width": 4}, LARGER, ()),
    "Bit": ("ForImageClassification", {**CONVOLUTIONS, "num_groups": 4}, LARGER, ()),
    "FocalNet": (
        "ForImageClassification",
        {"image_size": 32, "embed_dim": 16, "depths": [1, 1], "focal_levels": [2, 2], "focal_windows": [3, 3]},
        IMAGE, (),
    ),
    "Hiera": (
        "ForImageClassification",
        {
            "image_size": [64, 64], "embed_dim": 16, "depths": [1, 1, 1], "num_heads": [1, 2, 4], "num_query_pool": 2,
            "masked_unit_size": [4, 4],
        },
        LARGER, (),
    ),
    "Pvt": (
        "ForImageClassification",
        {
            "image_size": 64, "num_encoder_blocks": 2, "depths": [1, 1], "sequence_reduction_ratios": [2, 1],
            "hidden_sizes": [16, 32], "patch_sizes": [4, 2], "strides": [4, 2], "num_attention_heads": [1, 2],
            "mlp_ratios": [2, 2],
        },
        LARGER, (),
    ),
    "PvtV2": ("ForImageClassification", {"image_size": 64, "hidden_sizes": [16, 32, 40, 64]}, LARGER, ()),
    "Cvt": (
        "ForImageClassification", {"embed_dim": [16, 32, 48], "num_heads": [1, 2, 3], "depth": [1, 2, 3]}, LARGER, ()
    ),
    "Levit": (
        "ForImageClassification",
        {
            "image_size": 64, "hidden_sizes": [16, 32, 48], "num_attention_heads": [2, 2, 3], "depths": [1, 1, 1],
            "key_dim": [8, 8, 8], "attention_ratio": [2, 2, 2],
        },
        LARGER, (),
    ),
    "SwiftFormer": (
        "ForImageClassification", {"embed_dims": [8, 16, 32, 32], "depths": [1, 1, 1, 1], "image_size": 64},
        LARGER, (),
    ),
    "Yolos": ("ForObjectDetection", {**PATCHES, "image_size": [32, 32], "num_detection_tokens": 4}, IMAGE, ()),
    "GLPN": (
        "ForDepthEstimation",
        {
            "depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 32, 32], "num_attention_heads": [1, 2, 2, 4],
            "mlp_ratios": [2, 2, 2, 2], "decoder_hidden_size": 16,
        },
        LARGER, (),
    ),
    "DPT": (
        "ForDepthEstimation",
        {
            **PATCHES, "num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3], "is_hybrid": False,
            "neck_hidden_sizes": [8, 8, 16, 16], "fusion_hidden_size": 16,
        },
        IMAGE, (),
    ),
    "VideoMAE": ("ForVideoClassification", {**PATCHES, "num_frames": 4}, _video, ()),
    "Vivit": (
        "ForVideoClassification", {**BODY, "image_size": 32, "num_frames": 4, "tubelet_size": [2, 8, 8]}, _video, ()
    ),
    "Timesformer": ("ForVideoClassification", {**PATCHES, "num_frames": 4}, _video, ()),
    "Wav2Vec2": ("ForCTC", WAVES, SOUND, ("input_values",)),
    "Hubert": ("ForCTC", WAVES, SOUND, ("input_values",)),
    "WavLM": ("ForCTC", {**WAVES, "num_buckets": 8, "max_bucket_distance": 16}, SOUND, ("input_values",)),
    "UniSpeech": ("ForCTC", WAVES, SOUND, ("input_values",)),
    "SEW": ("ForCTC", {**WAVES, "squeeze_factor": 1}, SOUND, ("input_values",)),
    "Data2VecAudio": (
        "ForCTC", {**WAVES, "conv_pos_kernel_size": 3, "num_conv_pos_embeddings": 2}, SOUND, ("input_values",)
    ),
    "Wav2Vec2Conformer": ("ForCTC", {**WAVES, "conv_depthwise_kernel_size": 7}, SOUND, ("input_values",)),
    "Wav2Vec2Bert": (
        "ForCTC", {**BODY, "vocab_size": 16, "feature_projection_input_dim": 20, "conv_depthwise_kernel_size": 7},
        images(20, 20), ("input_features",),
    ),
    "AST": (
        "ForAudioClassification", {**BODY, "patch_size": 8, "num_mel_bins": 16, "max_length": 32}, images(32, 16),
        ("input_values",),
    ),
    "Whisper": (
        "ForConditionalGeneration",
        {
            "vocab_size": 64, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
            "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "num_mel_bins": 16,
            "max_source_positions": 16, "max_target_positions": 16, "pad_token_id": 0, "bos_token_id": 1,
            "eos_token_id": 2, "decoder_start_token_id": 1,
        },
        lambda: (torch.randn(1, 16, 32), torch.randint(3, 60, (1, 8))), ("input_features", "decoder_input_ids"),
    ),
    "Encodec": (
        "Model", {"num_filters": 4, "hidden_size": 16, "codebook_size": 16, "codebook_dim": 16}, images(1, 640),
        ("input_values",),
    ),
    "PatchTST": (
        "ForPrediction", {**SERIES, "num_attention_heads": 4, "num_hidden_layers": 2, "ffn_dim": 32}, images(32, 2),
        ("past_values",),
    ),
    "PatchTSMixer": ("ForPrediction", {**SERIES, "num_layers": 2}, images(32, 2), ("past_values",)),
}  # fmt: skip


def cases() -> Iterator[Case]:
    """Yield the models of vision, audio and time series."""
    for prefix, (task, settings, inputs, names) in NETWORKS.items():
        build = partial(_named, prefix, task, settings, names or ("pixel_values",))
        yield Case(f"transformers/{prefix}-{task}", "transformers", build, inputs, main_outputs)


def _named(prefix: str, task: str, settings: dict[str, Any], names: tuple[str, ...]) -> Named:
    return Named(from_configuration(prefix, task, settings), names)
