"""Tests that a callback continues the record of a module that was pruned before, relative to the dense network."""

from __future__ import annotations

import copy
from pathlib import Path

import lightning as L
import pytest
import torch
from torch import nn

from benchmarks.robustness.kill_run import Classifier, pruning, rounds, same, shuffled, slimming
from lightning_prune import FilterPruningCallback, PruningRecord, load_pruned, one_shot, save_pruned
from lightning_prune.serialization.carried_record import carried_record
from tests.callbacks.test_followers import MeanTeacher
from tests.callbacks.test_followers import data as teacher_images
from tests.callbacks.test_followers import pruning as prune_net
from tests.callbacks.test_resizing import outputs, pruner, silent

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*(many workers|GPU available|not met|limits may stop|LeafSpec)"),
    pytest.mark.filterwarnings("ignore:.*(in eval mode|exists and is not empty|callbacks used to create)"),
]


def run(module: L.LightningModule, callback: L.Callback, epochs: int = 4) -> L.Trainer:
    trainer = silent(callback, max_epochs=epochs)
    trainer.fit(module, *shuffled())
    return trainer


def share(trainer: L.Trainer) -> float:
    return pruner(trainer).history[-1].share["macs"]


SECOND = {"filters": lambda: pruning(budget={"macs": 0.4}), "slimming": slimming, "rounds": rounds}


@pytest.mark.parametrize("kind", list(SECOND))
def test_a_second_callback_continues_the_record_relative_to_the_dense_network(
    tmp_path: Path, kind: str
) -> None:
    module = Classifier()
    first = run(module, pruning(budget={"macs": 0.75}))
    before = pruner(first).record
    trainer = run(module, SECOND[kind](), epochs=6)
    record = pruner(trainer).record
    assert record == carried_record(module) != before
    for name, dims in before.kept.items():
        for dim, indices in dims.items():
            assert set(record.kept[name][dim]) <= set(indices)
        assert record.shapes[name] == list(Classifier().state_dict()[name].shape)
    assert pruner(trainer).within_budget
    trainer.save_checkpoint(tmp_path / "second.ckpt")
    trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    for file in ("second.ckpt", "weights.ckpt"):
        assert torch.equal(outputs(load_pruned(Classifier(), tmp_path / file)), outputs(module))


def test_shares_of_a_budget_refer_to_the_dense_network() -> None:
    module = Classifier()
    first = run(module, pruning(budget={"macs": 0.75}))
    second = run(module, pruning(budget={"macs": 0.5}))
    assert pruner(second)._dense == pruner(first)._dense
    assert 0.35 < share(second) <= 0.5
    third = run(module, pruning(budget={"macs": 0.5}))  # it is met already
    assert pruner(third).history == []
    assert pruner(third).record == pruner(second).record
    assert pruner(third).within_budget


@pytest.mark.parametrize("source", ["load_pruned", "one_shot", "deepcopy", "another module"])
def test_the_record_is_taken_over_whatever_has_pruned_the_network(tmp_path: Path, source: str) -> None:
    module = Classifier()
    record = one_shot(module, torch.zeros(1, 1, 12, 12), {"macs": 0.7})
    if source == "load_pruned":
        save_pruned(module, record, tmp_path / "small.safetensors")
        module = load_pruned(Classifier(), tmp_path / "small.safetensors")
    elif source == "deepcopy":
        module = copy.deepcopy(module)
    elif source == "another module":
        other = Classifier()
        other.net = module.net
        module = other
    trainer = run(module, pruning())
    assert len(pruner(trainer).history) > 0
    trainer.save_checkpoint(tmp_path / "net.ckpt")
    assert torch.equal(outputs(load_pruned(Classifier(), tmp_path / "net.ckpt")), outputs(module))


def test_a_module_that_is_built_from_a_pruned_network_resumes(tmp_path: Path) -> None:
    small = Classifier()
    save_pruned(
        small, one_shot(small, torch.zeros(1, 1, 12, 12), {"macs": 0.7}), tmp_path / "small.safetensors"
    )

    class Continued(Classifier):
        def __init__(self) -> None:
            super().__init__()
            load_pruned(self, tmp_path / "small.safetensors")

    trainer = run(module := Continued(), pruning())
    trainer.save_checkpoint(tmp_path / "net.ckpt")
    resumed = silent(pruning(), max_epochs=5)
    resumed.fit(again := Continued(), *shuffled(), ckpt_path=tmp_path / "net.ckpt")
    assert pruner(resumed).record == pruner(trainer).record
    assert str(again) == str(module)
    for fresh in (Classifier(), Continued()):
        assert torch.equal(outputs(load_pruned(fresh, tmp_path / "net.ckpt")), outputs(module))


def test_another_part_of_a_pruned_module_is_refused_before_training(tmp_path: Path) -> None:
    class Two(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.front = nn.Sequential(nn.Conv2d(1, 8, 1), nn.ReLU(), nn.Conv2d(8, 1, 1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(self.front(x))

    module = Two()
    run(module, pruning(submodule="net", budget={"macs": 0.75}))
    with pytest.raises(ValueError, match=r"'net' was pruned before.*set submodule='net'"):
        run(module, pruning(submodule="front"))
    trainer = run(module, pruning(budget={"macs": 0.5}))  # the whole module contains what was pruned
    trainer.save_checkpoint(tmp_path / "whole.ckpt")
    assert torch.equal(outputs(load_pruned(Two(), tmp_path / "whole.ckpt")), outputs(module))


def test_copies_that_were_cut_along_are_followed_again(tmp_path: Path) -> None:
    def train(callback: FilterPruningCallback) -> L.Trainer:
        trainer = silent(callback, max_epochs=4)
        trainer.fit(module, teacher_images())
        return trainer

    module = MeanTeacher()
    train(prune_net(followers=["teacher"], amount={"macs": 0.1}))
    with pytest.raises(ValueError, match="'teacher' was cut along before"):
        train(prune_net(followers=[]))
    callback = FilterPruningCallback({"macs": 0.3}, submodule="net", verbose=False)
    train(callback).save_checkpoint(tmp_path / "net.ckpt")
    assert callback.copies == {"teacher": "net"}
    loaded = load_pruned(MeanTeacher(), tmp_path / "net.ckpt")
    assert same(dict(loaded.state_dict()), dict(module.state_dict()))


def test_the_callback_of_a_run_is_refused_on_a_network_with_other_cuts() -> None:
    callback = pruning()
    run(module := Classifier(), callback)
    record = callback.record
    others = {  # as many, but the mirrored ones
        name: {
            dim: [record.shapes[name][dim] - 1 - index for index in reversed(indices)]
            for dim, indices in dims.items()
        }
        for name, dims in record.kept.items()
    }
    other = PruningRecord(others, record.shapes, record.attributes).apply_(Classifier())
    assert str(other) == str(module)
    assert carried_record(other) != carried_record(module)
    with pytest.raises(ValueError, match="has pruned a network of other sizes"):
        run(other, callback)


def test_a_callback_takes_over_the_record_without_training(tmp_path: Path) -> None:
    run(module := Classifier(), pruning())
    trainer = silent(callback := pruning())
    trainer.validate(module, shuffled()[1], verbose=False)
    assert callback.record == carried_record(module)
    trainer.save_checkpoint(tmp_path / "net.ckpt")
    assert torch.equal(outputs(load_pruned(Classifier(), tmp_path / "net.ckpt")), outputs(module))
