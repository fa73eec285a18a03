"""Tests that cuts are repaired within training: outputs, logged values, images, and what is refused."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from benchmarks.robustness.kill_run import Classifier, Stripes, same, shuffled
from lightning_prune import FilterPruningCallback, PruningRecord, SlimmingCallback
from lightning_prune.compensation import CompensationSettings, cut_and_compensate_
from lightning_prune.criteria import L2
from lightning_prune.pruning import cut_repair
from lightning_prune.trainer.calibration import calibration_batches
from lightning_prune.utils.seeding import random_state, set_random_state

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*(many workers|GPU available|not met|exists and is not empty)"),
    pytest.mark.filterwarnings("ignore:.*(LeafSpec|logging interval|but have no)"),
]


class Unscheduled(Classifier):
    """Needs no validation."""

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), 1e-2)


class AroundCut(L.Callback):
    """Keeps copies of the network from before and after the cuts; the pruning callback comes between the two."""

    def __init__(self) -> None:
        self.networks: list[nn.Module] = []

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.networks.append(copy.deepcopy(pl_module.net).eval())


def pruning(**options: Any) -> FilterPruningCallback:
    given = {
        "amount": {"macs": 0.5},
        "criterion": L2(),
        "submodule": "net",
        "verbose": False,
        "start_epoch": 2,
        "recalibrate_batches": 0,
    }
    return FilterPruningCallback({"macs": 0.5}, **{**given, **options})


def seed() -> None:
    """Seed all generators that the images are drawn from."""
    set_random_state(START)


START = random_state()


def fit(module: L.LightningModule, *callbacks: L.Callback, data: Any = None, **options: Any) -> L.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    settings = {"max_epochs": 4, "accelerator": "cpu", "enable_model_summary": False, **quiet, **options}
    trainer = L.Trainer(callbacks=list(callbacks), **settings)
    trainer.fit(module, *(shuffled() if data is None else data))
    return trainer


def around_cut(**options: Any) -> tuple[nn.Module, nn.Module, FilterPruningCallback]:
    """Train; return the network right before and right after the cut, and the callback."""
    seed()
    before, callback, after = AroundCut(), pruning(**options), AroundCut()
    fit(Classifier(), before, callback, after)
    return before.networks[2], after.networks[2], callback


def held_out() -> Tensor:
    torch.manual_seed(9)
    data = Stripes()
    return torch.stack([data[index][0] for index in range(20) for _ in range(4)])


@torch.no_grad()
def distance(dense: nn.Module, small: nn.Module) -> float:
    """Squared distance of the outputs on images of no training batch, as a share of their variance."""
    before, after = dense(held_out()), small(held_out())
    return float((after - before).square().sum() / (before - before.mean()).square().sum())


class WithoutAutocast(Unscheduled):
    """Counts forwards in eval mode; under autocast their outputs are not finite, as after an overflow."""

    evaluations = 0

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return super().forward(x)
        self.evaluations += 1
        return super().forward(x) / (0 if torch.is_autocast_enabled("cpu") else 1)


def test_a_repair_under_mixed_precision_runs_in_the_precision_of_the_weights() -> None:
    seed()
    module, cut = WithoutAutocast(), pruning(submodule=None)
    fit(module, cut, precision="bf16-mixed", limit_val_batches=0)
    change = cut.history[-1].change
    assert module.evaluations
    assert change is not None
    assert change < 1


def test_outputs_are_nearer_to_those_before_the_cut() -> None:
    distances = {}
    for compensate in (False, True):
        before, after, callback = around_cut(compensate=compensate)
        assert after[0].out_channels + after[3].out_channels < 28
        distances[compensate] = distance(before, after)
    assert distances[True] < 0.3 * distances[False]
    (cut,) = callback.history
    assert cut.change == pytest.approx(distances[True], rel=2)
    assert cut.change_unrepaired == pytest.approx(distances[False], rel=1)


def test_the_repair_is_that_of_a_cut_outside_of_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights and logged changes equal those of cut_and_compensate_ with the same images."""
    calls: list[Any] = []
    own = cut_repair.CutRepair.prune_

    def watched(repair: Any, model: Any, graph: Any, remove: Any, optimizers: Any) -> PruningRecord:
        network = copy.deepcopy(model)
        calls.append(
            (
                network,
                FilterPruningCallback({"macs": 0.5}).policy.trace(network, example),
                remove,
                repair.batches,
            )
        )
        return own(repair, model, graph, remove, optimizers)

    example = ((torch.zeros(1, 1, 12, 12),), {})
    monkeypatch.setattr(cut_repair.CutRepair, "prune_", watched)
    _, after, callback = around_cut()
    ((network, graph, remove, batches),) = calls
    _, report = cut_and_compensate_(
        network, graph, remove, batches, settings=CompensationSettings(refit=False)
    )
    assert same(network.state_dict(), after.state_dict())
    assert sum(len(batch[0]) for batch in batches) == 20  # one pass over the data
    (cut,) = callback.history
    assert (cut.change_unrepaired, cut.change) == (report.change_before, report.change_after)
    assert report.accepted


@pytest.mark.parametrize("by", ["epochs", "steps"])
def test_changes_are_logged_for_each_cut(by: str, tmp_path: Path) -> None:
    moments = {"every_n_steps": 6, "start_step": 6} if by == "steps" else {"start_epoch": 1}
    callback = pruning(amount={"macs": 0.25}, **moments)
    fit(Classifier(), callback, logger=CSVLogger(tmp_path, "", ""))
    rows = [line.split(",") for line in (tmp_path / "metrics.csv").read_text().splitlines()]
    columns = [rows[0].index(name) for name in ("prune/change_unrepaired", "prune/change")]
    logged = [tuple(float(row[column]) for column in columns) for row in rows[1:] if row[columns[0]]]
    expected = [(cut.change_unrepaired, cut.change) for cut in callback.history]
    assert len(expected) > 1
    assert list(dict.fromkeys(logged)) == [pytest.approx(values, rel=1e-5) for values in expected]


def test_the_printed_line_tells_what_was_repaired(capsys: pytest.CaptureFixture[str]) -> None:
    _, _, callback = around_cut(verbose=True)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch")]
    (cut,) = callback.history
    assert f" · repaired {cut.change_unrepaired:.2g} → {cut.change:.2g} · " in line


def test_a_frozen_layer_is_left_alone_and_named() -> None:
    module = Classifier()
    module.net[9].requires_grad_(False)
    callback = pruning()
    fit(module, callback)
    assert callback.history[0].left_alone == {"9": "frozen"}
    assert "(left alone: 1)" in str(callback.history[0])


@pytest.mark.parametrize("compensate", [False, True])
def test_a_cut_of_slimming_is_nearer_than_folding_alone_would_leave_it(compensate: bool) -> None:
    seed()
    callback = SlimmingCallback(
        {"macs": 0.5},
        submodule="net",
        end_epoch=2,
        verbose=False,
        compensate=compensate,
        recalibrate_batches=0,
    )
    before, after = AroundCut(), AroundCut()
    trainer = fit(Classifier(), before, callback, after)
    folded, change = callback.changes[0], distance(before.networks[2], after.networks[2])
    assert (change < 0.3 * folded**2) == compensate
    assert trainer.callback_metrics["prune/change"] == pytest.approx(change, rel=2)


# -- images ----------------------------------------------------------------------------------------------------


class Draw(L.Callback):
    """Draws images within an epoch, or at its end, and keeps them."""

    def __init__(self, number: int = 8, steps: bool = True) -> None:
        self.number, self.steps, self.images, self.states = number, steps, [], []

    def draw(self, trainer: L.Trainer, pl_module: Any, seed: int) -> None:
        before = random_state()
        batches = calibration_batches(trainer, pl_module.net, self.number, seed)
        assert same(random_state(), before)
        self.images.append(torch.cat([batch[0] for batch in batches]))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        if self.steps:
            self.draw(trainer, pl_module, trainer.global_step % 2)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.draw(trainer, pl_module, trainer.global_step % 2)


LOADERS = {
    "shuffled": shuffled,
    "own generator": lambda: shuffled(generator=torch.Generator().manual_seed(1)),
    "persistent workers": lambda: shuffled(num_workers=1, persistent_workers=True),
}


@pytest.mark.parametrize("name", LOADERS)
def test_images_depend_on_their_seed_only_and_training_is_not_disturbed(name: str) -> None:
    ends = []
    for draw in (None, Draw()):
        seed()
        module = Classifier()
        fit(module, *([draw] if draw else []), data=LOADERS[name](), max_epochs=2)
        ends.append(module.state_dict())
    assert same(*ends)
    assert draw is not None
    assert all(len(images) == 8 for images in draw.images)
    odd, even = draw.images[0], draw.images[1]
    assert not torch.equal(odd, even)
    numbers = [1, 2, 3, 4, 5, 5, 6, 7, 8, 9, 10, 10]
    assert [
        torch.equal(images, odd if number % 2 else even)
        for number, images in zip(numbers, draw.images, strict=True)
    ] == [True] * 12


class Dense(Unscheduled):
    """Classifies each position."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 4, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).mean((2, 3))


@pytest.mark.parametrize(
    ("kind", "compensate", "number"),
    [(Unscheduled, True, 256), (Dense, True, 32), (Dense, CompensationSettings(images=10), 10)],
)
def test_the_number_of_images_follows_from_the_outputs(
    kind: type[Classifier], compensate: Any, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    own = cut_repair.CutRepair.repair_

    def watched(repair: Any) -> Any:
        seen.append(sum(len(batch[0]) for batch in repair.batches))
        return own(repair)

    monkeypatch.setattr(cut_repair.CutRepair, "repair_", watched)
    data = DataLoader([(torch.randn(1, 12, 12), 0)] * 300, 25)
    fit(kind(), pruning(compensate=compensate), data=(data,), max_epochs=3)
    assert seen == [number]


# -- what cannot be repaired -----------------------------------------------------------------------------------


class Prepared(Unscheduled):
    """Prepares its input in the training step, so that the forward cannot run on batches."""

    def __init__(self) -> None:
        super().__init__()
        self.example_input_array = torch.zeros(1, 1, 12, 12)

    def training_step(self, batch: Any, index: int) -> Tensor:
        return super().training_step((batch[0][:, :, 0], batch[1]), index)


class Stacked(Stripes):
    def __getitem__(self, index: int) -> Any:
        image, label = super().__getitem__(index)
        return torch.stack([image, image], 1), label


class Once(IterableDataset):
    """Is its own iterator: whoever draws from it takes a sample from the training."""

    def __init__(self) -> None:
        self.position = 0

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        self.position += 1
        if self.position % 21 == 0:
            raise StopIteration
        return Stripes()[self.position]


class Infinite(Stripes):
    """Images that the module clips; the forward alone would not."""

    def __getitem__(self, index: int) -> Any:
        image, label = super().__getitem__(index)
        return image * torch.inf, label


class Clipping(Unscheduled):
    def training_step(self, batch: Any, index: int) -> Tensor:
        return super().training_step((batch[0].nan_to_num().clamp(-1, 1), batch[1]), index)


@pytest.mark.parametrize(
    ("module", "train", "reason"),
    [
        (Prepared, lambda: DataLoader(Stacked(), 4), "the network cannot run on the images"),
        (Unscheduled, lambda: DataLoader(Once(), 4), "Once can be read only once"),
        (Clipping, lambda: DataLoader(Infinite(), 4), "not finite"),
    ],
)
def test_data_that_cannot_be_used_give_one_warning_and_pruning_goes_on(
    module: type[Classifier], train: Any, reason: str
) -> None:
    ends = []
    for compensate in (True, False):
        seed()
        network, callback = module(), pruning(amount={"macs": 0.25}, start_epoch=1, compensate=compensate)
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            fit(network, callback, data=(train(),))
        messages = [str(each.message) for each in warned if "cuts are not repaired" in str(each.message)]
        assert len(messages) == compensate
        assert all(reason in each and "compensate=False" in each for each in messages)
        assert len(callback.history) > 1
        assert all((reason in str(cut)) == compensate for cut in callback.history)
        ends.append(network.state_dict())
    assert same(*ends)


class NormsAroundCut(L.Callback):
    """Keeps the state of the first norm before and after the cut."""

    def on_before_cut(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.before = self.state(pl_module)

    def on_after_cut(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.after = self.state(pl_module)

    def state(self, pl_module: Any) -> Any:
        norm = pl_module.net[1]
        return norm.momentum, copy.deepcopy(norm.state_dict())


def test_norms_stay_as_they_are_if_the_network_cannot_run_on_training_batches() -> None:
    train, norms = DataLoader(Stacked(), 4), NormsAroundCut()
    options = {"compensate": False, "exclude": ["0"], "amount": {"macs": 0.2}}
    with pytest.warns(UserWarning, match=r"not estimated anew .* \(RuntimeError: .*recalibrate_batches=0"):
        fit(Prepared(), pruning(recalibrate_batches=None, **options), norms, data=(train,))
    assert norms.after[0] == norms.before[0] == 0.1
    assert same(norms.after[1], norms.before[1])
    with pytest.raises(RuntimeError, match="conv2d"):
        fit(Prepared(), pruning(recalibrate_batches=4, **options), data=(train,))


@pytest.mark.parametrize("kind", [FilterPruningCallback, SlimmingCallback])
def test_another_value_is_refused(kind: Any) -> None:
    with pytest.raises(ValueError, match=r"compensate must be True, False or CompensationSettings, got 0\.5"):
        kind({"macs": 0.5}, compensate=0.5)
