"""Tests of networks whose branches lose all channels: records, export, training, further cuts."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor, nn

from lightning_prune import PruningRecord, RecordError, SurgeryError, load_pruned, prune_, save_pruned, trace
from lightning_prune.segmentation.networks.atom_mobile import AtomMobile
from lightning_prune.serialization.export import export, exported_record
from lightning_prune.slimming.bias_folding import Folded, MeasuredShifts
from tests.support.slimming_runs import (
    QUIET,
    Small,
    alive_branches,
    atom_mobile_net,
    fit,
    parallel_branches_net,
    plan_small_scales,
    slimming,
)

pytestmark = QUIET


def test_branches_without_channels_vanish_and_the_record_reproduces_it() -> None:
    dead = [(1, 0, 1), (2, 1, 0), (2, 1, 2)]
    net, example = atom_mobile_net(dead), torch.randn(2, 1, 32, 32)
    dense, everything = copy.deepcopy(net), alive_branches(net)
    graph, scales, plan = plan_small_scales(net, example, ["*.depthwise"])
    measured = MeasuredShifts([net], graph, scales, plan.remove, ((example,), {}))
    record = prune_(net, graph, plan)
    assert measured.fold_(plan.remove) == Folded(exact=2)
    assert measured.changes()[0] < 1e-5
    assert sorted({*everything} - {*alive_branches(net)}) == dead
    again = trace(net, example)
    assert again.cost("macs") == plan.costs["macs"].after
    more = prune_(net, again, again.layers["stages.2.1.branches.1.expand.0.weight"][:5])
    small = PruningRecord.from_dict(record.then(more).to_dict()).apply_(dense).eval()
    small.load_state_dict(net.state_dict())
    assert torch.equal(small(example), net(example))


def test_one_branch_remains_whatever_the_scales_are() -> None:
    net, example = atom_mobile_net([(1, 1, 0), (1, 1, 1), (1, 1, 2)]), torch.randn(1, 1, 32, 32)
    graph, _, plan = plan_small_scales(net, example, ["*.depthwise"])
    inside = [f"stages.1.1.branches.{branch}.expand.0.weight" for branch in range(3)]
    units = np.concatenate([graph.layers[name] for name in inside])
    with pytest.raises(
        SurgeryError, match=r"nothing would be left of 'stages\.1\.1\.project\.weight', dimension 1"
    ):
        prune_(net, graph, units)
    prune_(net, graph, plan)
    assert [where for where in alive_branches(net) if where[:2] == (1, 1)] == [(1, 1, 2)]
    assert net.stages[1][1].project.in_channels == 1


def without_branches() -> tuple[nn.Module, PruningRecord, Tensor]:
    """A network that has lost two of three branches, its record, and an input."""
    net, x = parallel_branches_net(0, 2).eval(), torch.randn(5, 1, 12, 12)
    graph, _, plan = plan_small_scales(net, x[:1])
    record = prune_(net, graph, plan)
    assert [branch[1].num_features for branch in net[0].branches] == [0, 4, 0]
    return net, record, x


@pytest.mark.parametrize("ending", ["onnx", "pt2"])
def test_the_remaining_network_is_exported_with_its_record(ending: str, tmp_path: Path) -> None:
    net, record, x = without_branches()
    path = tmp_path / f"net.{ending}"
    assert export(net, x[:1], path, record) < 1e-5
    if ending == "onnx":
        session = onnxruntime.InferenceSession(path)
        (outputs,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    else:
        outputs = torch.export.load(path).module()(x).detach().numpy()
    np.testing.assert_allclose(outputs, net(x).detach(), rtol=1e-4, atol=1e-5)
    fresh = exported_record(path).apply_(parallel_branches_net()).eval()
    assert fresh.load_state_dict(net.state_dict(), strict=True)
    assert torch.equal(fresh(x), net(x))


def test_the_remaining_network_is_compiled_in_one_graph_and_trained() -> None:
    net, _, x = without_branches()
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), net(x))
    compiled.train()(x).sum().backward()
    with_gradient = {name for name, p in net.named_parameters() if p.grad is not None}
    assert with_gradient == {name for name, p in net.named_parameters() if p.numel()}


def test_the_remaining_network_is_copied_pickled_cast_and_cut_again() -> None:
    net, _, x = without_branches()
    for other in (pickle.loads(pickle.dumps(net)), copy.deepcopy(net)):
        other.load_state_dict(net.state_dict(), strict=True)
        assert torch.equal(other(x), net(x))
    net.double().float().to(memory_format=torch.channels_last)
    torch.testing.assert_close(net(x), other(x))
    again = trace(net, x)
    prune_(net, again, again.layers["0.branches.1.0.weight"][:3])
    assert net[0].join.in_channels == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernels": (3, 4)}, r"kernels must be odd numbers, at least one, .* got \(3, 4\)"),
        ({"kernels": ()}, "kernels must be odd numbers"),
        ({"width": 0.01}, "width=0.01 leaves no channels"),
    ],
)
def test_branches_that_would_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AtomMobile(**options)


def test_a_record_must_not_empty_a_layer_outside_of_branches() -> None:
    net = atom_mobile_net([])
    record = PruningRecord({"head.weight": {1: []}}, {"head.weight": list(net.head.weight.shape)})
    with pytest.raises(RecordError, match="not ascending within"):
        record.apply_(net)


class Segmenting(Small):
    """Segmentation module that gives every pixel the class of its image."""

    def __init__(self) -> None:
        super().__init__(optimizer=lambda p: torch.optim.AdamW(p, 1e-3))
        self.net = atom_mobile_net([(2, 0, 1), (3, 1, 2)]).train()

    def training_step(self, batch: Any, index: int) -> Tensor:
        logits = self(nn.functional.interpolate(batch[0], size=(32, 32)))
        return nn.functional.cross_entropy(logits, (batch[1] % 3)[:, None, None].expand(-1, 32, 32))


def test_vanished_branches_survive_training_a_checkpoint_and_an_average(tmp_path: Path) -> None:
    module, averaging = Segmenting(), EMAWeightAveraging(decay=0.5)
    module.example_input_array = torch.zeros(1, 1, 32, 32)
    callback = slimming(rho=0.01, threshold=5e-3, shrink_at=0.01, norms=["*.depthwise"])
    trainer = fit(module, callback, averaging, epochs=2, limit_train_batches=2)
    removed = {(2, 0, 1), (3, 1, 2)}
    assert removed.isdisjoint(alive_branches(module.net))
    assert [cut.epoch for cut in callback.history] == [0]  # training continued
    empty = [p for p in module.net.parameters() if not p.numel()]
    assert len(empty) == 12
    assert not any(p.requires_grad for p in empty)
    trainer.save_checkpoint(tmp_path / "atoms.ckpt")
    fresh = load_pruned(Segmenting(), tmp_path / "atoms.ckpt")
    x = torch.randn(1, 1, 32, 32)
    assert torch.equal(fresh.eval()(x), module.eval()(x))
    save_pruned(module.net, callback.record, tmp_path / "atoms.safetensors")
    assert torch.equal(load_pruned(atom_mobile_net([]), tmp_path / "atoms.safetensors")(x), module(x))
