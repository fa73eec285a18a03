"""The picture of a graph: places that show the shape of a network, edges, and files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from lightning_prune import trace
from lightning_prune.graph.picture import Picture
from lightning_prune.graph.picture_layout import MOST_LAYERS, MOST_NODES
from tests.support.small_unet import SmallUNet


@pytest.fixture(scope="module")
def picture() -> Picture:
    return trace(SmallUNet(), torch.zeros(1, 1, 32, 32)).show()


def names(picture: Picture) -> list[str]:
    return [node.name for node in picture.layout.nodes]


def test_a_u_net_has_the_shape_of_a_u(picture: Picture) -> None:
    nodes = {node.name: node for node in picture.layout.nodes}
    order = ["down.0", "body.0", "down.1", "body.1", "down.2", "body.2", "up.0", "up.1", "head"]
    assert names(picture) == order
    assert [label for label, _ in picture.layout.levels] == ["16 x 16", "8 x 8", "4 x 4"]
    down, up = [nodes[f"down.{i}"].y for i in range(3)], [nodes[f"up.{i}"].y for i in range(2)]
    assert down == sorted(set(down))
    assert down[2] > up[0] > up[1] == nodes["head"].y


def test_arrows_lead_from_writers_to_readers_and_skips_stay_at_their_resolution(picture: Picture) -> None:
    order = names(picture)
    edges = {(order[a], order[b]) for a, b in picture.layout.edges}
    assert edges == {
        *(("down.0", "body.0"), ("body.0", "down.1"), ("down.1", "body.1"), ("body.1", "down.2")),
        *(("down.2", "body.2"), ("body.2", "up.0"), ("up.0", "up.1"), ("up.1", "head")),
        *(("body.1", "up.0"), ("body.0", "up.1")),
    }


def test_coupled_layers_share_a_band_and_a_row(picture: Picture) -> None:
    bands = [[node.name for node in band] for band in picture.layout.bands()]
    assert bands == [["down.0", "body.0"], ["down.1", "body.1"], ["down.2", "body.2"]]
    assert all(len({node.y for node in band}) == 1 for band in picture.layout.bands())


def test_no_two_nodes_lie_on_each_other(picture: Picture) -> None:
    places = [(node.x, node.y) for node in picture.layout.nodes]
    assert len(set(places)) == len(places)


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_a_file_is_written(ending: str, tmp_path: Path) -> None:
    graph = trace(SmallUNet(), torch.zeros(1, 1, 32, 32))
    graph.show(tmp_path / f"graph.{ending}", remove=[0])
    content = (tmp_path / f"graph.{ending}").read_bytes()
    assert content.startswith({"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[ending])
    if ending == "png":
        assert np.asarray(Image.open(tmp_path / "graph.png").convert("L")).std() > 5  # not empty


def test_a_notebook_gets_a_picture(picture: Picture) -> None:
    assert picture._repr_png_().startswith(b"\x89PNG")
    assert repr(picture) == "Picture(9 nodes; save it by .save('graph.svg'))"


def test_a_large_network_is_drawn_by_coupled_layers_and_blocks() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 4), nn.Linear(4, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.second(self.first(x))

    net = nn.Sequential(nn.Linear(3, 6), *(Block() for _ in range(150)), nn.Linear(6, 2))
    graph = trace(net, torch.zeros(1, 3))
    layout = graph.show().layout
    assert len(graph.layers) > MOST_LAYERS
    assert len(layout.nodes) <= MOST_NODES
    assert sum(len(node.layers) for node in layout.nodes) == len(graph.layers)
    (stream,) = (node for node in layout.nodes if node.group is not None)
    assert stream.name == "0 and 150 more"
    assert layout.nodes[1].name == "1 to 2 and 1 more"


def test_a_graph_without_layers_is_drawn() -> None:
    class Free(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2

    graph = trace(Free(), torch.zeros(1, 3))
    assert graph.show().layout.nodes == []
    assert graph.summary().text(60)
    assert repr(graph).startswith("ChannelGraph(0 layers")
