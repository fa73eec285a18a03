"""What a trace must do on a GPU, as far as it shows without one."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lightning_prune import L2, one_shot, prune_, trace
from lightning_prune.tracing import isolation, modes
from lightning_prune.tracing.isolation import restored
from lightning_prune.tracing.recorder import record_forward


class Branching(nn.Module):
    """Has attention, and a branch on a value, so that it is traced on real tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 24)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.outer = nn.Linear(24, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.attention(x, x, x, need_weights=False)[0]
        x = torch.relu(self.inner(x))
        return self.outer(x if float(x.detach().sum()) < 1e9 else 2 * x)


def test_generators_of_gpus_are_seeded_and_restored(monkeypatch: pytest.MonkeyPatch):
    gpu = torch.Generator().manual_seed(5)
    monkeypatch.setattr(isolation, "torch_generators", lambda: [torch.default_generator, gpu])
    expected = torch.rand(3, generator=copy.copy(gpu).manual_seed(5))
    first = torch.rand(3, generator=torch.Generator().manual_seed(0))
    with restored(nn.Identity()):
        assert torch.equal(torch.rand(3, generator=gpu), first)
    assert torch.equal(torch.rand(3, generator=gpu), expected)


def test_a_recording_on_values_draws_the_same_numbers_on_a_gpu_however_many_were_drawn_before(
    monkeypatch: pytest.MonkeyPatch,
):
    gpu = torch.Generator()
    monkeypatch.setattr(modes, "torch_generators", lambda: [torch.default_generator, gpu])
    drawn = []

    class Dropping(nn.Module):
        """Draws ``size`` numbers by a dropout, and then some on the GPU."""

        def __init__(self, size: int) -> None:
            super().__init__()
            self.size = size

        def forward(self, x: Tensor) -> Tensor:
            torch.rand(self.size, generator=gpu)
            x = nn.functional.dropout(x, 0.5, True)
            drawn.append(torch.rand(2, generator=gpu).tolist())
            return x if float(x.sum()) < 1e9 else -x

    for size in (3, 7):
        assert record_forward(Dropping(size), (torch.ones(2, 4),), {}, training=True).real
    assert drawn[-1] == drawn[-3 if len(drawn) > 3 else 0]


@pytest.fixture
def _process_group(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("_process_group")
def test_synchronised_norms_are_traced_as_plain_ones_in_a_distributed_run():
    plain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 1))
    net = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(plain))
    x = torch.rand(2, 3, 8, 8)
    graph, expected = trace(net, x), trace(plain, x)
    assert not graph.notes
    assert graph.bindings.keys() == expected.bindings.keys()
    assert graph.prunable.tolist() == expected.prunable.tolist()
    prune_(net, graph, graph.layers["0.weight"][:5])
    assert (net[1].weight.shape, net[1].running_mean.shape) == ((3,), (3,))
    assert "forward" not in vars(net[1])
    with pytest.raises(ValueError, match="on GPU"):  # the norm itself is as it was
        net.train()(x)


def test_cudnn_is_off_within_a_trace_only():
    class Seeing(nn.Linear):
        seen: list[bool] = []

        def forward(self, x: Tensor) -> Tensor:
            self.seen.append(torch.backends.cudnn.enabled)
            return super().forward(x)

    before = torch.backends.cudnn.enabled
    trace(nn.Sequential(Seeing(3, 8), nn.Linear(8, 2)), torch.zeros(2, 3))
    assert set(Seeing.seen) == {False}
    assert torch.backends.cudnn.enabled == before


def test_fused_attention_on_values_is_one_operator_on_a_gpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(modes.OperatorMode, "runs_attention", lambda self, query, *args, **kwargs: True)
    x = torch.rand(2, 5, 8)
    recording = record_forward(Branching(), (x,), {}, training=False)
    names = [call.op._opname for call in recording.calls]
    assert recording.real
    assert names.count("scaled_dot_product_attention") == 1
    assert not any("flash" in name or "softmax" in name for name in names)
    net = Branching()
    one_shot(net, x, {"macs": 0.7}, L2())
    assert net.inner.out_features < 24
    assert net(x).shape == (2, 5, 2)
