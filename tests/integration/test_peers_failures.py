"""Tests of cases in which other pruning tools fail.

The first number in a name counts the kind of failure; those after ``issue`` are Torch-Pruning's issues.
"""

from __future__ import annotations

import copy
import io
import json

import pytest
import torch
import torchvision.models as tv
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from lightning_prune import PruningRecord, SurgeryError, prune_, trace
from lightning_prune.testing import error, randomise_, with_dead_filters
from tests.support.nets import (
    Attention,
    Net,
    Outcome,
    counted_macs,
    cut,
    independent_units,
    parameters,
    random_units,
    state,
)

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))


def conv(into: int, out: int, kernel: int = 3, **options: int) -> nn.Conv2d:
    return nn.Conv2d(into, out, kernel, padding=kernel // 2, **options)


def backbone() -> nn.Module:
    return nn.Sequential(
        conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 12), nn.BatchNorm2d(12), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4),
    )  # fmt: skip


def assert_exact(outcome: Outcome, units: int) -> None:
    assert len(outcome.graph.prunable) == units
    assert 0 < len(outcome.remove) <= units
    assert outcome.dead < 1e-5
    assert parameters(outcome.model) < parameters(outcome.dense)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    target, losses = torch.tensor([0, 1]), []
    for _ in range(steps):
        loss = F.cross_entropy(model.train()(X), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def test_peer_01_frozen_parameters_are_pruned_like_any_other_issues_136_356_463():
    model = randomise_(backbone())
    model[:6].requires_grad_(False)
    outcome = cut(model, X)
    assert_exact(outcome, 8 + 12)
    assert outcome.model[0].out_channels < 8
    assert outcome.model[3].out_channels < 12
    assert [p.requires_grad for p in outcome.model.parameters()] == [
        p.requires_grad for p in model.parameters()
    ]


def test_peer_02_every_parameter_of_the_optimizer_is_alive_after_surgery_issue_120():
    model = backbone()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    train(model, optimizer, 2)
    graph = trace(model, X)
    prune_(model, graph, random_units(graph), [optimizer])
    parameter_ids = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert parameter_ids == {id(p) for p in model.parameters()}
    before = [p.detach().clone() for p in model.parameters()]
    train(model, optimizer, 2)
    schedule.step()
    moved = [not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True)]
    assert all(moved)
    assert optimizer.param_groups[0]["lr"] == 0.005


@pytest.mark.parametrize("carried", [True, False])
def test_peer_03_the_loss_falls_on_when_surgery_is_inside_the_loop_issue_379(carried):
    torch.manual_seed(1)
    model = backbone()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    before = train(model, optimizer, 5)
    for seed in range(3):
        graph = trace(model, X)
        prune_(model, graph, random_units(graph, seed, 0.2), [optimizer] if carried else [])
        if not carried:
            optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        losses = train(model, optimizer, 8)
        assert losses[-1] < losses[0]
    assert losses[-1] < 0.5 * before[0]


def test_peer_05_densenet_is_traced_without_search_or_recursion_issues_243_474():
    model = tv.densenet121(weights=None)
    graph = trace(model, torch.zeros(1, 3, 64, 64))  # benchmarks/speed/tracing.py has the time
    assert len(graph.prunable) == sum(
        len(units) for name, units in graph.layers.items() if name != "classifier.weight"
    )
    assert graph.layers["features.denseblock4.denselayer16.conv1.weight"].size == 128


def test_peer_05_a_thousand_layers_do_not_exhaust_the_stack():
    blocks = [Net(lambda m, x: x + m.b(F.relu(m.a(x))), a=conv(4, 2, 1), b=conv(2, 4, 1)) for _ in range(500)]
    model = nn.Sequential(conv(3, 4, 1), *blocks, conv(4, 2, 1))
    graph = trace(model, torch.zeros(1, 3, 2, 2))
    assert len(graph.prunable) == 4 + 500 * 2


def test_peer_06_weights_and_record_reload_without_pickle_issues_51_399():
    model = backbone()
    graph = trace(model, X)
    record = prune_(model, graph, random_units(graph))
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    text = json.dumps(record.to_dict())
    buffer.seek(0)
    rebuilt = PruningRecord.from_dict(json.loads(text)).apply_(backbone())
    rebuilt.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(rebuilt.eval()(X), model.eval()(X))


def test_peer_07_pixel_shuffle_keeps_whole_pixels_issues_98_420():
    model = nn.Sequential(
        conv(3, 16), nn.PixelShuffle(2), conv(4, 6), nn.ReLU(), conv(6, 4), nn.PixelUnshuffle(2), conv(16, 2)
    )
    outcome = cut(model, X)
    assert_exact(outcome, 4 + 6 + 4)
    assert outcome.model[0].out_channels % 4 == 0
    assert outcome.zeroed < 1e-5


def shuffled(x: Tensor, groups: int) -> Tensor:
    b, c, h, w = x.shape
    return x.view(b, groups, c // groups, h, w).transpose(1, 2).reshape(b, c, h, w)


@pytest.mark.parametrize(
    ("mix", "units"), [(lambda x: shuffled(x, 2), 4), (lambda x: x.flip(1), 8)], ids=["shuffle", "flip"]
)
def test_peer_08_channel_shuffle_and_flip_give_the_right_output_issues_14_45(mix, units):
    model = Net(
        lambda m, x: m.head(F.relu(m.a(mix(m.stem(x))))), stem=conv(3, 8), a=conv(8, 6), head=conv(6, 2)
    )
    outcome = cut(model, X)
    assert_exact(outcome, units + 6)
    assert outcome.zeroed < 1e-5


def test_peer_08_shufflenet_gives_the_right_output_issue_14():
    outcome = cut(tv.shufflenet_v2_x0_5(weights=None, num_classes=10), torch.randn(2, 3, 64, 64))
    assert outcome.dead < 1e-5
    assert outcome.zeroed < 1e-5
    assert parameters(outcome.model) < 0.8 * parameters(outcome.dense)


class C2f(nn.Module):
    """YOLOv8's block: chunk in two, chain bottlenecks on the last part, concatenate everything."""

    def __init__(self, into: int, out: int, hidden: int, repeats: int) -> None:
        super().__init__()
        self.c = hidden
        self.cv1 = conv(into, 2 * hidden, 1)
        self.cv2 = conv((2 + repeats) * hidden, out, 1)
        self.m = nn.ModuleList(nn.Sequential(conv(hidden, hidden), nn.SiLU()) for _ in range(repeats))

    def forward(self, x: Tensor) -> Tensor:
        y = list(self.cv1(x).chunk(2, 1))
        y.extend(m(y[-1]) for m in self.m)
        return self.cv2(torch.cat(y, 1))


class C2fBySplit(C2f):
    def forward(self, x: Tensor) -> Tensor:
        y = list(self.cv1(x).split((self.c, self.c), 1))
        y.extend(m(y[-1]) for m in self.m)
        return self.cv2(torch.cat(y, 1))


@pytest.mark.parametrize("block", [C2f, C2fBySplit])
def test_peer_09_yolo_c2f_chunks_and_concatenates_all_parts_issue_147(block):
    model = nn.Sequential(conv(3, 8), block(8, 10, 4, 3), nn.SiLU(), conv(10, 2))
    outcome = cut(model, X)
    assert_exact(outcome, 8 + 4 + 3 * 4 + 10)
    assert outcome.zeroed < 1e-5


def test_peer_10_a_tensor_concatenated_with_itself_issue_146():
    model = Net(lambda m, x: m.head(torch.cat([m.stem(x)] * 2, 1)), stem=conv(3, 8), head=conv(16, 2))
    outcome = cut(model, X)
    assert_exact(outcome, 8)
    assert outcome.zeroed < 1e-5
    assert outcome.model.head.in_channels == 2 * outcome.model.stem.out_channels


def test_peer_11_independent_branches_stay_independent_issue_481():
    def run(m: nn.Module, x: Tensor) -> Tensor:
        x = m.stem(x)
        return m.head(torch.cat([m.a2(F.relu(m.a1(x))), m.b2(F.relu(m.b1(x))), m.c(x)], 1))

    model = Net(
        run,
        stem=conv(3, 8),
        a1=conv(8, 4),
        a2=conv(4, 5),
        b1=conv(8, 4),
        b2=conv(4, 5),
        c=conv(8, 5),
        head=conv(15, 2),
    )
    graph = trace(model, X)
    assert len(graph.prunable) == 8 + 4 + 5 + 4 + 5 + 5
    prune_(model, graph, graph.layers["a2.weight"][:4])
    assert [len(m.weight) for m in (model.a1, model.a2, model.b1, model.b2, model.c)] == [4, 1, 4, 5, 5]


@pytest.mark.parametrize("into", [8, 1])
def test_peer_12_a_binary_head_is_no_depthwise_convolution_issues_126_179(into):
    model = nn.Sequential(conv(3, into), nn.ReLU(), conv(into, 6), nn.ReLU(), conv(6, 1))
    outcome = cut(model, X)
    assert_exact(outcome, into + 6)
    assert outcome.graph.pinned[int(outcome.graph.layers["4.weight"][0])] == "is the network's output"
    assert outcome.model[4].weight.shape[0] == 1


def test_peer_14_a_pinned_layer_loses_inputs_and_the_graph_shows_it_issues_160_341():
    model = backbone()
    graph = trace(model, X)
    head = graph.layers["8.weight"]
    assert all(unit in graph.pinned for unit in head.tolist())
    assert graph.bindings["8.weight"][1].tolist() == graph.layers["3.weight"].tolist()
    record = prune_(model, graph, graph.layers["3.weight"][:5])
    assert record.kept["8.weight"] == {1: list(range(5, 12))}
    assert model[8].weight.shape == (4, 7)


def test_peer_15_attention_gets_its_new_number_of_heads_issues_57_101_357_450():
    model = nn.Sequential(nn.Linear(7, 12), Attention(12, 4), nn.Linear(12, 2))
    outcome = cut(model, torch.randn(2, 5, 7), seed=1, share=0.7)
    assert_exact(outcome, 12 + 4 + 12)
    attention = outcome.model[1]
    assert attention.num_heads * attention.head_dim * 3 == attention.qkv.out_features
    assert attention.head_dim == 3
    assert attention.num_heads < 4


def test_peer_15_heads_and_hidden_units_of_vit_and_swin_are_removed_without_options_issues_258_490():
    timm = pytest.importorskip("timm")
    for name, options in (
        ("vit_tiny_patch16_224", {"img_size": 32, "depth": 2}),
        (
            "swin_tiny_patch4_window7_224",
            {"img_size": 56, "depths": (2, 2), "num_heads": (3, 6), "embed_dim": 24},
        ),
    ):
        model = timm.create_model(name, num_classes=4, **options)
        x = torch.randn(2, 3, options["img_size"], options["img_size"])
        outcome = cut(model, x, share=0.4)
        assert outcome.dead < 1e-5, name
        assert parameters(outcome.model) < 0.9 * parameters(outcome.dense), name
        shrunk = {path.rpartition(".")[2] for path in outcome.record.attributes}
        assert "num_heads" in shrunk, name


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_peer_18_recurrent_layers_are_cut_right_or_pinned_by_name_issues_44_276_404(kind):
    model = Net(
        lambda m, x: m.head(F.relu(m.mix(m.cell(F.relu(m.embed(x)))[0]))),
        embed=nn.Linear(7, 8), cell=kind(8, 6, batch_first=True), mix=nn.Linear(6, 5), head=nn.Linear(5, 2),
    )  # fmt: skip
    outcome = cut(model, torch.randn(2, 5, 7))
    assert outcome.dead < 1e-5
    assert len(outcome.model.mix.weight) < 5
    reasons = {outcome.graph.pinned.get(u) for u in outcome.graph.layers["embed.weight"].tolist()} - {None}
    assert all("in cell" in reason for reason in reasons)


class FrozenBatchNorm(nn.Module):
    """The batch norm of detection networks, in which weight and bias are buffers."""

    def __init__(self, n: int) -> None:
        super().__init__()
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((n,), value))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight.reshape(1, -1, 1, 1) * (self.running_var.reshape(1, -1, 1, 1) + 1e-5).rsqrt()
        return x * scale + (self.bias.reshape(1, -1, 1, 1) - self.running_mean.reshape(1, -1, 1, 1) * scale)


def test_peer_19_frozen_batch_norm_is_cut_along_issue_211():
    model = Net(
        lambda m, x: m.head(F.relu(m.norm(m.stem(x)))),
        stem=conv(3, 8),
        norm=FrozenBatchNorm(8),
        head=conv(8, 2),
    )
    generator = torch.Generator().manual_seed(0)
    for buffer in model.buffers():
        buffer.add_(torch.rand(8, generator=generator))
    outcome = cut(model, X)
    assert len(outcome.graph.prunable) == 8
    assert outcome.zeroed < 1e-5  # the shift is a buffer, so that a dead filter's output is not 0
    assert {len(buffer) for buffer in outcome.model.buffers()} == {outcome.model.stem.out_channels}


def test_peer_19_torchvisions_frozen_batch_norm_is_cut_along_issue_211():
    from torchvision.ops import FrozenBatchNorm2d

    model = tv.resnet18(weights=None, num_classes=10, norm_layer=FrozenBatchNorm2d)
    outcome = cut(model, torch.randn(2, 3, 32, 32))
    assert len(outcome.remove) > 500
    assert outcome.zeroed < 1e-5


@pytest.mark.parametrize(
    "reshape",
    [
        lambda x: x.view(x.size(0), -1),
        lambda x: x.view(-1, x.size(1) * x.size(2) * x.size(3)),
        lambda x: x.reshape(len(x), -1),
        lambda x: torch.flatten(x, 1),
        lambda x: x.permute(0, 2, 3, 1).flatten(1),
        lambda x: x.view(*x.shape[:2], -1).transpose(1, 2).flatten(1),
    ],
    ids=["free", "by_sizes", "by_length", "flatten", "channels_last", "transposed"],
)
def test_peer_19_views_before_a_linear_layer_issue_125(reshape):
    model = Net(
        lambda m, x: m.head(F.relu(m.hidden(reshape(F.adaptive_avg_pool2d(m.stem(x), 3))))),
        stem=conv(3, 6), hidden=nn.Linear(54, 5), head=nn.Linear(5, 2),
    )  # fmt: skip
    outcome = cut(model, X)
    assert_exact(outcome, 6 + 5)
    assert outcome.zeroed < 1e-5


def test_peer_19_loose_parameters_follow_their_channels_issue_184():
    model = Net(
        lambda m, x: m.head(m.scale[:, None, None] * m.stem(x) + m.shift),
        stem=conv(3, 8), head=conv(8, 2),
        scale=nn.Parameter(torch.rand(8)), shift=nn.Parameter(torch.rand(1, 8, 1, 1)),
    )  # fmt: skip
    outcome = cut(model, X)
    assert_exact(outcome, 8)
    width = outcome.model.stem.out_channels
    assert (outcome.model.scale.shape, outcome.model.shift.shape) == ((width,), (1, width, 1, 1))


def test_peer_21_macs_contain_attentions_matrix_products():
    model = nn.Sequential(nn.Linear(7, 12), Attention(12, 4), nn.Linear(12, 2))
    x = torch.randn(1, 9, 7)
    graph = trace(model, x)
    layers = 9 * (7 * 12 + 12 * 36 + 12 * 12 + 12 * 2)
    products = 2 * 9 * 9 * 12
    assert graph.cost("macs") == layers + products == counted_macs(model, x)
    heads = graph.layers["1.qkv.weight"][:1]
    assert graph.cost("macs", heads) == layers + products - 9 * (12 * 9 + 3 * 12) - products // 4


def test_peer_21_macs_of_the_multihead_attention_module_contain_them():
    x = torch.randn(1, 9, 12)
    module = nn.MultiheadAttention(12, 4, batch_first=True)
    net = Net(lambda m, x: m.mha(x, x, x, need_weights=False)[0], mha=module)
    assert trace(net, x).cost("macs") == 9 * 12 * 36 + 9 * 12 * 12 + 2 * 9 * 9 * 12


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.Linear])
def test_peer_22_parametrised_weight_norm_is_cut(kind):
    if kind is nn.Linear:
        model = nn.Sequential(
            nn.Linear(3, 8), parametrizations.weight_norm(nn.Linear(8, 6)), nn.ReLU(), nn.Linear(6, 2)
        )
        x = torch.randn(2, 3)
    else:
        model = nn.Sequential(conv(3, 8), parametrizations.weight_norm(conv(8, 6)), nn.ReLU(), conv(6, 2))
        x = X
    model = randomise_(model).eval()
    dense = copy.deepcopy(model)
    graph = trace(model, x)
    weight = "1.parametrizations.weight.original1"
    assert weight in graph.layers
    prune_(model, graph, graph.layers[weight][:2])
    assert model[1].weight.shape[0] == 4
    assert model[3].weight.shape[1] == 4
    with torch.no_grad():
        dense[3].weight[:, :2] = 0
    assert error(dense, model, x) < 1e-6


def test_peer_22_the_module_under_weight_norm_prints_its_true_size():
    model = nn.Sequential(conv(3, 8), parametrizations.weight_norm(conv(8, 6)), nn.ReLU(), conv(6, 2))
    graph = trace(model, X)
    prune_(model, graph, graph.layers["1.parametrizations.weight.original1"][:2])
    assert (model[1].out_channels, model[1].in_channels) == (4, 8)


@pytest.mark.parametrize("training", [True, False])
def test_peer_23_a_trace_and_a_cut_leave_the_mode_of_every_module(training):
    model = backbone().train(training)
    model[1].eval()
    modes = state(model)["modes"]
    graph = trace(model, X)
    assert state(model)["modes"] == modes
    prune_(model, graph, random_units(graph))
    assert state(model)["modes"] == modes


def test_peer_23_two_graphs_share_no_state():
    first, second = trace(backbone(), X), trace(backbone(), X)
    first.pinned[10_000] = "mine"
    first.notes.append("mine")
    first.unsupported["mine"] = []
    first.layers["mine"] = independent_units(first)
    assert 10_000 not in second.pinned
    assert "mine" not in {**second.layers, **second.unsupported}
    assert second.notes == []
    assert trace(backbone(), X).notes == []


def test_peer_23_a_graph_pruned_twice_is_refused_not_applied_to_the_wrong_channels():
    model = backbone()
    graph = trace(model, X)
    remove = random_units(graph)
    dense = copy.deepcopy(model)
    prune_(model, graph, remove)
    with pytest.raises(SurgeryError, match="trace the model again"):
        prune_(model, graph, remove)
    assert error(with_dead_filters(dense, graph, remove), model, X) < 1e-5
