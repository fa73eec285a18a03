"""The learning rate rises after each cut, whatever scheduler sets it; batch norms are renewed before a score."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from benchmarks.robustness.kill_run import BATCHES, Stripes, fit, pruning, same, shuffled
from lightning_prune import Linear, OneShot, SlimmingCallback
from lightning_prune.criteria import L2
from lightning_prune.trainer.warmup import Warmup
from lightning_prune.utils.batch_norm import tracked_norms
from tests.pruning.test_schedules import Rates, StepDecay, TwoOptimizers, train

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*(many workers|GPU available|not met|ends too late|to be provided)"),
    pytest.mark.filterwarnings("ignore:.*resuming from a checkpoint that ended"),
]


class Constant(StepDecay):
    """SGD at a rate of 0.04."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), 0.04)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 100)]


class Cosine(StepDecay):
    """SGD with a cosine that computes each rate from the one before."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), 0.04, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5 * BATCHES)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def factors(module: L.LightningModule, **options: Any) -> list[float]:
    """Return the rate of each step as a share of the rate of the same run without warm-up."""
    with_warmup, without = Rates(), Rates()
    train(with_warmup, module=copy.deepcopy(module), **options)
    train(without, module=module, **{**options, "lr_warmup_steps": 0})
    pairs = zip(with_warmup.steps, without.steps, strict=True)
    return [round(rate / plain, 4) for (_, rate), (_, plain) in pairs]


@pytest.mark.parametrize("optimizer", ["carry", "reset"])
@pytest.mark.parametrize("module", [Constant, Cosine])
def test_the_steps_after_each_cut_use_rising_shares_of_the_rate(module, optimizer):
    options = {"every_n_steps": 4, "schedule": Linear(2), "optimizer": optimizer, "lr_warmup_steps": 3}
    rise = [0.25, 0.5, 0.75]
    assert factors(module(), **options) == [1.0] * 4 + rise + [1.0] + rise + [1.0] * (5 * BATCHES - 11)


def test_a_cut_during_a_warm_up_begins_a_new_one():
    options = {"every_n_steps": 2, "schedule": Linear(2), "lr_warmup_steps": 3}
    assert factors(Constant(), **options)[:8] == [1.0, 1.0, 0.25, 0.5, 0.25, 0.5, 0.75, 1.0]


def test_warm_up_after_a_cut_at_the_end_of_an_epoch():
    options = {"schedule": OneShot(), "lr_warmup_steps": 1}
    assert factors(Constant(), **options) == [1.0] * 2 * BATCHES + [0.5] + [1.0] * (3 * BATCHES - 1)


def test_accumulated_batches_are_one_step():
    options = {"every_n_steps": 2, "schedule": OneShot(), "lr_warmup_steps": 2}
    shares = factors(Constant(), trainer={"accumulate_grad_batches": 2}, **options)
    assert shares[:6] == [1.0, 1.0, 0.3333, 0.6667, 1.0, 1.0]


def test_each_of_several_optimizers_counts_its_own_steps():
    options = {"every_n_steps": 4, "schedule": OneShot(), "lr_warmup_steps": 2}
    assert factors(TwoOptimizers(), **options)[:10] == [1.0] * 4 + [0.3333] * 2 + [0.6667] * 2 + [1.0] * 2


@pytest.mark.parametrize("options", [{"lr_warmup_steps": 3}, {"lr_warmup_steps": 3, "optimizer": "reset"}])
def test_training_resumed_within_a_warm_up_ends_with_the_same_bits(options: dict[str, Any], tmp_path: Path):
    class Save(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            trainer.save_checkpoint(tmp_path / f"{trainer.global_step}.ckpt")

    options = {"every_n_steps": 4, "schedule": Linear(2), **options}

    def run(resume: Path | None, *callbacks: L.Callback) -> dict[str, Any]:
        return fit(Cosine(), shuffled(), [pruning(**options), *callbacks], resume, max_epochs=3)

    expected = run(None, Save())
    plain = fit(Cosine(), shuffled(), [pruning(**{**options, "lr_warmup_steps": 0})], None, max_epochs=3)
    assert not same(plain, expected)
    for step in (4, 5, 10):
        resumed = run(tmp_path / f"{step}.ckpt")
        assert [key for key in expected if not same(resumed[key], expected[key])] == [], step


def test_checkpoints_contain_the_rate_without_warm_up(tmp_path: Path):
    rates = []

    class Save(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            trainer.save_checkpoint(tmp_path / "now.ckpt")
            state = torch.load(tmp_path / "now.ckpt", weights_only=False)["optimizer_states"][0]
            rates.append(state["param_groups"][0]["lr"])

    train(Save(), module=Constant(), every_n_steps=2, schedule=OneShot(), lr_warmup_steps=3)
    assert rates == [0.04] * 5 * BATCHES


def test_an_exception_within_a_step_restores_the_rate_and_removes_the_hooks():
    weight = nn.Parameter(torch.ones(1))
    optimizer, warmup = torch.optim.SGD([weight], lr=1.0), Warmup(3)
    warmup.start()
    warmup.attach([optimizer])

    def closure() -> Tensor:
        raise MemoryError

    with pytest.raises(MemoryError):
        optimizer.step(closure)
    assert optimizer.param_groups[0]["lr"] == 0.25
    warmup.detach()
    assert optimizer.param_groups[0]["lr"] == 1.0
    weight.grad = torch.ones(1)
    optimizer.step()
    assert weight.item() == 0.0


def test_a_rate_that_is_a_tensor_stays_the_same_tensor():
    weight, rate = nn.Parameter(torch.ones(1)), torch.tensor(0.5)
    optimizer, warmup = torch.optim.Adam([weight], lr=rate, foreach=False), Warmup(1)
    warmup.start()
    warmup.attach([optimizer])
    weight.grad = torch.ones(1)
    optimizer.step()
    assert optimizer.param_groups[0]["lr"] is rate
    torch.testing.assert_close(weight.detach(), torch.tensor([0.75]))


def test_states_without_a_warm_up_of_old_checkpoints_are_loaded_and_bad_numbers_refused():
    callback = pruning(lr_warmup_steps=2)
    callback.retraining.load({"pending": False, "final": False, "end": None})
    assert callback.retraining.state()["warmup"] is None
    for build in (pruning, lambda **options: SlimmingCallback(**options)):
        with pytest.raises(ValueError, match="0 steps or more, got lr_warmup_steps=-1"):
            build(lr_warmup_steps=-1)


# -- batch norms -----------------------------------------------------------------------------------------------


class AfterCut(L.Callback):
    """Stores the means of norms when the validation after the cut begins, and the score of exact ones."""

    def __init__(self) -> None:
        self.distances: list[float] = []

    def on_validation_start(self, trainer: L.Trainer, module: Any) -> None:
        callback = next(c for c in trainer.callbacks if hasattr(c, "history"))
        if not callback.history or trainer.sanity_checking or self.distances:
            return
        net = copy.deepcopy(module.net).eval()
        norm = tracked_norms(net)[1]
        stripes = Stripes()
        images = torch.stack([stripes[index][0] for index in range(len(stripes))])
        inputs: list[Tensor] = []
        norm.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
        net(images)
        exact = inputs[0].mean((0, 2, 3))
        self.distances.append(((norm.running_mean - exact).norm() / exact.norm()).item())


def distance(**options: Any) -> float:
    """Return how far the means of a norm are from the exact ones when the network is scored after a cut."""
    seen = AfterCut()
    trainer = {"max_epochs": 2, "val_check_interval": 2}
    options = {"every_n_steps": 4, "schedule": OneShot(), "compensate": False, **options}
    train(seen, module=Constant(), trainer=trainer, **options)
    return seen.distances[0]


def test_norms_are_renewed_before_a_validation_that_follows_the_cut():
    """The statistics of the wider network were scored: batch norms keep nine tenths of them at every step."""
    assert distance(recalibrate_batches=0) > 3 * distance()
    assert distance() == distance(recalibrate_batches=16) < 0.1


@pytest.mark.parametrize(
    ("batches", "message"), [(None, None), (0, None), (4, "restart its persistent workers")]
)
def test_cuts_within_an_epoch_do_not_restart_persistent_workers(monkeypatch, batches, message):
    training, validation = shuffled()
    monkeypatch.setattr(training, "_DataLoader__initialized", False)
    training.persistent_workers = True
    options = {"every_n_steps": 4, "schedule": OneShot(), "criterion": L2(), "compensate": False}
    callback = pruning(recalibrate_batches=batches, **options)
    if message is None:
        fit(Constant(), (training, validation), [callback], None, max_epochs=2)
        assert len(callback.history) == 1
    else:
        with pytest.raises(ValueError, match=message):
            fit(Constant(), (training, validation), [callback], None, max_epochs=2)
        assert not callback.history
