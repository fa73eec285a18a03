"""Tests that a live module takes on the size of any checkpoint, and that errors say what to do where it cannot."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from benchmarks.robustness.kill_run import PRUNINGS, Classifier, fit, pruning, same, shuffled
from lightning_prune import RecordError, load_pruned
from lightning_prune.callbacks.method_callback import PruningCallback
from tests.callbacks.test_followers import MeanTeacher
from tests.callbacks.test_followers import data as teacher_images
from tests.callbacks.test_followers import pruning as prune_net

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*(many workers|GPU available|not met|limits may stop|LeafSpec)"),
    pytest.mark.filterwarnings(
        "ignore:.*(resuming from a checkpoint|callbacks used to create|state cannot be|in eval mode)"
    ),
    pytest.mark.filterwarnings("ignore:.*(not created with WeightAveraging|exists and is not empty)"),
]
IMAGES = torch.randn(3, 1, 12, 12, generator=torch.Generator().manual_seed(5))


def outputs(module: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return module.eval()(IMAGES)


def silent(*callbacks: Callback, **options: Any) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu",
        logger=False,
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(each, Checkpoint) for each in callbacks),
        **options,
    )


def trained(folder: Path, kind: str = "filters", epochs: int = 5) -> tuple[L.Trainer, Classifier, list[Path]]:
    """Train and prune; return the checkpoints of all epochs in their order."""
    keep = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    trainer = silent(*PRUNINGS[kind](), keep, max_epochs=epochs)
    module = Classifier()
    trainer.fit(module, *shuffled())
    return trainer, module, [folder / f"epoch={epoch}.ckpt" for epoch in range(epochs)]


def pruner(trainer: L.Trainer) -> PruningCallback:
    return next(callback for callback in trainer.callbacks if isinstance(callback, PruningCallback))


@pytest.mark.parametrize("kind", list(PRUNINGS))
def test_a_trained_module_takes_on_the_size_of_every_checkpoint(tmp_path: Path, kind: str) -> None:
    trainer, module, files = trained(tmp_path, kind)
    assert pruner(trainer).record is not None
    widths = set()
    for path in [files[0], files[-1], files[2], files[1], files[0], files[3], files[-1]]:
        trainer.validate(module, shuffled()[1], ckpt_path=path, verbose=False)
        expected = load_pruned(Classifier(), path)
        saved = torch.load(path, weights_only=True)
        if kind != "averaged":  # there Lightning loads the weights beside the average
            assert torch.equal(outputs(module), outputs(expected))
        assert str(module) == str(expected)
        record = pruner(trainer).record
        assert (record.to_dict() if record else None) == saved["lightning_prune"]["record"]
        assert len(pruner(trainer).history) == len(
            saved["callbacks"][type(pruner(trainer)).__name__]["history"]
        )
        widths.add(str(module))
    assert len(widths) > 1


def test_training_continues_as_without_a_test_in_between(tmp_path: Path) -> None:
    def end(name: str, tests: bool) -> dict[str, Any]:
        keep = ModelCheckpoint(tmp_path / name, filename="{epoch}", save_top_k=-1)
        callbacks, module = [pruning(amount={"macs": 0.15}), keep], Classifier()
        fit(module, shuffled(), callbacks, None, max_epochs=3)
        if tests:
            trainer = silent(*callbacks)
            trainer.validate(module, shuffled()[1], ckpt_path=tmp_path / name / "epoch=0.ckpt", verbose=False)
            assert module.net[0].out_channels == 12
        module = module if tests else Classifier()
        again, path = [pruning(amount={"macs": 0.15})], tmp_path / name / "epoch=2.ckpt"
        return fit(module, shuffled(), again, path, max_epochs=6)

    plain, tested = end("plain", False), end("tested", True)
    assert len(plain["cuts"]) > 2
    assert same(plain, tested)


def test_a_checkpoint_after_a_test_has_the_record_of_its_weights(tmp_path: Path) -> None:
    trainer, module, files = trained(tmp_path)
    trainer.validate(module, shuffled()[1], ckpt_path=files[1], verbose=False)
    trainer.save_checkpoint(tmp_path / "again.ckpt")
    trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    for name in ("again.ckpt", "weights.ckpt"):
        assert torch.equal(outputs(load_pruned(Classifier(), tmp_path / name)), outputs(module))
    resumed = silent(pruning(), max_epochs=7)
    resumed.fit(Classifier(), *shuffled(), ckpt_path=tmp_path / "again.ckpt")
    assert [cut.epoch for cut in pruner(resumed).history] == [1, 5, 6]


def test_weights_alone_of_another_size_are_loaded_and_the_state_of_the_old_size_is_forgotten(
    tmp_path: Path,
) -> None:
    keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_weights_only=True)
    trainer, module = silent(*PRUNINGS["slimming"](), keep, max_epochs=5), Classifier()
    trainer.fit(module, *shuffled())
    assert pruner(trainer).within_budget
    trainer.validate(module, shuffled()[1], ckpt_path=tmp_path / "epoch=0.ckpt", verbose=False)
    assert torch.equal(outputs(module), outputs(load_pruned(Classifier(), tmp_path / "epoch=0.ckpt")))
    assert pruner(trainer).history == []
    assert pruner(trainer).record is None
    assert not pruner(trainer).within_budget
    again = silent(*PRUNINGS["slimming"](), max_epochs=6)
    again.fit(module, *shuffled())
    assert pruner(again).within_budget


def test_a_refused_checkpoint_leaves_the_module_as_it_was(tmp_path: Path) -> None:
    trainer, module, files = trained(tmp_path)
    checkpoint = torch.load(files[0], weights_only=True)
    checkpoint["state_dict"]["net.3.weight"] = torch.zeros(7, 7, 3, 3)
    torch.save(checkpoint, tmp_path / "other.ckpt")
    before, text, record = copy.deepcopy(module.state_dict()), str(module), pruner(trainer).record
    with pytest.raises(RecordError, match=r"\[7, 7, 3, 3\] for 'net.3.weight'"):
        trainer.validate(module, shuffled()[1], ckpt_path=tmp_path / "other.ckpt", verbose=False)
    assert same(dict(before), dict(module.state_dict()))
    assert str(module) == text
    assert pruner(trainer).record == record
    trainer.validate(module, shuffled()[1], ckpt_path=files[0], verbose=False)


def test_copies_take_on_the_size_of_a_checkpoint_as_well(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    trainer, module = silent(prune_net(followers=["teacher"]), keep, max_epochs=4), MeanTeacher()
    trainer.fit(module, teacher_images())
    narrow = module.teacher[0].out_channels
    for epoch in (0, 3):
        trainer.predict(
            module, DataLoader(torch.rand(2, 3, 8, 8)), ckpt_path=tmp_path / f"epoch={epoch}.ckpt"
        )
        expected = load_pruned(MeanTeacher(), tmp_path / f"epoch={epoch}.ckpt")
        assert str(module) == str(expected)
        assert same(dict(module.state_dict()), dict(expected.state_dict()))
    assert narrow == module.teacher[0].out_channels < 12


def test_buffers_that_no_file_holds_get_their_dense_values_back(tmp_path: Path) -> None:
    class Scaled(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scale", torch.arange(12.0).reshape(1, 12, 1, 1), persistent=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net[1:](self.net[0](x) * self.scale)

    keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    trainer, module = silent(pruning(), keep, max_epochs=4), Scaled()
    trainer.fit(module, *shuffled())
    assert len(module.scale.flatten()) < 12
    trainer.validate(module, shuffled()[1], ckpt_path=tmp_path / "epoch=0.ckpt", verbose=False)
    assert module.scale.flatten().tolist() == list(range(12))
    assert torch.equal(outputs(module), outputs(load_pruned(Scaled(), tmp_path / "epoch=0.ckpt")))


def test_a_module_can_be_copied_and_pickled_during_training(tmp_path: Path) -> None:
    copies: list[Classifier] = []

    class Copy(Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            copies.append(copy.deepcopy(pl_module))
            copies.append(pickle.loads(pickle.dumps(pl_module)))

    trainer = silent(pruning(), Copy(), max_epochs=3)
    module = Classifier()
    trainer.fit(module, *shuffled())
    for clone in copies[-2:]:
        assert same(dict(clone.state_dict()), dict(module.state_dict()))
        width = module.net[0].out_channels
        clone.on_load_checkpoint({"state_dict": {}})
        assert module.net[0].out_channels == width


def advice(call: Any) -> None:
    with pytest.raises(
        RuntimeError, match=r"load_pruned\(module, path\).*docs/guides/checkpoints.md"
    ) as caught:
        call()
    assert "size mismatch for net.0.weight" in str(caught.value)


def test_errors_name_load_pruned_where_lightning_calls_no_callback(tmp_path: Path) -> None:
    trainer, module, files = trained(tmp_path)
    trainer.save_checkpoint(tmp_path / "small.ckpt")
    advice(lambda: Classifier.load_from_checkpoint(tmp_path / "small.ckpt", weights_only=True))
    advice(lambda: silent().validate(Classifier(), shuffled()[1], ckpt_path=tmp_path / "small.ckpt"))
    advice(lambda: silent().validate(module, shuffled()[1], ckpt_path=files[0]))
    advice(lambda: Classifier().load_state_dict(module.state_dict()))
    advice(lambda: module.load_state_dict(Classifier().state_dict()))
    for loaded in (load_pruned(module, files[0]), load_pruned(module, tmp_path / "small.ckpt")):
        assert loaded is module
    assert torch.equal(outputs(module), outputs(load_pruned(Classifier(), tmp_path / "small.ckpt")))


def test_other_load_errors_stay_as_they_are() -> None:
    with pytest.raises(RuntimeError) as caught:
        nn.Linear(2, 2).load_state_dict(nn.Linear(2, 3).state_dict())
    assert "load_pruned" not in str(caught.value)
    with pytest.raises(RuntimeError) as caught:
        nn.Linear(2, 2).load_state_dict({})
    assert "load_pruned" not in str(caught.value)
