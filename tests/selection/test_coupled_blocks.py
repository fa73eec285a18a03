"""Coupled blocks: layers that are pruned together in a round."""

from __future__ import annotations

import pytest
import torch
from segmentation_models_pytorch import Unet

from lightning_prune import trace
from lightning_prune.selection.coupled_blocks import find_blocks
from tests.support.nets import Small


@pytest.fixture(scope="module")
def unet():
    net = Unet("resnet18", encoder_weights=None, in_channels=1, classes=3)
    return trace(net, torch.zeros(1, 1, 64, 64))


def units_of(graph, blocks):
    return [unit for block in blocks for unit in block.units(graph).tolist()]


def test_coupled_layers_are_one_block():
    graph = trace(Small(), torch.zeros(1, 3, 16, 16))
    names = [block.layers for block in find_blocks(graph)]
    assert ("stem.weight", "back.weight", "depthwise.weight") in names
    assert ("inner.weight",) in names
    assert not any("head.weight" in layers for layers in names)


@pytest.mark.parametrize("number", [None, 10, 3, 1])
def test_every_prunable_unit_is_in_one_block(unet, number):
    blocks = find_blocks(unet, number)
    assert sorted(units_of(unet, blocks)) == unet.prunable.tolist()
    assert number is None or len(blocks) == number
    assert len({block.name for block in blocks}) == len(blocks)


def test_ten_blocks_of_a_unet_are_its_stages(unet):
    names = [block.name for block in find_blocks(unet, 10)]
    stages = [f"encoder.layer{n}" for n in (1, 2, 3, 4)]
    assert names == ["encoder", *stages, *(f"decoder.blocks.{n}" for n in range(5))]


def test_named_blocks_include_the_layers_that_theirs_are_coupled_with(unet):
    first, second = find_blocks(unet, ["encoder.layer1", "decoder.*"])
    assert "encoder.conv1.weight" in first.layers
    assert len(second.layers) == 10
    with pytest.raises(ValueError, match="belong to a block that was named before"):
        find_blocks(unet, ["encoder", "encoder.layer1"])


def test_excluded_layers_are_in_no_block(unet):
    blocks = find_blocks(unet, exclude=["encoder"])
    assert all(layer.startswith("decoder") for block in blocks for layer in block.layers)


def test_a_number_of_blocks_below_one_is_refused(unet):
    with pytest.raises(ValueError, match="at least 1 block"):
        find_blocks(unet, 0)
