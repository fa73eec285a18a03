"""Tests of NetAdaptCallback in a Trainer: held-out data, optimizer, checkpoints, and continued training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, Subset, TensorDataset

from lightning_prune import FilterPruningCallback, load_pruned, trace
from lightning_prune.callbacks.held_out_data import check_disjoint
from lightning_prune.callbacks.methods.netadapt import NetAdapt
from lightning_prune.callbacks.netadapt import NetAdaptCallback
from lightning_prune.criteria import TaylorWeight
from lightning_prune.data.base import Augmented
from lightning_prune.netadapt.rounds import Rounds
from lightning_prune.netadapt.workers import Workers
from lightning_prune.selection.limits import Limits
from tests.callbacks.test_pruning import Tupled, data, trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*GPU available but not used.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
    pytest.mark.filterwarnings("ignore:.*exists and is not empty.*:UserWarning"),
]
THREE = Rounds(rounds=3, steps=2, decay=1.0)
EXAMPLE = torch.zeros(1, 1, 12, 12)


class Judged(Tupled):
    """Logs the metric that ranks candidates; stores which samples it was trained on."""

    def __init__(self) -> None:
        super().__init__(example=True)
        self.trained_on: set[int] = set()

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        self.trained_on.update(int(1e6 * image.sum()) for image in batch[0])
        return super().training_step(batch, index)

    def validation_step(self, batch: Any, index: int) -> None:
        loss = torch.nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("val/loss", loss, batch_size=len(batch[0]))


def rounds(folder: Path, **kwargs: Any) -> NetAdaptCallback:
    """Return a callback with three rounds that stores its search in ``folder``."""
    defaults = {
        "rounds": THREE,
        "limits": Limits(0.9),
        "submodule": "net",
        "verbose": False,
        "folder": folder,
    }
    return NetAdaptCallback({"macs": 0.5}, **{**defaults, **kwargs})


def same(a: L.LightningModule, b: L.LightningModule) -> bool:
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(one, other) for one, other in pairs)


def half(module: Judged) -> bool:
    """Whether the network is within half of the MACs."""
    return trace(module.net, EXAMPLE).cost("macs") <= 0.5 * trace(Judged().net, EXAMPLE).cost("macs")


def fit(
    callback: L.Callback,
    *more: L.Callback,
    epochs: int = 4,
    loader: Any = None,
    path: Any = None,
    **kwargs: Any,
):
    torch.manual_seed(0)
    module = Judged()
    lightning_trainer = trainer(callback, *more, epochs=epochs, **kwargs)
    lightning_trainer.fit(module, loader or data(), ckpt_path=path)
    return module, lightning_trainer


def test_training_continues_with_the_winner_within_the_budget(tmp_path):
    callback = rounds(tmp_path)
    module, lightning_trainer = fit(callback)
    assert half(module)
    assert [cut.epoch for cut in callback.history] == [1]
    assert len(callback.rounds_done) == 3
    assert callback.steps == sum(2 * len(each.metrics) for each in callback.rounds_done)
    # 51 samples are left of 64: 4 batches, in 4 epochs; the winners' steps count in the optimizer's state
    assert {float(s["step"]) for s in lightning_trainer.optimizers[0].state.values()} == {4.0 * 4 + 2 * 3}
    assert module.losses[-1] < module.losses[0]


def test_held_out_samples_are_never_trained_on(tmp_path):
    callback = rounds(tmp_path, held_out=0.25)
    module, _ = fit(callback)
    held_out = {int(1e6 * image.sum()) for batch in callback.method._source.held_out for image in batch[0]}
    assert len(held_out) == 16
    assert len(module.trained_on) == 48
    assert held_out.isdisjoint(module.trained_on)


def test_the_data_that_candidates_are_judged_on_is_printed(tmp_path, capsys):
    fit(rounds(tmp_path, verbose=True), epochs=2)
    assert "candidates are judged on 13 training samples that are held out (20%)" in capsys.readouterr().out


@pytest.mark.parametrize("optimizer", ["carry", "reset"])
def test_checkpoints_before_and_after_the_rounds_resume_to_the_same_bits(tmp_path, optimizer):
    uninterrupted, _ = fit(rounds(tmp_path / "a", optimizer=optimizer), epochs=4)
    keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    fit(rounds(tmp_path / "b", optimizer=optimizer), keep, epochs=4, enable_checkpointing=True)
    for epoch in (0, 1):
        callback = rounds(tmp_path / f"c{epoch}", optimizer=optimizer)
        resumed, _ = fit(callback, path=tmp_path / f"epoch={epoch}.ckpt")
        assert same(uninterrupted, resumed)
        assert [each.number for each in callback.rounds_done] == [1, 2, 3]
    pruned = load_pruned(Judged(), tmp_path / "epoch=3.ckpt")
    assert trace(pruned.net, EXAMPLE).cost("macs") == trace(uninterrupted.net, EXAMPLE).cost("macs")


def test_resumed_training_continues_a_search_that_was_killed(tmp_path, monkeypatch):
    uninterrupted, _ = fit(rounds(tmp_path / "a"))
    keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    lines: list[str] = []

    def interrupted(self: Any, trainer: Any, line: str) -> None:
        lines.extend([line] if not line.startswith("candidates are judged") else [])
        if line.startswith("round 2") and len(lines) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(NetAdapt, "_print", interrupted)
    with pytest.raises(BaseException):  # noqa: B017, PT011 - Lightning turns it into an exit
        fit(rounds(tmp_path / "b"), keep, enable_checkpointing=True)
    resumed, _ = fit(rounds(tmp_path / "b"), path=tmp_path / "epoch=0.ckpt")
    assert lines[2].startswith("continuing after round 2")
    assert same(uninterrupted, resumed)


@pytest.mark.slow
def test_taylor_with_workers_and_a_given_loader(tmp_path):
    callback = rounds(tmp_path, criterion=TaylorWeight(), held_out=data(number=16), workers=Workers(2))
    single_process = rounds(tmp_path / "single", criterion=TaylorWeight(), held_out=data(number=16))
    (one, _), (two, _) = fit(single_process, epochs=2), fit(callback, epochs=2)
    assert same(one, two)


def test_the_whole_module_is_pruned_with_validation_data_as_held_out_data(tmp_path):
    torch.manual_seed(0)
    module, callback = Judged(), rounds(tmp_path, submodule=None, held_out="val")
    trainer(callback, epochs=2).fit(module, data(), data(number=24, shuffle=False))
    assert half(module)
    assert len(module.trained_on) == 64


def test_one_shot_is_filter_pruning_with_the_whole_amount_in_one_cut():
    callback = FilterPruningCallback({"macs": 0.5}, amount={"macs": 1.0}, start_epoch=1, verbose=False)
    module, _ = fit(callback)
    assert [cut.epoch for cut in callback.history] == [1]
    assert half(module)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rounds": Rounds(rounds=3, blocks=["nothing"])}, "block 'nothing' matches no layer"),
        ({"rounds": Rounds(rounds=1), "limits": Limits(0.5)}, "cannot be met|no block can give"),
        ({"metric": "val/miou"}, "validation logs no 'val/miou', but val/loss"),
    ],
)
def test_bad_input_is_refused(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        fit(rounds(tmp_path, **change))


@pytest.mark.parametrize("held_out", [0.0, 1.5, "test"])
def test_held_out_shares_out_of_range_are_refused(held_out):
    with pytest.raises(ValueError, match="held_out"):
        NetAdaptCallback({"macs": 0.5}, held_out=held_out)


def test_held_out_data_that_is_trained_on_is_refused(tmp_path):
    dataset = data().dataset
    train, other = DataLoader(Subset(dataset, range(48)), 16), DataLoader(Subset(dataset, range(40, 64)), 16)
    with pytest.raises(ValueError, match="holds 8 samples of the training data"):
        fit(rounds(tmp_path, held_out=other), loader=train)
    check_disjoint(train, DataLoader(Subset(dataset, range(48, 64))))


class Files:
    """Samples in files."""

    def __init__(self, *paths: str) -> None:
        self.pairs = [(Path(path), Path("mask")) for path in paths]

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> int:
        return index


def test_common_files_are_found_in_different_data_sets():
    train = DataLoader(Augmented(Files("a.png", "b.png"), None))  # type: ignore[arg-type]
    check_disjoint(train, DataLoader(Files("c.png")))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="holds 1 samples"):
        check_disjoint(train, DataLoader(Files("b.png", "c.png")))  # type: ignore[arg-type]
    tensors = torch.rand(4, 2)
    with pytest.raises(ValueError, match="holds 2 samples"):
        check_disjoint(DataLoader(TensorDataset(tensors)), DataLoader(TensorDataset(tensors[2:])))


def test_candidates_are_repaired_unless_it_is_turned_off(tmp_path):
    one = Rounds(rounds=1, steps=1)
    repaired, plain = rounds(tmp_path, rounds=one), rounds(tmp_path, rounds=one, compensate=False)
    for callback in (repaired, plain):
        fit(callback)
    before, after = repaired.rounds_done[0].change
    assert after < before
    assert plain.rounds_done[0].change is None
    with pytest.raises(ValueError, match="compensate must be True, False or CompensationSettings"):
        rounds(tmp_path, compensate="yes")
