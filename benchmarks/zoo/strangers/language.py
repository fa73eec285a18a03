"""Language models of Transformers, built from their configuration in small sizes."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import Tensor, nn

from benchmarks.zoo.strangers.case import Case, tokens

__all__ = ["cases", "from_configuration", "main_outputs"]

LENGTH = 8
TEXT: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
GROUPED: dict[str, Any] = {**TEXT, "num_key_value_heads": 2}
SMALL_HEADS: dict[str, Any] = {**GROUPED, "head_dim": 8}
GPT2: dict[str, Any] = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
MAMBA: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
EXPERTS: dict[str, Any] = {
    "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}  # fmt: skip
BOTH: dict[str, Any] = {
    "vocab_size": 64, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 64,
    "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": None,
}  # fmt: skip

#: prefix of configuration and network -> arguments
DECODERS: dict[str, dict[str, Any]] = {
    "Llama": GROUPED,
    "Mistral": GROUPED,
    "Qwen2": GROUPED,
    "Qwen3": SMALL_HEADS,
    "Gemma": SMALL_HEADS,
    "Gemma2": {**SMALL_HEADS, "query_pre_attn_scalar": 8, "sliding_window": 4},
    "Phi": GROUPED,
    "Phi3": GROUPED,
    "GPT2": GPT2,
    "GPTNeo": {
        "vocab_size": 64, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "window_size": 4,
        "attention_types": [[["global", "local"], 1]], "max_position_embeddings": 64,
    },
    "GPTNeoX": TEXT,
    "GPTJ": {**GPT2, "rotary_dim": 4},
    "CodeGen": {**GPT2, "rotary_dim": 4},
    "OPT": {
        "vocab_size": 64, "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 64, "word_embed_proj_dim": 32,
    },
    "Bloom": {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "Falcon": {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    "Mpt": {"vocab_size": 64, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64},
    "StableLm": GROUPED,
    "Olmo2": GROUPED,
    "Cohere": GROUPED,
    "Starcoder2": GROUPED,
    "Granite": GROUPED,
    "SmolLM3": GROUPED,
    "Glm": {**SMALL_HEADS, "pad_token_id": 0},
    "Nemotron": GROUPED,
    "Mixtral": {**GROUPED, **EXPERTS},
    "Qwen2Moe": {**GROUPED, **EXPERTS},
    "Mamba": MAMBA,
    "Mamba2": {**MAMBA, "num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 4},
    "RecurrentGemma": {**SMALL_HEADS, "lru_width": 32, "attention_window_size": 4, "num_key_value_heads": 1},
    "Rwkv": {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32},
}  # fmt: skip
#: with the states of attention returned, and used for the next token
CACHED = ("Llama", "Qwen2", "GPT2", "Mistral", "OPT", "Bloom", "Falcon", "Gemma", "Mamba")
ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "Bert": ("ForSequenceClassification", TEXT),
    "Roberta": ("ForMaskedLM", {**TEXT, "pad_token_id": 1}),
    "DistilBert": (
        "ForSequenceClassification", {"vocab_size": 64, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}
    ),
    "Albert": ("ForMaskedLM", {**TEXT, "embedding_size": 16}),
    "Electra": ("ForTokenClassification", {**TEXT, "embedding_size": 16}),
    "DebertaV2": (
        "ForSequenceClassification", {**TEXT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
    ),
    "MPNet": ("ForMaskedLM", {**TEXT, "pad_token_id": 1}),
    "XLNet": (
        "ForSequenceClassification", {"vocab_size": 64, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64}
    ),
    "Funnel": (
        "ForMaskedLM",
        {
            "vocab_size": 64, "block_sizes": [1, 1], "d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 64,
            "num_decoder_layers": 1,
        },
    ),
    "Longformer": ("ForSequenceClassification", {**TEXT, "attention_window": 4, "pad_token_id": 1}),
    "BigBird": ("ForSequenceClassification", {**TEXT, "attention_type": "original_full"}),
    "ConvBert": ("ForSequenceClassification", {**TEXT, "embedding_size": 32}),
    "SqueezeBert": ("ForSequenceClassification", {**TEXT, "embedding_size": 32}),
    "MobileBert": (
        "ForSequenceClassification",
        {**TEXT, "embedding_size": 16, "intra_bottleneck_size": 16, "true_hidden_size": 16},
    ),
    "FNet": ("ForSequenceClassification", {k: v for k, v in TEXT.items() if k != "num_attention_heads"}),
    "Nystromformer": ("ForSequenceClassification", {**TEXT, "num_landmarks": 2, "segment_means_seq_len": 8}),
    "ModernBert": ("ForSequenceClassification", {**TEXT, "global_attn_every_n_layers": 2, "local_attention": 4}),
    "RoFormer": ("ForSequenceClassification", {**TEXT, "embedding_size": 32}),
    "Esm": ("ForMaskedLM", {**TEXT, "position_embedding_type": "rotary", "mask_token_id": 2}),
    "IBert": ("ForSequenceClassification", {**TEXT, "pad_token_id": 1}),
    "Perceiver": (
        "ForMaskedLM",
        {
            "vocab_size": 64, "num_latents": 8, "d_latents": 32, "d_model": 24, "num_blocks": 1,
            "num_self_attends_per_block": 1, "num_self_attention_heads": 4, "num_cross_attention_heads": 4,
            "qk_channels": 16, "v_channels": 32, "max_position_embeddings": 8,
        },
    ),
}  # fmt: skip
PAIRS: dict[str, dict[str, Any]] = {
    "T5": {
        "vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4,
        "decoder_start_token_id": 0,
    },
    "Bart": BOTH,
    "MBart": BOTH,
    "Pegasus": BOTH,
    "Blenderbot": BOTH,
    "M2M100": BOTH,
}  # fmt: skip
OUTPUTS = (
    "logits", "last_hidden_state", "prediction_logits", "logits_per_image", "pred_boxes", "predicted_depth",
    "class_queries_logits", "masks_queries_logits", "loc", "params", "audio_values", "spectrogram", "reconstruction",
    "prediction_outputs", "image_embeds", "text_embeds",
)  # fmt: skip


def main_outputs(outputs: Any) -> Any:
    """Return the outputs that a task uses, without states of attention that depend on the number of heads."""
    if not hasattr(outputs, "keys"):
        return outputs
    chosen = [outputs[name] for name in OUTPUTS if outputs.get(name) is not None]
    if not chosen:
        raise ValueError(f"no output to compare among {list(outputs)}")
    return chosen


def from_configuration(prefix: str, task: str, settings: dict[str, Any]) -> nn.Module:
    """Return the network ``prefix + task`` of Transformers with random weights."""
    import transformers

    config = getattr(transformers, f"{prefix}Config")(**settings)
    named = getattr(transformers, f"{prefix}{task}", None) or getattr(transformers, f"{prefix}LMHeadModel")
    network: nn.Module = named(config)
    return network


class Named(nn.Module):
    """Call a network with positional inputs by their names, and with fixed keyword arguments."""

    def __init__(self, network: nn.Module, names: tuple[str, ...], **fixed: Any) -> None:
        super().__init__()
        self.network, self.names, self.fixed = network, names, fixed

    def forward(self, *inputs: Any) -> Any:
        """Return the outputs of the network."""
        return self.network(**dict(zip(self.names, inputs, strict=True)), **self.fixed)


class TwoSteps(nn.Module):
    """Read all tokens but the last one, then the last one with the states of the others."""

    def __init__(self, network: nn.Module, states: str) -> None:
        super().__init__()
        self.network, self.states = network, states

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits of both steps for tokens (batch, length)."""
        first = self.network(inputs[:, :-1], use_cache=True)
        cache = {self.states: first[self.states]}
        second = self.network(inputs[:, -1:], use_cache=True, **cache)
        return first.logits, second.logits


def cases() -> Iterator[Case]:
    """Yield the language models."""
    text = tokens(LENGTH)
    for prefix, settings in DECODERS.items():
        build = partial(from_configuration, prefix, "ForCausalLM", settings)
        plain = partial(_called, build, ("input_ids",), use_cache=False)
        yield Case(f"transformers/{prefix}", "transformers", plain, text, main_outputs)
    for prefix in CACHED:
        build = partial(from_configuration, prefix, "ForCausalLM", DECODERS[prefix])
        cached = partial(_called, build, ("input_ids",), use_cache=True)
        yield Case(f"transformers/{prefix}-cache", "transformers", cached, text, main_outputs)
        if prefix != "Mamba":
            yield Case(f"transformers/{prefix}-two-steps", "transformers", partial(_two_steps, build), text)
    for prefix, (task, settings) in ENCODERS.items():
        build = partial(from_configuration, prefix, task, settings)
        yield Case(f"transformers/{prefix}", "transformers", build, text, main_outputs)
    for prefix, settings in PAIRS.items():
        build = partial(from_configuration, prefix, "ForConditionalGeneration", settings)
        both = partial(_called, build, ("input_ids", "decoder_input_ids"), use_cache=False)
        yield Case(f"transformers/{prefix}", "transformers", both, tokens(LENGTH, number=2), main_outputs)


def _called(build: Any, names: tuple[str, ...], **fixed: Any) -> nn.Module:
    return Named(build(), names, **fixed)


def _two_steps(build: Any) -> nn.Module:
    return TwoSteps(build(), "past_key_values")
