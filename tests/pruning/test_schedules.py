"""Tests of when cuts come and how much each removes, by epochs or steps, and of the final phase."""

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


class StepDecay(Classifier):
    """SGD with momentum and a step scheduler, whose learning rates are easy to predict."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), 0.05, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


class TwoOptimizers(Classifier):
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


class Rates(L.Callback):
    """Stores class and learning rate of the optimizer of every step."""

    def __init__(self) -> None:
        self.steps: list[tuple[str, float]] = []

    def on_before_optimizer_step(self, trainer: L.Trainer, module: L.LightningModule, optimizer: Any) -> None:
        group = optimizer.param_groups[0]
        self.steps.append((type(optimizer).__name__, round(group["lr"], 6)))


def train(
    *callbacks: L.Callback,
    module: L.LightningModule | None = None,
    resume: Path | None = None,
    trainer: dict[str, Any] | None = None,
    **options: Any,
) -> tuple[dict[str, Any], Any]:
    """Train; return the final state and the pruning callback."""
    callback = pruning(**{"criterion": L2(), **options})
    trainer_options = {"max_epochs": EPOCHS, **(trainer or {})}
    final_state = fit(module or StepDecay(), shuffled(), [callback, *callbacks], resume, **trainer_options)
    return final_state, callback


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("ERROR", "lightning.pytorch")


# -- how much ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "removed"),
    [
        (Linear(4), [0.25, 0.5, 0.75, 1]),
        (Cubic(2), [0.875, 1]),
        (OneShot(), [1]),
        (Curve(lambda progress: progress**0.5, 2), [0.5**0.5, 1]),
        (lambda cut: min(1, 0.5 + 0.3 * cut), [0.5, 0.8, 1]),
    ],
)
def test_each_cut_removes_the_share_of_the_schedule(schedule: Any, removed: list[float]) -> None:
    _, callback = train(budget={"macs": 0.5, "params": 0.6}, schedule=schedule)
    assert len(callback.history) == len(removed)
    for cut, share in zip(callback.history, removed, strict=True):
        for resource, budget in {"macs": 0.5, "params": 0.6}.items():
            assert cut.share[resource] <= 1 - share * (1 - budget) + 1e-9
        # at most one unit too much was removed: a filter is a sixteenth of the wider layer
        assert any(cut.share[r] > 1 - share * (1 - b) - 0.11 for r, b in {"macs": 0.5, "params": 0.6}.items())
    assert [cut.stopped for cut in callback.history] == ["amount"] * (len(removed) - 1) + ["budget"]


def test_schedules_apply_to_budgets_in_absolute_amounts() -> None:
    _, callback = train(budget={"macs": 60000, "params": 10**6}, schedule=Linear(2))
    assert callback.history[-1].after["macs"] <= 60000
    assert callback.history[0].after["macs"] > 60000


# -- when ------------------------------------------------------------------------------------------------------


def test_cuts_come_after_the_chosen_optimizer_steps() -> None:
    _, callback = train(every_n_steps=4, start_step=3, schedule=Linear(4))
    assert [(cut.epoch, cut.step) for cut in callback.history] == [(0, 3), (1, 7), (2, 11), (2, 15)]
    assert str(callback.history[1]).startswith("epoch 1, step 7: cut ")


def test_accumulated_batches_are_one_step() -> None:
    """The five batches of an epoch are two and a half steps, which Lightning rounds up."""
    _, callback = train(every_n_steps=2, schedule=Linear(3), trainer={"accumulate_grad_batches": 2})
    assert [(cut.epoch, cut.step) for cut in callback.history] == [(0, 2), (1, 4), (1, 6)]


def test_several_optimizers_may_step_beyond_the_scheduled_step() -> None:
    _, callback = train(every_n_steps=3, schedule=Linear(3), module=TwoOptimizers())
    assert [cut.step for cut in callback.history] == [4, 6, 10]


@pytest.mark.parametrize("mode", ["reset", "carry"])
def test_a_network_that_is_cut_within_epochs_continues_to_train(mode: str) -> None:
    final_state, callback = train(every_n_steps=4, amount={"macs": 0.2}, optimizer=mode)
    assert callback.history[-1].share["macs"] <= 0.5
    assert final_state["step"] == EPOCHS * BATCHES
    state = final_state["optimizer"]["state"]
    assert len(state) == len(list(StepDecay().parameters()))
    assert all(entry["momentum_buffer"].abs().sum() > 0 for entry in state.values())


def test_statistics_are_those_of_the_steps_since_the_last_cut() -> None:
    numbers: list[int] = []

    class Count(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            session = trainer.callbacks[1]._session  # type: ignore[attr-defined]
            batches = session.observer and session.observer.metrics["net.0.weight"].update_count
            numbers.append(batches or 0)

    callback = pruning(criterion=IPAD(omega=0.5), every_n_steps=3, start_step=4, schedule=Linear(2))
    fit(StepDecay(), shuffled(), [Count(), callback], None, max_epochs=2)
    assert numbers == [0, 1, 2, 3, 1, 2, 3, 0, 0, 0]  # nothing is observed once the budget is met


def test_cuts_within_an_epoch_are_scored_by_its_validation(tmp_path: Path) -> None:
    """After a cut at the end of epoch 0, the smaller network is first scored in epoch 1."""
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
def test_the_final_phase_has_its_own_optimizer_and_number_of_epochs(mode: str) -> None:
    """Epochs 1 and 2 end with a cut. Epochs 3 and 4 follow, although max_epochs is 4."""
    rates = Rates()
    final = FinalPhase(adam, halving, lr=0.004, epochs=2)
    final_state, callback = train(
        rates, schedule=Linear(2), optimizer=mode, final_phase=final, trainer={"max_epochs": 4}
    )
    by_epoch = [rates.steps[BATCHES * epoch] for epoch in range(5)]
    before = [("SGD", 0.05), ("SGD", 0.025)]
    third = ("SGD", 0.05) if mode == "reset" else ("SGD", 0.0125)
    assert by_epoch == [*before, third, ("Adam", 0.004), ("Adam", 0.002)]
    assert final_state["epoch"] == 5
    assert [cut.epoch for cut in callback.history] == [1, 2]


def test_the_final_phase_may_end_training_early() -> None:
    final_state, _ = train(
        schedule=OneShot(), final_phase=FinalPhase(None, halving, epochs=1), trainer={"max_epochs": 50}
    )
    assert final_state["epoch"] == 3


@pytest.mark.parametrize(("mode", "carried"), [("reset", False), ("carry", True)])
def test_the_optimizer_of_the_module_keeps_its_momentum_if_it_is_carried(mode: str, carried: bool) -> None:
    moments: list[float] = []

    class MomentumSize(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
            moments.append(
                sum(float(s["momentum_buffer"].abs().sum()) for s in trainer.optimizers[0].state.values())
            )

    train(
        MomentumSize(), schedule=OneShot(), optimizer=mode, final_phase=FinalPhase(scheduler=halving, lr=0.01)
    )
    first = 2 * BATCHES  # the first batch of epoch 2
    assert (moments[first] > 0) == carried
    assert moments[first + 1] > 0


def test_the_final_phase_within_an_epoch_starts_with_the_next_batch() -> None:
    rates = Rates()
    final = FinalPhase(adam, halving, interval="step", epochs=1)
    final_state, _ = train(rates, every_n_steps=3, schedule=Linear(2), final_phase=final)
    assert [name for name, _ in rates.steps] == ["SGD"] * 6 + ["Adam"] * 9
    assert [rate for _, rate in rates.steps[6:9]] == [0.01, 0.005, 0.0025]
    assert final_state["epoch"] == 3  # the budget was met in epoch 1


def test_a_function_of_the_module_may_configure_the_final_phase_and_is_called_once() -> None:
    modules: list[Any] = []
    rates = Rates()

    def configure(module: StepDecay) -> Any:
        modules.append(module)
        (optimizer,), _ = module.configure_optimizers()  # that of the module
        optimizer.param_groups[0]["lr"] = 0.123
        return [optimizer], [halving(optimizer)]

    train(rates, schedule=OneShot(), final_phase=configure)
    assert len(modules) == 1
    assert [rate for _, rate in rates.steps[2 * BATCHES :: BATCHES]] == [0.123, 0.0615, 0.03075]
    assert "configure_optimizers" not in vars(modules[0])


def test_the_final_phase_also_follows_when_limits_end_pruning() -> None:
    rates = Rates()
    never_removed = [float("inf")]
    train(
        rates,
        amount={"macs": 1},
        final_phase=FinalPhase(None, halving, lr=0.02),
        criterion=lambda graph, model, statistics: [0.0, 0.0] + never_removed * (graph.num_units - 2),
    )
    assert rates.steps[2 * BATCHES] == ("SGD", 0.02)


# -- resuming --------------------------------------------------------------------------------------------------


class Save(L.Callback):
    """Saves a checkpoint after every batch and epoch, before or after the pruning callback."""

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
def test_training_resumed_within_an_epoch_ends_with_the_same_bits(name: str, tmp_path: Path) -> None:
    """Cuts come after steps 4 and 8, or epochs 1 and 2; checkpoints are saved before and after the callback's hook.

    A regression: after a resume from 15-end in early, norms were recalibrated although training continued.
    """
    early, late = tmp_path / "early", tmp_path / "late"
    options = {"every_n_steps": 4, "schedule": Linear(2), **RUNS[name]}
    steps = options["every_n_steps"]

    def train_from(resume: Path | None, first: list[L.Callback], last: list[L.Callback]) -> dict[str, Any]:
        return fit(StepDecay(), shuffled(), [*first, pruning(**options), *last], resume, max_epochs=4)

    expected = train_from(None, [Save(early)], [Save(late)])
    assert len(expected["cuts"]) == 2
    assert same(train_from(None, [], []), expected)
    for file in ("3", "4", "8", "9", "10-end") if steps else ("8", "14", "15", "15-end", "17"):
        for folder in (early, late):
            resumed = train_from(folder / f"{file}.ckpt", [], [])
            assert [key for key in expected if not same(resumed[key], expected[key])] == [], (
                folder.name,
                file,
            )


def test_a_checkpoint_of_the_final_phase_requires_final_phase(tmp_path: Path) -> None:
    train(Save(tmp_path), schedule=OneShot(), final_phase=FinalPhase(adam, halving))
    with pytest.raises(ValueError, match="written in the final phase; give the callback the final_phase"):
        train(resume=tmp_path / "17.ckpt", schedule=OneShot())


def test_checkpoints_of_lightning_within_an_epoch_resume_to_the_same_bits(tmp_path: Path) -> None:
    options = {"every_n_steps": 2, "schedule": Linear(3), "criterion": IPAD(omega=0.5)}
    keep = ModelCheckpoint(tmp_path, every_n_train_steps=4, save_top_k=-1, filename="{step}")
    expected, _ = train(keep, **options)
    for step in (4, 8):
        resumed, _ = train(resume=tmp_path / f"step={step}.ckpt", **options)
        assert same(resumed, expected)


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
def test_invalid_arguments_of_the_callback_are_refused(options: dict[str, Any], message: str) -> None:
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
def test_invalid_schedules_and_final_phases_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_schedule_that_ends_after_training_warns_before_training() -> None:
    with pytest.warns(UserWarning, match="ends too late: 40% of its total is removed .* after 4 epochs"):
        train(schedule=Linear(10))
    with pytest.warns(UserWarning, match="75% of its total is removed .* after 5 steps"):
        train(schedule=Linear(4), every_n_steps=2, start_step=1, trainer={"max_steps": 5})


def test_an_invalid_share_of_a_schedule_raises_with_the_number_of_the_cut() -> None:
    with pytest.raises(ValueError, match=r"schedule\(1\) must be the share"):
        train(schedule=lambda cut: 0.5 - cut, trainer={"max_epochs": -1, "max_steps": 40})


def test_a_pass_within_an_epoch_is_refused_with_persistent_workers() -> None:
    loaders = shuffled(num_workers=1, persistent_workers=True)
    callback = pruning(every_n_steps=2, statistics="pass")
    with pytest.raises(
        ValueError, match="would restart its persistent workers; set persistent_workers=False"
    ):
        fit(StepDecay(), loaders, [callback], None, max_epochs=1)


def test_the_final_phase_of_a_module_with_two_optimizers_needs_a_function() -> None:
    with pytest.raises(
        ValueError, match="supports one optimizer, the module configures 2; set final_phase to a function"
    ):
        train(module=TwoOptimizers(), schedule=OneShot(), final_phase=FinalPhase())
