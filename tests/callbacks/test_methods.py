"""Tests that PruningCallback carries out a user-defined method, and that the public callbacks only construct one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from benchmarks.robustness.kill_run import BATCHES, Classifier, fit, same, shuffled
from lightning_prune import (
    L2,
    FilterPruningCallback,
    NetAdaptCallback,
    PruningCallback,
    PruningMethod,
    PruningPolicy,
    PruningRecord,
    SlimmingCallback,
    load_pruned,
    prune_,
)
from lightning_prune.pruning.schedules import Timing
from lightning_prune.pruning.session import PruningSession
from lightning_prune.trainer.retraining import Retraining

pytestmark = pytest.mark.filterwarnings("ignore:.*(many workers|GPU available|resuming from a checkpoint)")


class LowestNorms(PruningMethod):
    """Removes the two filters of lowest L2 norm at the end of every second epoch."""

    def __init__(self) -> None:
        super().__init__(PruningPolicy({"macs": 0.75}), Timing(every=2, start=1), L2())
        self.largest_norms: list[float] = []

    def criterion_to_observe(self, trainer: L.Trainer, session: PruningSession) -> None:
        return None

    def is_due(self, trainer: L.Trainer, session: PruningSession, now: int, last: int) -> bool:
        return self.timing.due(max(last, now - 1), now) and not self.is_finished(session)

    def cut_(
        self,
        trainer: L.Trainer,
        session: PruningSession,
        now: int,
        copies: Sequence[nn.Module],
        optimizers: Sequence[Optimizer],
    ) -> PruningRecord:
        norms = self.criterion(session.graph, session.target, {})
        prunable = session.graph.prunable
        lowest = prunable[np.argsort(norms[prunable])[:2]]
        self.largest_norms.append(float(norms[lowest].max()))
        record = prune_(session.target, session.graph, lowest, optimizers)
        session.graph = self.policy.trace(session.target, session.example)
        return record

    def cut_metrics(self) -> dict[str, float]:
        return {"prune/largest_norm": self.largest_norms[-1]}

    def state_dict(self) -> dict[str, Any]:
        return {"largest_norms": list(self.largest_norms)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.largest_norms = list(state["largest_norms"])


class SaveInEpoch(L.Callback):
    """Saves a checkpoint within an epoch, and one at its end."""

    def __init__(self, folder: Path, epoch: int) -> None:
        self.folder, self.epoch = folder, epoch

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.current_epoch == self.epoch and trainer.fit_loop.epoch_loop.batch_idx == 2:
            trainer.save_checkpoint(self.folder / "within.ckpt")

    def on_train_epoch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.current_epoch == self.epoch:
            trainer.save_checkpoint(self.folder / "end.ckpt")


class LoggedMetrics(L.Callback):
    """Keeps the metrics of each epoch, which are complete when the next one starts."""

    def __init__(self) -> None:
        self.epochs: list[dict[str, float]] = []

    def on_train_epoch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.current_epoch:
            self.epochs.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def callback_with_method() -> PruningCallback:
    return PruningCallback(LowestNorms(), Retraining("carry"), submodule=None, verbose=False)


def train(
    callback: PruningCallback,
    *others: L.Callback,
    module: Classifier | None = None,
    resume: Path | None = None,
) -> dict[str, Any]:
    return fit(module or Classifier(), shuffled(), [*others, callback], resume, max_epochs=5)


def test_a_user_defined_method_prunes_and_the_optimizer_continues() -> None:
    module, callback = Classifier(), callback_with_method()
    final_state = train(callback, module=module)
    assert [(cut.epoch, cut.filters) for cut in callback.history] == [(1, 2), (3, 2)]
    assert callback.history[0].share["macs"] > 0.75 >= callback.history[1].share["macs"]
    assert module.net[0].out_channels + module.net[3].out_channels == 12 + 16 - 4
    states = final_state["optimizer"]["state"]
    shapes = [parameter.shape for parameter in module.parameters()]
    assert [states[index]["exp_avg"].shape for index in range(len(shapes))] == shapes
    assert {float(entry["step"]) for entry in states.values()} == {5.0 * BATCHES}


def test_a_user_defined_method_logs_sizes_and_its_own_metrics() -> None:
    callback, logged = callback_with_method(), LoggedMetrics()
    train(callback, logged)
    assert ["prune/largest_norm" in metrics for metrics in logged.epochs] == [False, True, True, True]
    assert logged.epochs[1]["prune/largest_norm"] == pytest.approx(callback.method.largest_norms[0])
    assert logged.epochs[3]["prune/largest_norm"] == pytest.approx(callback.method.largest_norms[1])
    shares = [metrics["prune/macs_share"] for metrics in logged.epochs]
    assert shares == pytest.approx(
        [1.0, *[callback.history[0].share["macs"]] * 2, callback.history[1].share["macs"]]
    )


@pytest.mark.parametrize("epoch", [1, 2, 3])
def test_a_user_defined_method_resumes_to_the_same_weights(epoch: int, tmp_path: Path) -> None:
    uninterrupted = callback_with_method()
    expected = train(uninterrupted, SaveInEpoch(tmp_path, epoch))
    assert len(expected["cuts"]) == 2
    for file in ("within.ckpt", "end.ckpt"):
        resumed = callback_with_method()
        assert same(train(resumed, resume=tmp_path / file), expected), file
        assert resumed.method.largest_norms == uninterrupted.method.largest_norms


def test_a_checkpoint_of_a_user_defined_method_loads_without_a_trainer(tmp_path: Path) -> None:
    module = Classifier()
    train(callback_with_method(), SaveInEpoch(tmp_path, 4), module=module)
    loaded = load_pruned(Classifier(), tmp_path / "end.ckpt")
    images = torch.randn(2, 1, 12, 12)
    assert torch.equal(loaded.eval()(images), module.eval()(images))


@pytest.mark.parametrize("kind", [FilterPruningCallback, SlimmingCallback, NetAdaptCallback])
def test_the_public_callbacks_only_construct_a_method(kind: type[PruningCallback]) -> None:
    callback = kind({"macs": 0.5})  # type: ignore[arg-type, call-arg]
    assert isinstance(callback, PruningCallback)
    assert isinstance(callback.method, PruningMethod)
    assert callback.policy is callback.method.policy
    assert callback.criterion is callback.method.criterion
    hooks = {name for name in vars(kind) if name in vars(L.Callback)} - {"__module__", "__doc__"}
    assert hooks == set()
