"""Tests that the ``Trainer`` of Transformers prunes to half, saves and resumes with the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_prune.criteria import TaylorWeight
from tests.support.foreign_networks import EPOCHS, Classifier, check_pruned, pruner_of, same, samples

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")  # which the Trainer needs

from lightning_prune.integrations import PrunerCallback  # noqa: E402


class Dataset(torch.utils.data.Dataset[Any]):
    def __init__(self) -> None:
        self.images, self.labels = samples().tensors

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"pixels": self.images[index], "labels": self.labels[index]}


class Losses(transformers.TrainerCallback):  # type: ignore[misc]
    def __init__(self) -> None:
        self.values: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        self.values += [logs["loss"]] if "loss" in logs else []


def trainer_of(
    folder: Path, net: Classifier, callback: PrunerCallback, **arguments: Any
) -> tuple[Any, Losses]:
    losses = Losses()
    settings = transformers.TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        save_strategy="epoch",
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **arguments,
    )
    return transformers.Trainer(net, settings, train_dataset=Dataset(), callbacks=[callback, losses]), losses


@pytest.mark.parametrize(
    ("pruning", "arguments", "checkpoint"),
    [
        ({}, {}, 12),
        ({"criterion": TaylorWeight(), "every_n_steps": 6}, {}, 12),
        ({}, {"gradient_accumulation_steps": 2}, 6),
    ],
    ids=["epochs", "steps", "accumulation"],
)
def test_a_trainer_prunes_to_half_and_resumes_with_the_same_bits(
    tmp_path: Path, pruning: dict[str, Any], arguments: dict[str, Any], checkpoint: int
) -> None:
    net = Classifier()
    pruner = pruner_of(net, **pruning)
    trainer, losses = trainer_of(tmp_path, net, PrunerCallback(pruner), **arguments)
    trainer.train()

    again = Classifier()
    callback = PrunerCallback(pruner_of(again, **pruning))
    resumed, rest = trainer_of(tmp_path, again, callback, **arguments)
    folder = callback.resume(tmp_path / f"checkpoint-{checkpoint}")
    cuts = len(callback.pruner.history)
    resumed.train(resume_from_checkpoint=folder)
    check_pruned(again, callback.pruner, cuts)
    assert rest.values == losses.values[-len(rest.values) :]
    assert len(rest.values) == len(losses.values) / 2
    assert same(again, net)
    assert pruner.record is not None
    assert callback.pruner.record is not None
    assert callback.pruner.record.to_dict() == pruner.record.to_dict()


def test_another_model_than_that_of_the_pruner_is_refused(tmp_path: Path) -> None:
    net = Classifier()
    trainer, _ = trainer_of(tmp_path, net, PrunerCallback(pruner_of(Classifier())))
    with pytest.raises(ValueError, match="trains another Classifier than the Pruner was given"):
        trainer.train()


def test_a_folder_without_a_state_is_refused(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-3").mkdir()
    callback = PrunerCallback(pruner_of(Classifier()))
    for folder in (tmp_path, tmp_path / "checkpoint-3"):
        with pytest.raises(ValueError, match=r"checkpoint-3 has no pruner\.pt"):
            callback.resume(folder)
    trainer, _ = trainer_of(tmp_path, Classifier(), callback)
    assert PrunerCallback.of(trainer) is callback
    trainer.remove_callback(callback)
    with pytest.raises(ValueError, match="has no PrunerCallback"):
        PrunerCallback.of(trainer)
