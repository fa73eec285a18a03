"""When cuts come and how far each goes, by epochs or steps; and the phase that follows the last one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from benchmarks.robustness.kill_run import BATCHES, Classifier, fit, pruning, same, shuffled
from lightning_prune import Cubic, Curve, FinalPhase, Linear, OneShot
from lightning_prune.callbacks.checkpoints import BudgetCheckpoint
from lightning_prune.criteria import IPAD, L2, ActivationMean, TaylorGate, TaylorWeight
from lightning_prune.distillation.config import Distillation
from lightning_prune.distillation.mixin import DistillationMixin
from lightning_prune.pruning.schedules import Timing

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:.*(many workers|GPU available|resuming from a checkpoint that ended|to be provided)"
    ),
    pytest.mark.filterwarnings(
        "ignore:.*(not met|exists and is not empty|need to be provided|ends too late)"
    ),
]
EPOCHS = 5


class Averaged(Classifier):
    """A step scheduler, and SGD with momentum: simple to foresee."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), 0.05, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


class Two(Classifier):
    """Two optimizers, both stepped with every batch."""

    automatic_optimization = False

    def training_step(self, batch: Any, index: int) -> None:
        loss = super().training_step(batch, index)
        optimizers = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in optimizers:
            optimizer.step()

    def configure_optimizers(self) -> Any:
        first = list(self.net[0].parameters())
        rest = [p for layer in self.net[1:] for p in layer.parameters()]
        optimizers = [torch.optim.SGD(first, 0.01), torch.optim.SGD(rest, 0.01)]
        return optimizers, [torch.optim.lr_scheduler.StepLR(optimizers[0], 1)]


class Learner(DistillationMixin, Classifier):
    pass


class Rates(L.Callback):
    """The optimizer of every batch."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, float]] = []

    def on_before_optimizer_step(self, trainer: L.Trainer, module: L.LightningModule, optimizer: Any) -> None:
        group = optimizer.param_groups[0]
        self.seen.append((type(optimizer).__name__, round(group["lr"], 6)))


def train(
    *callbacks: L.Callback,
    module: L.LightningModule | None = None,
    resume: Path | None = None,
    trainer: dict[str, Any] | None = None,
    **options: Any,
) -> tuple[dict[str, Any], Any]:
    """One run; what there is at its end, and its pruning callback."""
    given = {"criterion": L2(), **options}
    callback = pruning(**given)
    told = {"max_epochs": EPOCHS, **(trainer or {})}
    found = fit(module or Averaged(), shuffled(), [callback, *callbacks], resume, **told)
    return found, callback


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("ERROR", "lightning.pytorch")


# -- how far ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "gone"),
    [
        (Linear(4), [0.25, 0.5, 0.75, 1]),
        (Cubic(2), [0.875, 1]),
        (OneShot(), [1]),
        (Curve(lambda progress: progress**0.5, 2), [0.5**0.5, 1]),
        (lambda cut: min(1, 0.5 + 0.3 * cut), [0.5, 0.8, 1]),
    ],
)
def test_each_cut_leaves_what_the_schedule_says(schedule: Any, gone: list[float]) -> None:
    _, callback = train(budget={"macs": 0.5, "params": 0.6}, schedule=schedule)
    assert len(callback.history) == len(gone)
    for cut, share in zip(callback.history, gone, strict=True):
        for resource, budget in {"macs": 0.5, "params": 0.6}.items():
            assert cut.share[resource] <= 1 - share * (1 - budget) + 1e-9
        # no more went than one unit beyond the goal: a filter of the wider layer is a sixteenth of it
        assert any(cut.share[r] > 1 - share * (1 - b) - 0.11 for r, b in {"macs": 0.5, "params": 0.6}.items())
    assert [cut.stopped for cut in callback.history] == ["amount"] * (len(gone) - 1) + ["budget"]


def test_a_budget_that_is_an_amount_is_reached_by_shares_too() -> None:
    _, callback = train(budget={"macs": 60000, "params": 10**6}, schedule=Linear(2))
    assert callback.history[-1].after["macs"] <= 60000
    assert callback.history[0].after["macs"] > 60000


# -- when ------------------------------------------------------------------------------------------------------


def test_cuts_come_after_the_chosen_optimizer_steps() -> None:
    _, callback = train(every_n_steps=4, start_step=3, schedule=Linear(4))
    assert [(cut.epoch, cut.step) for cut in callback.history] == [(0, 3), (1, 7), (2, 11), (2, 15)]
    assert str(callback.history[1]).startswith("epoch 1, step 7: cut ")


def test_accumulated_batches_are_one_step() -> None:
    """Five batches of an epoch make two and a half steps, which Lightning rounds up."""
    _, callback = train(every_n_steps=2, schedule=Linear(3), trainer={"accumulate_grad_batches": 2})
    assert [(cut.epoch, cut.step) for cut in callback.history] == [(0, 2), (1, 4), (1, 6)]


def test_several_optimizers_may_step_past_the_moment() -> None:
    _, callback = train(every_n_steps=3, schedule=Linear(3), module=Two())
    assert [cut.step for cut in callback.history] == [4, 6, 10]


@pytest.mark.parametrize("mode", ["reset", "carry"])
def test_a_network_that_is_cut_within_epochs_goes_on_learning(mode: str) -> None:
    found, callback = train(every_n_steps=4, amount={"macs": 0.2}, optimizer=mode)
    assert callback.history[-1].share["macs"] <= 0.5
    assert found["step"] == EPOCHS * BATCHES
    state = found["optimizer"]["state"]
    assert len(state) == len(list(Averaged().parameters()))
    assert all(entry["momentum_buffer"].abs().sum() > 0 for entry in state.values())


def test_statistics_are_those_of_the_steps_since_the_last_cut() -> None:
    numbers: list[int] = []

    class Count(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            run = trainer.callbacks[1]._session  # type: ignore[attr-defined]
            gathered = run.observer and run.observer.metrics["net.0.weight"].update_count
            numbers.append(gathered or 0)

    callback = pruning(criterion=IPAD(omega=0.5), every_n_steps=3, start_step=4, schedule=Linear(2))
    fit(Averaged(), shuffled(), [Count(), callback], None, max_epochs=2)
    assert numbers == [0, 1, 2, 3, 1, 2, 3, 0, 0, 0]  # nothing is gathered once the budget is met


def test_cuts_within_an_epoch_are_scored_by_its_validation(tmp_path: Path) -> None:
    """By epochs, a cut at the end of epoch 0 leaves a network that epoch 1 scores first."""
    within, at_end = (
        BudgetCheckpoint(monitor="val_loss", dirpath=tmp_path / name, filename="{epoch}", save_top_k=-1)
        for name in ("steps", "epochs")
    )
    train(within, every_n_steps=3, schedule=OneShot(), trainer={"max_epochs": 2})
    train(at_end, start_epoch=0, schedule=OneShot(), trainer={"max_epochs": 2})
    assert [path.stem for path in sorted((tmp_path / "steps").iterdir())] == ["epoch=0", "epoch=1"]
    assert [path.stem for path in sorted((tmp_path / "epochs").iterdir())] == ["epoch=1"]


def test_a_timing_counts_from_its_start() -> None:
    timing = Timing(every=10, start=25, unit="steps")
    assert [timing.number(now) for now in (0, 24, 25, 34, 35, 60)] == [-1, -1, 0, 0, 1, 3]
    assert [timing.is_observed(now) for now in (0, 14, 15, 24, 25)] == [False, False, True, True, True]


# -- the final phase -------------------------------------------------------------------------------------------


def halving(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, 0.01)


@pytest.mark.parametrize("mode", ["reset", "carry"])
def test_the_final_phase_has_its_own_plan_and_its_own_epochs(mode: str) -> None:
    """Cuts end epochs 1 and 2: epochs 3 and 4 follow, although the trainer was told to end after 4."""
    rates = Rates()
    final = FinalPhase(adam, halving, lr=0.004, epochs=2)
    found, callback = train(
        rates, schedule=Linear(2), optimizer=mode, final_phase=final, trainer={"max_epochs": 4}
    )
    by_epoch = [rates.seen[BATCHES * epoch] for epoch in range(5)]
    before = [("SGD", 0.05), ("SGD", 0.025)]
    third = ("SGD", 0.05) if mode == "reset" else ("SGD", 0.0125)
    assert by_epoch == [*before, third, ("Adam", 0.004), ("Adam", 0.002)]
    assert found["epoch"] == 5
    assert [cut.epoch for cut in callback.history] == [1, 2]


def test_the_final_phase_may_end_training_early() -> None:
    found, _ = train(
        schedule=OneShot(), final_phase=FinalPhase(None, halving, epochs=1), trainer={"max_epochs": 50}
    )
    assert found["epoch"] == 3


@pytest.mark.parametrize(("mode", "carried"), [("reset", False), ("carry", True)])
def test_the_module_s_own_optimizer_keeps_its_momentum_if_it_is_carried(mode: str, carried: bool) -> None:
    moments: list[float] = []

    class Look(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
            moments.append(
                sum(float(s["momentum_buffer"].abs().sum()) for s in trainer.optimizers[0].state.values())
            )

    train(Look(), schedule=OneShot(), optimizer=mode, final_phase=FinalPhase(scheduler=halving, lr=0.01))
    first = 2 * BATCHES  # the first batch of epoch 2
    assert (moments[first] > 0) == carried
    assert moments[first + 1] > 0


def test_the_final_phase_within_an_epoch_starts_with_the_next_batch() -> None:
    rates = Rates()
    final = FinalPhase(adam, halving, interval="step", epochs=1)
    found, _ = train(rates, every_n_steps=3, schedule=Linear(2), final_phase=final)
    assert [name for name, _ in rates.seen] == ["SGD"] * 6 + ["Adam"] * 9
    assert [rate for _, rate in rates.seen[6:9]] == [0.01, 0.005, 0.0025]
    assert found["epoch"] == 3  # the budget was met in epoch 1


def test_any_function_of_the_module_may_plan_the_final_phase_and_is_asked_once() -> None:
    asked: list[Any] = []
    rates = Rates()

    def plan(module: Averaged) -> Any:
        asked.append(module)
        (optimizer,), _ = module.configure_optimizers()  # the module's own
        optimizer.param_groups[0]["lr"] = 0.123
        return [optimizer], [halving(optimizer)]

    train(rates, schedule=OneShot(), final_phase=plan)
    assert len(asked) == 1
    assert [rate for _, rate in rates.seen[2 * BATCHES :: BATCHES]] == [0.123, 0.0615, 0.03075]
    assert "configure_optimizers" not in vars(asked[0])


def test_pruning_that_limits_end_is_over_too() -> None:
    rates = Rates()
    never = [float("inf")]
    train(
        rates,
        amount={"macs": 1},
        final_phase=FinalPhase(None, halving, lr=0.02),
        criterion=lambda graph, model, statistics: [0.0, 0.0] + never * (graph.num_units - 2),
    )
    assert rates.seen[2 * BATCHES] == ("SGD", 0.02)


# -- going on --------------------------------------------------------------------------------------------------


class Save(L.Callback):
    """A checkpoint after every batch, before or after the pruning callback."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")

    def on_train_epoch_end(self, trainer: L.Trainer, *_: Any) -> None:
        trainer.save_checkpoint(self.folder / f"{trainer.global_step}-end.ckpt")


RUNS: dict[str, dict[str, Any]] = {
    "statistics": {"criterion": IPAD(omega=0.5), "optimizer": "carry"},
    "a pass": {"criterion": IPAD(omega=0.5), "statistics": "pass"},
    "gradients": {"criterion": TaylorWeight(), "optimizer": "reset"},
    "gates": {"criterion": TaylorGate(), "optimizer": "carry"},
    "activation mean": {"every_n_steps": None, "criterion": ActivationMean(), "optimizer": "carry"},
    "final phase": {"final_phase": FinalPhase(adam, halving, epochs=3), "optimizer": "reset"},
    "carried into the final phase": {
        "final_phase": FinalPhase(scheduler=halving, epochs=2),
        "optimizer": "carry",
    },
    "final phase after epochs": {"every_n_steps": None, "final_phase": FinalPhase(adam, halving, epochs=2)},
}


@pytest.mark.parametrize("name", RUNS)
def test_resumed_from_within_an_epoch_it_ends_with_the_same_bits(name: str, tmp_path: Path) -> None:
    """Cuts come after steps 4 and 8, or epochs 1 and 2; checkpoints before and after the callback's hook.

    One from before the last cut, of an epoch that was not the last, once had norms estimated anew: 15-end, early.
    """
    early, late = tmp_path / "early", tmp_path / "late"
    options = {"every_n_steps": 4, "schedule": Linear(2), **RUNS[name]}
    steps = options["every_n_steps"]
    told = {"max_epochs": 4}

    def run(resume: Path | None, first: list[L.Callback], last: list[L.Callback]) -> dict[str, Any]:
        return fit(Averaged(), shuffled(), [*first, pruning(**options), *last], resume, **told)

    whole = run(None, [Save(early)], [Save(late)])
    assert len(whole["cuts"]) == 2
    assert same(run(None, [], []), whole)
    for file in ("3", "4", "8", "9", "10-end") if steps else ("8", "14", "15", "15-end", "17"):
        for folder in (early, late):
            found = run(folder / f"{file}.ckpt", [], [])
            assert [key for key in whole if not same(found[key], whole[key])] == [], (folder.name, file)


def test_a_checkpoint_of_the_final_phase_asks_for_it(tmp_path: Path) -> None:
    train(Save(tmp_path), schedule=OneShot(), final_phase=FinalPhase(adam, halving))
    with pytest.raises(ValueError, match="written in the final phase; give the callback the final_phase"):
        train(resume=tmp_path / "17.ckpt", schedule=OneShot())


def test_lightning_s_own_checkpoints_within_an_epoch(tmp_path: Path) -> None:
    options = {"every_n_steps": 2, "schedule": Linear(3), "criterion": IPAD(omega=0.5)}
    keep = ModelCheckpoint(tmp_path, every_n_train_steps=4, save_top_k=-1, filename="{step}")
    whole, _ = train(keep, **options)
    for step in (4, 8):
        found, _ = train(resume=tmp_path / f"step={step}.ckpt", **options)
        assert same(found, whole)


# -- bad input -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": Linear(2), "amount": {"macs": 0.1}}, "leave one of them out"),
        ({"schedule": 0.5}, "schedule must be callable with the number of a cut, got 0.5"),
        ({"schedule": lambda cut: 1.5}, r"schedule\(0\) must be the share .* got 1.5"),
        ({"schedule": lambda cut: float("nan")}, r"schedule\(0\) must be .* got nan"),
        ({"schedule": lambda cut: None}, r"schedule\(0\) must be .* got None"),
        ({"every_n_steps": 0}, "every_n_steps >= 1"),
        ({"every_n_steps": 5, "start_step": 0}, "start_step >= 1"),
        ({"start_step": 5}, "start_step needs every_n_steps"),
        ({"every_n_steps": 5, "every_n_epochs": 2}, "every_n_epochs or every_n_steps, not both"),
        ({"final_phase": 3}, "final_phase must be a FinalPhase or a function of the module, got 3"),
    ],
)
def test_what_makes_no_sense_is_refused_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pruning(**options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Linear(0), "at least 1 cut, got cuts=0"),
        (lambda: Curve(float, -1), "at least 1 cut"),
        (lambda: FinalPhase(epochs=0), "at least 1 epoch, got epochs=0"),
        (lambda: FinalPhase(lr=0.0), "must be positive, got lr=0.0"),
        (lambda: FinalPhase(interval="batch"), "interval must be 'epoch' or 'step'"),
        (lambda: FinalPhase(optimizer="adam"), "optimizer must be a function that builds one, got 'adam'"),  # type: ignore[arg-type]
    ],
)
def test_parts_that_make_no_sense_are_refused_at_once(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_schedule_that_ends_after_training_is_told_before_it_begins() -> None:
    with pytest.warns(UserWarning, match="ends too late: 40% of its total is removed .* after 4 epochs"):
        train(schedule=Linear(10))
    with pytest.warns(UserWarning, match="75% of its total is removed .* after 5 steps"):
        train(schedule=Linear(4), every_n_steps=2, start_step=1, trainer={"max_steps": 5})


def test_a_schedule_that_goes_wrong_later_says_at_which_cut() -> None:
    with pytest.raises(ValueError, match=r"schedule\(1\) must be the share"):
        train(schedule=lambda cut: 0.5 - cut, trainer={"max_epochs": -1, "max_steps": 40})


def test_a_pass_does_not_restart_the_workers_of_the_epoch_under_way() -> None:
    loaders = shuffled(num_workers=1, persistent_workers=True)
    callback = pruning(every_n_steps=2, statistics="pass")
    with pytest.raises(
        ValueError, match="would restart its persistent workers; set persistent_workers=False"
    ):
        fit(Averaged(), loaders, [callback], None, max_epochs=1)


def test_the_final_phase_of_a_module_with_two_optimizers_needs_a_function() -> None:
    with pytest.raises(
        ValueError, match="supports one optimizer, the module configures 2; set final_phase to a function"
    ):
        train(module=Two(), schedule=OneShot(), final_phase=FinalPhase())


def test_a_teacher_copied_within_an_epoch_is_refused() -> None:
    module = Learner()
    module.distillation = Distillation("copy", 1.0)
    with pytest.raises(ValueError, match="every_n_steps cuts within epochs: give a trained teacher"):
        train(module=module, every_n_steps=3)
