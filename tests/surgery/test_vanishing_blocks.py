"""Tests that residual blocks vanish exactly: outputs, gradients, statistics, in eval and train mode."""

from __future__ import annotations

import copy
import io
import pickle
from itertools import product

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_prune import SurgeryError, prune_, residual_blocks, trace
from lightning_prune.graph.block_costs import block_costs, without_blocks
from lightning_prune.graph.block_search import blocks_of
from lightning_prune.serialization.carried_record import carried_record, regrow_
from lightning_prune.serialization.record import PruningRecord, RecordError
from lightning_prune.serialization.saving import load_pruned, save_pruned
from lightning_prune.utils import stand_ins
from tests.support.residual_nets import KINDS, Basic, Preactivated, Stack, largest_difference

IMAGE = torch.rand(2, 3, 8, 8)


def stack(*kinds, **options) -> Stack:
    torch.manual_seed(0)
    return Stack(kinds, **options)


def test_every_kind_of_branch_is_found():
    blocks = residual_blocks(stack(*KINDS), IMAGE)
    assert list(blocks) == [
        "blocks.0",
        "blocks.1",
        "blocks.2",
        "blocks.3.attn",
        "blocks.3.mlp",
        "blocks.4.gate",
        "blocks.4.conv",
        "blocks.5",
        "blocks.6",
    ]
    assert blocks.fixed == {}


class FirstOnly(nn.Module):
    """XCiT's class attention: the layers of the branch see one half of the channels, the other half joins it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.half, self.mlp = width // 2, nn.Conv2d(width // 2, width // 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = x.relu()
        return y + torch.cat([self.mlp(y[:, : self.half]), y[:, self.half :]], dim=1)


def test_a_branch_that_is_not_zero_without_its_layers_stays():
    blocks = residual_blocks(stack(Basic, FirstOnly), IMAGE)
    assert list(blocks) == ["blocks.0"]
    assert blocks.fixed == {
        "blocks.1": "what its modules return reaches the addition only together with other values"
    }


@pytest.mark.parametrize("taps", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_block_vanishes_exactly(kind, taps):
    for number in (0, 1):  # the first or the second of two blocks of one kind, each of their branches
        names = [n for n in residual_blocks(stack(kind, kind), IMAGE) if n.startswith(f"blocks.{number}")]
        for chosen in ([names[0]], names):
            difference, record = largest_difference(stack(kind, kind, taps=taps), IMAGE, chosen)
            assert difference < 1e-5, chosen
            assert record.vanished


def test_all_pairs_of_kinds_vanish_exactly():
    for first, second in product(KINDS, KINDS):
        if (first, second) in ((Basic, Preactivated), (Preactivated, Basic)):
            continue  # autograd refuses to work in place on what a ReLU has saved, also before a block vanishes
        net = stack(first, second, first)
        names = [name for name in residual_blocks(net, IMAGE) if name.startswith("blocks.1")]
        assert largest_difference(net, IMAGE, names)[0] < 1e-5


def test_a_branch_is_not_added_to_a_stream_that_a_later_block_changes_in_place():
    # The block behind works in place. Without the block before it, that would change features that are returned.
    net = stack(Preactivated, Preactivated, taps=True)
    assert largest_difference(net, IMAGE, ["blocks.0"])[0] < 1e-5


def test_parameters_costs_and_optimizer_state_go():
    net = stack(Basic, Basic)
    graph = trace(net, IMAGE)
    expected = {name: graph.cost(name) - cost for name, cost in block_costs(graph)["blocks.0"].items()}
    optimizer = torch.optim.Adam(
        [{"params": net.stem.parameters()}, {"params": [*net.blocks.parameters(), *net.head.parameters()]}]
    )
    net(IMAGE).sum().backward()
    optimizer.step()
    gone = list(net.blocks[0].parameters())
    momentum = optimizer.state[net.head.weight]["exp_avg"].clone()
    prune_(net, graph, optimizers=[optimizer], blocks=["blocks.0"])
    smaller = trace(net, IMAGE)
    assert {name: smaller.cost(name) for name in expected} == expected
    assert sum(p.numel() for p in net.parameters()) == expected["params"]
    assert not any(p in optimizer.state for p in gone)
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, len(list(net.parameters())) - 2]
    assert torch.equal(optimizer.state[net.head.weight]["exp_avg"], momentum)


def test_blocks_and_channels_go_in_one_call():
    net = stack(Basic, Basic, Basic)
    graph = trace(net, IMAGE)
    inner, stream = graph.layers["blocks.1.conv1.weight"][:3], graph.layers["stem.weight"][:2]
    record = prune_(
        net, graph, [*inner, *stream, *graph.layers["blocks.0.conv1.weight"]], blocks=["blocks.0"]
    )
    assert net.blocks[1].conv1.weight.shape == (5, 6, 3, 3)
    assert net(IMAGE).shape == (2, 2, 8, 8)
    again = record.apply_(stack(Basic, Basic, Basic))
    again.load_state_dict(net.state_dict())
    assert torch.equal(again.eval()(IMAGE), net.eval()(IMAGE))


def test_costs_without_blocks_are_those_of_the_network_without_them():
    for kind in KINDS:
        net = stack(kind, kind)
        graph = trace(net, IMAGE)
        names = [name for name in blocks_of(graph) if name.startswith("blocks.1")]
        predicted = {name: without_blocks(graph, names).cost(name) for name in ("macs", "params")}
        prune_(net, graph, blocks=names)
        assert {name: trace(net, IMAGE).cost(name) for name in predicted} == predicted


@pytest.mark.parametrize("kind", KINDS)
def test_the_record_replays_on_a_fresh_network_and_travels_with_the_modules(kind, tmp_path):
    net = stack(kind, kind).eval()
    names = list(residual_blocks(net, IMAGE))
    first = prune_(net, trace(net, IMAGE), blocks=names[:1])
    record = first.then(prune_(net, trace(net, IMAGE), blocks=list(residual_blocks(net, IMAGE))[:1]))
    expected = net(IMAGE)
    assert carried_record(copy.deepcopy(net)) == record
    assert PruningRecord.from_dict(record.to_dict()) == record
    save_pruned(net, record, tmp_path / "small.safetensors")
    loaded = load_pruned(stack(kind, kind), tmp_path / "small.safetensors").eval()
    assert torch.equal(loaded(IMAGE), expected)
    # the same file into a network from which the blocks have vanished already, and one from which others have
    other = stack(kind, kind)
    prune_(other, trace(other, IMAGE), blocks=names[-1:])
    for again in (loaded, other):
        assert torch.equal(load_pruned(again, tmp_path / "small.safetensors").eval()(IMAGE), expected)
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(IMAGE), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_network_gets_its_dense_shape_back(kind):
    dense = stack(kind, kind).eval()
    net = copy.deepcopy(dense)
    for _ in range(2):
        prune_(net, trace(net, IMAGE), blocks=list(residual_blocks(net, IMAGE))[:1])
    regrow_(net)
    net.load_state_dict(dense.state_dict())
    assert torch.equal(net(IMAGE), dense(IMAGE))
    assert all(parameter.requires_grad for parameter in net.parameters())


def test_a_record_of_other_blocks_is_refused():
    record = PruningRecord(vanished={"blocks.7": {"as": "skipped"}})
    with pytest.raises(RecordError, match=r"'blocks.7' cannot vanish"):
        record.apply_(stack(Basic))
    for damaged in ({"as": "nothing"}, {"as": "skipped", "function": "eval"}, {}):
        with pytest.raises(RecordError, match="cannot vanish"):
            PruningRecord(vanished={"blocks.0": damaged}).apply_(stack(Basic))


def test_a_failed_proof_puts_everything_back(monkeypatch):
    net = stack(Basic, Basic)
    before = copy.deepcopy(net.state_dict())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    net(IMAGE).sum().backward()
    optimizer.step()
    before, states = copy.deepcopy(net.state_dict()), len(optimizer.state)
    # A wrong replacement: the second block returns its input without the activation behind the sum.
    from lightning_prune.graph import residual_blocks as module

    skipped = module.skipped_owners
    monkeypatch.setattr(
        module,
        "skipped_owners",
        lambda *args: {name: {"as": "skipped", "source": 0} for name in skipped(*args)},
    )
    monkeypatch.setattr(
        module, "replacements_of", lambda flows, adds, names: {n: {"as": "zero"} for n in names}
    )
    with pytest.raises(SurgeryError, match="rolled back") as error:
        prune_(net, trace(net, IMAGE), [], [optimizer], blocks=["blocks.0", "blocks.1"])
    assert set(error.value.blocks) == {"blocks.0", "blocks.1"}
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert len(optimizer.param_groups[0]["params"]) == states == len(list(net.parameters()))
    assert isinstance(net.blocks[0], Basic)


class ReadTwice(nn.Module):
    """Adds layers of its input at both ends, and an activation that is itself a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1)
        self.block = Formula(8)

    def forward(self, image: Tensor) -> Tensor:
        return self.block(self.first(image)) + self.last(image)


class Formula(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Conv2d(width, 6, 1), nn.Conv2d(6, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        y = torch.tanh(y + 0.04 * y**3)
        return x + self.down(y)


def test_an_input_may_be_read_again_behind_a_block_that_vanishes():
    blocks = residual_blocks(ReadTwice(), IMAGE)
    assert list(blocks) == ["block"]  # the sum within the activation is none
    assert largest_difference(ReadTwice(), IMAGE, ["block"])[0] < 1e-6


class Cloned(nn.Module):
    """Adds to a copy of its input what a branch returned, if that has the shape for it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(width), nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(self.norm(x))
        return x.clone() + (y if y.shape[2:] == x.shape[2:] else F.adaptive_avg_pool2d(y, x.shape[2:]))


def test_a_branch_vanishes_whose_shape_the_code_behind_it_reads():
    difference, record = largest_difference(Stack([Cloned, Basic]), IMAGE, ["blocks.0"])
    assert difference < 1e-4
    assert record.vanished["blocks.0.conv"]["as"] == "zero"


class Shorter(nn.Module):
    """Class attention: the branch reads one token and all others, and returns one; a scale is behind it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix = OfFirst(width)
        self.gamma = nn.Parameter(torch.rand(width))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        first = tokens[:, :1]
        first = first + self.gamma * self.mix(torch.cat((first, tokens), 1))
        return (tokens + first).transpose(1, 2).reshape(x.shape)


class OfFirst(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.linear(tokens.mean(1, keepdim=True))


def test_a_branch_vanishes_that_returns_fewer_tokens_than_it_reads():
    net = Stack([Shorter, Basic])
    names = [name for name in residual_blocks(net, IMAGE) if name.startswith("blocks.0")]
    assert names
    assert largest_difference(net, IMAGE, names)[0] < 1e-4


class Within(nn.Module):
    """A block that is added within a module of another block, as in FastViT: both vanish at once."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mixer, self.mlp = Mixed(width), nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mixer(x)
        return x + self.mlp(x)


class Mixed(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(width), nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(self.norm(x))


def test_a_block_and_one_in_a_module_within_it_vanish_at_once():
    net = Stack([Within, Basic])
    names = [name for name in residual_blocks(net, IMAGE) if name.startswith("blocks.0")]
    assert len(names) == 2
    difference, record = largest_difference(net, IMAGE, names)
    assert difference < 1e-4
    assert list(record.vanished) == ["blocks.0"]


class Projected(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.project = nn.Conv2d(8, 12, 3, padding=1), nn.Conv2d(8, 12, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + self.project(x)


class Used(nn.Module):
    """The branch is returned, too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.conv(x)
        return x + y, y


class Twice(nn.Module):
    """One layer in two branches."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.conv(x)
        return x + self.conv(x)


class Inline(nn.Module):
    """The code of the block itself applies the weight of one of two branches."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.conv = nn.Parameter(torch.rand(3, 3, 1, 1)), nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x + torch.nn.functional.conv2d(x, self.weight)
        return x + self.conv(x)


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(3, 8, 1), Basic(8), nn.Conv2d(8, 3, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


@pytest.mark.parametrize(
    ("net", "name", "reason"),
    [
        (nn.Sequential(nn.Conv2d(3, 8, 1), Projected()), "1", "shortcut is computed by a layer"),
        (Used(), "addition 0", "branch is used elsewhere"),
        (Twice(), "conv", "no layer of its own"),
        (nn.Sequential(Inline()), "0", "read by the code of the block itself"),
        (nn.Sequential(Nested()), "0", "contains other blocks"),
    ],
)
def test_blocks_that_cannot_vanish_say_why(net, name, reason):
    blocks = residual_blocks(net, IMAGE)
    found = {key: text for key, text in blocks.fixed.items() if reason in text}
    assert found, (blocks.fixed, list(blocks))
    with pytest.raises(ValueError, match=f"cannot vanish: .*{reason}"):
        prune_(net, trace(net, IMAGE), blocks=[next(iter(found))])


def test_unknown_blocks_are_answered_with_the_nearest():
    net = stack(Basic)
    with pytest.raises(ValueError, match=r"no residual block 'block.0': did you mean 'blocks.0'"):
        prune_(net, trace(net, IMAGE), blocks=["block.0"])


def test_hooks_and_attributes_of_a_vanished_block_stay():
    net = stack(Basic, Basic)
    net.blocks[0].expansion = 4
    seen = []
    handle = net.blocks[0].register_forward_hook(lambda module, args, out: seen.append(out.shape))
    prune_(net, trace(net, IMAGE), blocks=["blocks.0"])
    seen.clear()  # of what ran while the network was traced
    net(IMAGE)
    assert net.blocks[0].expansion == 4
    assert seen == [(2, 8, 8, 8)]
    handle.remove()
    net(IMAGE)
    assert len(seen) == 1


@pytest.mark.parametrize("made", [stand_ins.Zero(), stand_ins.Passed(), stand_ins.Skipped()])
def test_networks_are_read_that_were_stored_when_the_classes_were_in_another_file(made):
    x = torch.randn(2, 3)
    stored = pickle.dumps(made, protocol=0).replace(
        b"lightning_prune.utils.stand_ins", b"lightning_prune.utils.vanished"
    )
    assert b"lightning_prune.utils.vanished" in stored
    assert torch.equal(pickle.loads(stored)(x), made(x))


def test_a_smaller_network_exports_and_compiles():
    net = stack(*KINDS).eval()
    prune_(net, trace(net, IMAGE), blocks=list(residual_blocks(net, IMAGE))[::2])
    expected = net(IMAGE)
    exported = torch.export.export(net, (IMAGE,)).module()
    assert torch.allclose(exported(IMAGE), expected, atol=1e-5)
    compiled = torch.compile(net, backend="eager")
    assert torch.allclose(compiled(IMAGE), expected, atol=1e-5)
