"""Torchaudio's networks for speech and music, in small sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from benchmarks.zoo.strangers.case import Case, Inputs, images

__all__ = ["cases"]


def cases() -> Iterator[Case]:
    """Yield the networks of torchaudio."""
    for name, (build, inputs) in AUDIO.items():
        yield Case(f"torchaudio/{name}", "torchaudio", build, inputs)


def _model(name: str, **settings: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import torchaudio

        network: nn.Module = getattr(torchaudio.models, name)(**settings)
        return network

    return build


def _frames(length: int, width: int) -> Inputs:
    """Return a maker of features (1, length, width) and their length."""
    return lambda: (torch.randn(1, length, width), torch.tensor([length]))


ENCODER: dict[str, Any] = {
    "extractor_mode": "group_norm", "extractor_conv_layer_config": [(16, 10, 5), (16, 3, 2), (16, 2, 2)],
    "extractor_conv_bias": False, "encoder_embed_dim": 32, "encoder_projection_dropout": 0.0,
    "encoder_pos_conv_kernel": 8, "encoder_pos_conv_groups": 4, "encoder_num_layers": 2, "encoder_num_heads": 4,
    "encoder_attention_dropout": 0.0, "encoder_ff_interm_features": 64, "encoder_ff_interm_dropout": 0.0,
    "encoder_dropout": 0.0, "encoder_layer_norm_first": False, "encoder_layer_drop": 0.0, "aux_num_out": 12,
}  # fmt: skip

AUDIO: dict[str, tuple[Callable[[], nn.Module], Inputs]] = {
    "Conformer": (
        _model("Conformer", input_dim=32, num_heads=4, ffn_dim=64, num_layers=2, depthwise_conv_kernel_size=7),
        _frames(20, 32),
    ),
    "Conformer-group-norm": (
        _model(
            "Conformer", input_dim=32, num_heads=4, ffn_dim=64, num_layers=2, depthwise_conv_kernel_size=7,
            use_group_norm=True, convolution_first=True,
        ),
        _frames(20, 32),
    ),
    "ConvTasNet": (
        _model(
            "ConvTasNet", enc_num_feats=32, msk_num_feats=16, msk_num_hidden_feats=32, msk_num_layers=2,
            msk_num_stacks=2,
        ),
        images(1, 800),
    ),
    "DeepSpeech": (_model("DeepSpeech", n_feature=20, n_hidden=32, n_class=12), images(1, 16, 20)),
    "Emformer": (
        _model("Emformer", input_dim=32, num_heads=4, ffn_dim=64, num_layers=2, segment_length=4), _frames(16, 32)
    ),
    "HDemucs": (
        _model("HDemucs", sources=["voice", "rest"], audio_channels=1, channels=8, depth=6, nfft=4096),
        images(1, 44100),
    ),
    "Wav2Letter-waveform": (
        _model("Wav2Letter", num_classes=12, input_type="waveform", num_features=1), images(1, 4000)
    ),
    "Wav2Letter-mfcc": (_model("Wav2Letter", num_classes=12, input_type="mfcc", num_features=13), images(13, 100)),
    "WaveRNN": (
        _model(
            "WaveRNN", upsample_scales=[2, 2, 2], n_classes=16, hop_length=8, n_res_block=2, n_rnn=32, n_fc=32,
            n_hidden=16, n_output=16, n_freq=20,
        ),
        lambda: (torch.randn(1, 1, 48), torch.randn(1, 1, 20, 10)),
    ),
    "Tacotron2": (
        _model(
            "Tacotron2", n_mels=16, n_symbol=20, symbol_embedding_dim=32, encoder_embedding_dim=32,
            attention_rnn_dim=32, attention_hidden_dim=16, decoder_rnn_dim=32, prenet_dim=16,
            postnet_embedding_dim=32, attention_location_n_filter=8,
        ),
        lambda: (torch.randint(0, 20, (1, 9)), torch.tensor([9]), torch.randn(1, 16, 12), torch.tensor([12])),
    ),
    "Wav2Vec2": (_model("wav2vec2_model", **ENCODER), images(800)),
    "WavLM": (
        _model(
            "wavlm_model", **ENCODER, encoder_num_buckets=8, encoder_max_distance=16
        ),
        images(800),
    ),
    "SquimObjective": (_model("squim_objective_base"), images(4000)),
}  # fmt: skip
