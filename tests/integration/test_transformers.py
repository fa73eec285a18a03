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
    same = generated(net, tokens, use_cache=False)
    assert torch.equal(generated(net, tokens, use_cache=True), same)
    assert torch.equal(generated(net, tokens, cache_implementation="static", disable_compile=True), same)


def generated(net, tokens, **options):
    return net.generate(tokens, max_new_tokens=8, do_sample=False, pad_token_id=0, **options)


def test_heads_are_free_in_a_network_that_returns_its_cache():
    net = transformers.AutoModelForCausalLM.from_config(CONFIGURATIONS["llama"]()).eval()
    net.config.use_cache = True
    tokens = torch.randint(0, 50, (1, 7))
    assert net(tokens).past_key_values is not None
    graph = trace(net, input_ids=tokens)
    unit = graph.layers["model.layers.0.self_attn.k_proj.weight"][0]
    dense = with_zeroed_consumers(copy.deepcopy(net), graph, [unit])
    prune_(net, graph, [unit])
    assert net.model.layers[0].self_attn.k_proj.out_features == 8
    torch.testing.assert_close(net(tokens).logits, dense(tokens).logits, rtol=1e-4, atol=1e-6)
    assert torch.equal(generated(net, tokens, use_cache=True), generated(net, tokens, use_cache=False))


@pytest.mark.filterwarnings("ignore:.*past_key_values.* is deprecated:FutureWarning")
def test_cache_of_the_dense_network_as_an_input_pins_the_heads_that_extend_it():
    net = transformers.AutoModelForCausalLM.from_config(CONFIGURATIONS["llama"]()).eval()
    tokens = torch.randint(0, 50, (1, 7))
    with torch.no_grad():
        cache = net(tokens, use_cache=True).past_key_values
    graph = trace(net, input_ids=tokens[:, :1], past_key_values=cache, use_cache=True)
    keys = graph.layers["model.layers.0.self_attn.k_proj.weight"]
    assert not set(keys.tolist()) & set(graph.prunable.tolist())
    assert cache.get_seq_length() == 7
    assert all(tensor.device.type == "cpu" for layer in cache.layers for tensor in (layer.keys, layer.values))
