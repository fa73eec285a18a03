"""Language models of Transformers, built from their configuration: cut right, and they generate afterwards."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import transformers

from lightning_prune import prune_, trace
from lightning_prune.testing import with_zeroed_consumers

SIZES = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 32, "use_cache": False,
}  # fmt: skip
CONFIGURATIONS = {
    "llama": lambda: transformers.LlamaConfig(**SIZES),
    "qwen2": lambda: transformers.Qwen2Config(**SIZES),
    "mistral": lambda: transformers.MistralConfig(**SIZES),
    "gemma": lambda: transformers.GemmaConfig(**SIZES, head_dim=8),
    "phi": lambda: transformers.PhiConfig(**SIZES),
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_language_model_loses_groups_of_heads_and_neurons(name):
    net = transformers.AutoModelForCausalLM.from_config(CONFIGURATIONS[name]()).eval().requires_grad_(False)
    tokens = torch.randint(0, 50, (1, 7))
    graph = trace(net, input_ids=tokens)
    queries = [graph.layers[f"model.layers.{block}.self_attn.q_proj.weight"][0] for block in range(2)]
    neurons = [
        units[::3] for layer, units in graph.layers.items() if ".mlp.fc1" in layer or ".up_proj" in layer
    ]
    units = np.concatenate([queries, *neurons])
    assert set(units.tolist()) <= set(graph.prunable.tolist())
    dense = with_zeroed_consumers(copy.deepcopy(net), graph, units)
    prune_(net, graph, units)
    assert net.model.layers[0].self_attn.q_proj.out_features == 16
    assert net.model.layers[0].self_attn.k_proj.out_features == 8
    torch.testing.assert_close(net(tokens).logits, dense(tokens).logits, rtol=1e-4, atol=1e-6)
    net.config.use_cache = True
    assert net.generate(tokens, max_new_tokens=3, do_sample=False).shape == (1, 10)
