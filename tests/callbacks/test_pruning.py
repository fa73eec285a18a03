"""Tests of FilterPruningCallback in a Trainer: training continues on a smaller network, and can be resumed."""

from __future__ import annotations

import copy
import re
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import PruningRecord, trace
from lightning_prune.callbacks.pruning import FilterPruningCallback as Callback
from lightning_prune.criteria import IPAD, L2
from lightning_prune.criteria.activation_deviation import activation_deviation
from lightning_prune.selection.limits import Limits
from lightning_prune.utils.batch_norm import recalibrate_

# Both terms of IPAD, so that statistics are collected; the default criterion uses weights alone.
FilterPruningCallback = partial(Callback, criterion=IPAD(omega=0.5))

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*GPU available but not used.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*exists and is not empty.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed.*:UserWarning"),
]


class Blobs(L.LightningModule):
    """A small classifier without any code for pruning."""

    decay_every = 100

    def __init__(self, example: bool = False) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1, stride=2),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(32, 4),
        )
        self.losses: list[float] = []
        if example:
            self.example_input_array = torch.zeros(1, 1, 12, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, index: int) -> Tensor:
        x, y = batch["image"], batch["label"]
        loss = nn.functional.cross_entropy(self(x), y)
        self.losses.append(loss.item())
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), 1e-2)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, self.decay_every)]


class Named(TensorDataset):
    def __getitem__(self, index: int) -> dict[str, Tensor]:  # type: ignore[override]
        image, label = super().__getitem__(index)
        return {"label": label, "image": image}


class Tupled(Blobs):
    def training_step(self, batch: Any, index: int) -> Tensor:
        return super().training_step({"image": batch[0], "label": batch[1]}, index)


class Validated(Tupled):
    def validation_step(self, batch: Any, index: int) -> None:
        self(batch * float("inf"))


class ByImage(Blobs):
    def forward(self, image: Tensor) -> Tensor:
        return self.net(image)


def data(dataset: type = TensorDataset, number: int = 64, shuffle: bool = True) -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(number) % 4
    stripes = torch.stack([(torch.arange(144) % (n + 2) == 0).float().reshape(1, 12, 12) for n in range(4)])
    x = stripes[y] + 0.5 * torch.randn(number, 1, 12, 12, generator=generator)
    return DataLoader(dataset(x, y), 16, shuffle=shuffle)


def trainer(*callbacks: L.Callback, epochs: int = 6, **kwargs: Any) -> L.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        enable_model_summary=False,
        callbacks=list(callbacks),
        **{**quiet, **kwargs},
    )


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def cost(module: Blobs, resource: str = "macs") -> int:
    return trace(module, torch.zeros(1, 1, 12, 12)).cost(resource)


@pytest.mark.parametrize("optimizer", ["reset", "carry"])
@pytest.mark.parametrize("statistics", ["epoch", "pass"])
def test_the_budget_is_met_and_the_loss_continues_to_fall(optimizer, statistics, capsys):
    module, dense = Tupled(), cost(Tupled())
    callback = FilterPruningCallback(
        {"macs": 0.5}, amount={"macs": 0.2}, optimizer=optimizer, statistics=statistics
    )
    fit = trainer(callback, epochs=14)
    fit.fit(module, data())
    assert cost(module) <= 0.5 * dense
    assert callback.history[-1].after["macs"] == cost(module)
    assert [cut.epoch for cut in callback.history] == list(range(1, 1 + len(callback.history)))
    per_epoch = np.array(module.losses).reshape(14, -1).mean(1)
    last = callback.history[-1].epoch
    assert per_epoch[-1] < 0.8 * per_epoch[last]
    assert per_epoch[-1] < 0.5 * per_epoch[0]
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch")]
    assert len(lines) == len(callback.history)
    assert re.match(
        r"epoch 1: cut \d+ filters in \d layers · macs .* \(\d+\.\d% of dense\) · params", lines[0]
    )


@pytest.mark.parametrize("optimizer", ["reset", "carry"])
def test_the_optimizer_has_the_parameters_of_the_network_and_moves_them(optimizer):
    module = Tupled()
    checks: list[tuple[bool, bool]] = []

    class Watch(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.before = [p.detach().clone() for p in pl_module.parameters()]

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            state = trainer.optimizers[0].state
            stepped = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
            moved = all(
                not torch.equal(a, b) for a, b in zip(self.before, pl_module.parameters(), strict=True)
            )
            shapes = all(state[p]["exp_avg"].shape == p.shape for p in pl_module.parameters())
            checks.append((moved, shapes and stepped == {id(p) for p in pl_module.parameters()}))

    trainer(FilterPruningCallback({"macs": 0.5}, optimizer=optimizer), Watch(), epochs=8).fit(module, data())
    assert all(moved for moved, _ in checks)
    assert all(is_complete for _, is_complete in checks)


def test_reset_restarts_optimizer_and_scheduler_and_carry_continues_them():
    def rates(optimizer: str) -> tuple[list[float], list[float]]:
        first_rates, steps = [], []

        class Watch(L.Callback):
            def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
                if batch_idx == 0:
                    first_rates.append(trainer.optimizers[0].param_groups[0]["lr"])
                    steps.append(next(iter(trainer.optimizers[0].state.values()))["step"].item())

        callback = FilterPruningCallback(
            {"macs": 0.7}, start_epoch=3, amount={"macs": 1}, optimizer=optimizer
        )
        module = Tupled()
        module.decay_every = 3
        trainer(callback, Watch(), epochs=6).fit(module, data())
        assert [cut.epoch for cut in callback.history] == [3]
        return first_rates, steps

    rate, steps = rates("carry")
    assert rate == pytest.approx([1e-2] * 3 + [1e-3] * 3)
    assert steps == [1, 5, 9, 13, 17, 21]
    rate, steps = rates("reset")
    assert rate == pytest.approx([1e-2] * 3 + [1e-3] + [1e-2] * 2)
    assert steps == [1, 5, 9, 13, 1, 5]


class Spy:
    """A criterion that stores the statistics it receives."""

    def __init__(self) -> None:
        self.statistics: list[dict[str, np.ndarray]] = []

    def observer(self, graph, model):
        return IPAD().observer(graph, model)

    def __call__(self, graph, model, statistics):
        self.statistics.append(dict(statistics))
        return IPAD()(graph, model, statistics)


def test_statistics_are_collected_over_all_training_batches_of_the_epoch_and_no_other_ones():
    """The sanity check and validation, whose inputs are infinite, are not collected."""
    module, spy, outputs = Validated(), Spy(), {}

    class Watch(L.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            outputs[trainer.current_epoch] = []

    def keep_output(layer: nn.Module, args: Any, out: Tensor) -> None:
        if type(out) is Tensor and not out.is_meta and layer.training:  # not those of a trace
            outputs[fit.current_epoch].append(out.detach())

    module.net[0].register_forward_hook(keep_output)
    fit = trainer(
        FilterPruningCallback({"macs": 0.5}, criterion=spy), Watch(), epochs=3, num_sanity_val_steps=2
    )
    with pytest.warns(UserWarning, match="not met"):
        fit.fit(module, data(), DataLoader(torch.ones(2, 1, 12, 12), 2))
    assert len(spy.statistics) == 2
    for epoch, statistics in zip((1, 2), spy.statistics, strict=True):
        assert len(outputs[epoch]) == 4
        mean_map = torch.cat(outputs[epoch]).mean(0)
        expected = activation_deviation(mean_map.flatten(1))
        np.testing.assert_allclose(statistics["net.0.weight"], expected, rtol=1e-4)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_every_precision_is_supported(precision):
    module, callback = Tupled(), FilterPruningCallback({"macs": 0.6}, optimizer="carry")
    trainer(callback, epochs=8, precision=precision, accumulate_grad_batches=3).fit(module, data())
    assert callback.history[-1].share["macs"] <= 0.6
    assert module.losses[-1] < 0.5 * module.losses[0]


def test_a_lambda_is_accepted_as_criterion_and_hooks_are_removed_at_the_end():
    module = Tupled()
    callback = FilterPruningCallback(
        {"macs": 0.6}, criterion=lambda graph, model, statistics: L2()(graph, model)
    )
    trainer(callback, epochs=8).fit(module, data())
    assert callback.history
    assert not any(m._forward_hooks for m in module.modules())
    assert "on_load_checkpoint" not in vars(module)


@pytest.mark.parametrize(("kind", "dataset"), [(Tupled, TensorDataset), (ByImage, Named)])
@pytest.mark.parametrize("example", [False, True])
def test_the_example_input_comes_from_the_module_or_the_first_batch(kind, dataset, example):
    callback = FilterPruningCallback({"macs": 0.6})
    trainer(callback, epochs=8).fit(kind(example), data(dataset))
    assert callback.history[0].before["macs"] == cost(Blobs())


def test_costs_units_and_shares_are_logged():
    fit, module = trainer(FilterPruningCallback({"macs": 0.6}), epochs=8), Tupled()
    fit.fit(module, data())
    logged = fit.callback_metrics
    assert logged["prune/macs"] == cost(module)
    assert logged["prune/params"] == sum(p.numel() for p in module.parameters())
    assert logged["prune/macs_share"] == pytest.approx(cost(module) / cost(Blobs()))
    assert logged["prune/units"] == module.net[0].out_channels + module.net[3].out_channels


def test_the_record_applied_to_a_dense_network_gives_the_same_network(tmp_path: Path):
    module, callback = Tupled(), FilterPruningCallback({"macs": 0.4}, limits=Limits(1.0))
    trainer(callback, epochs=10).fit(module, data())
    assert len(callback.history) > 2
    callback.record.save(tmp_path / "record.json")
    fresh = PruningRecord.load(tmp_path / "record.json").apply_(Tupled())
    fresh.load_state_dict(module.state_dict())
    x = torch.randn(3, 1, 12, 12)
    assert torch.equal(fresh.eval()(x), module.eval()(x))


def test_only_the_given_submodule_is_pruned():
    module = Tupled()
    callback = FilterPruningCallback({"params": 0.6}, submodule="net", exclude=["0"])
    trainer(callback, epochs=8).fit(module, data())
    assert module.net[0].out_channels == 16
    assert module.net[3].out_channels < 32
    assert all(not name.startswith("net.") for name in callback.record.kept)


def train_with_checkpoints(folder: Path, optimizer: str, at_epoch_end: bool, resume: Path | None = None):
    """Train twelve epochs with a checkpoint of each; return the module and the callback."""
    module = Validated()
    callback = FilterPruningCallback(
        {"macs": 0.4}, limits=Limits(1.0), every_n_epochs=2, optimizer=optimizer, verbose=False
    )
    keep = ModelCheckpoint(folder, "{epoch}", save_top_k=-1, save_on_train_epoch_end=at_epoch_end)
    val = DataLoader(torch.ones(2, 1, 12, 12), 2)
    fit = trainer(callback, keep, epochs=12, enable_checkpointing=True)
    fit.fit(module, data(shuffle=False), val, ckpt_path=resume, weights_only=True if resume else None)
    return module, callback


@pytest.mark.parametrize("optimizer", ["reset", "carry"])
def test_a_dense_module_resumes_to_the_same_weights(tmp_path: Path, optimizer):
    uninterrupted, first = train_with_checkpoints(tmp_path, optimizer, True)
    for epoch in (1, 3, 4):
        resumed, second = train_with_checkpoints(
            tmp_path / "again", optimizer, True, tmp_path / f"epoch={epoch}.ckpt"
        )
        assert [cut.epoch for cut in second.history] == [cut.epoch for cut in first.history]
        assert second.record.kept == first.record.kept
        for (name, a), b in zip(
            uninterrupted.state_dict().items(), resumed.state_dict().values(), strict=True
        ):
            assert torch.equal(a, b), name


@pytest.mark.parametrize("optimizer", ["reset", "carry"])
def test_training_resumed_from_between_validation_and_cut_makes_the_cut(tmp_path: Path, optimizer):
    uninterrupted, first = train_with_checkpoints(tmp_path, optimizer, False)
    resumed, second = train_with_checkpoints(tmp_path / "again", optimizer, False, tmp_path / "epoch=3.ckpt")
    assert [cut.epoch for cut in second.history] == [cut.epoch for cut in first.history]
    assert second.history[-1].after["macs"] == cost(resumed) <= 0.4 * cost(Blobs())
    assert all(
        torch.equal(a, b) for a, b in zip(uninterrupted.parameters(), resumed.parameters(), strict=True)
    )


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`.*:UserWarning")
def test_testing_from_a_checkpoint_needs_no_further_code(tmp_path: Path):
    class Tested(Tupled):
        def test_step(self, batch: Any, index: int) -> None:
            self.log("seen", self(batch[0]).sum())

    keep = ModelCheckpoint(tmp_path, "last", save_on_train_epoch_end=True)
    fit = trainer(FilterPruningCallback({"macs": 0.6}), keep, enable_checkpointing=True, epochs=7)
    module = Tested()
    fit.fit(module, data())
    without_checkpoint = fit.test(module, data(shuffle=False), verbose=False)
    from_checkpoint = fit.test(module, data(shuffle=False), ckpt_path=keep.best_model_path, verbose=False)
    fresh = trainer(FilterPruningCallback({"macs": 0.6}))
    from_dense = fresh.test(Tested(), data(shuffle=False), ckpt_path=keep.best_model_path, verbose=False)
    assert without_checkpoint == from_checkpoint == from_dense


def test_recalibration_estimates_norms_on_the_given_batches():
    net = nn.Sequential(nn.Conv2d(1, 3, 1), nn.BatchNorm2d(3), nn.Dropout(0.5), nn.BatchNorm2d(3)).eval()
    batches = [torch.randn(8, 1, 5, 5) for _ in range(3)]
    assert recalibrate_(net, [((batch,), {}) for batch in batches]) == 3
    means = torch.stack([net[0](batch).mean((0, 2, 3)) for batch in batches])
    torch.testing.assert_close(net[1].running_mean, means.mean(0), rtol=1e-4, atol=1e-6)
    assert net[1].momentum == 0.1
    assert not any(module.training for module in net.modules())


def test_norms_are_recalibrated_if_training_ends_with_a_cut():
    module = Tupled()
    callback = FilterPruningCallback(
        {"macs": 0.5}, start_epoch=1, amount={"macs": 1}, criterion=L2(), compensate=False
    )
    trainer(callback, epochs=2).fit(module, data())
    assert len(callback.history) == 1
    mean_after_training = module.net[4].running_mean.clone()
    recalibrate_(module, [((batch[0],), {}) for batch in data(shuffle=False)])
    torch.testing.assert_close(mean_after_training, module.net[4].running_mean, rtol=0.3, atol=0.05)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"optimizer": "keep"}, "optimizer must be 'reset' or 'carry', got 'keep'"),
        ({"statistics": "none"}, "statistics must be 'epoch' or 'pass'"),
        ({"every_n_epochs": 0}, "every_n_epochs >= 1"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        FilterPruningCallback({"macs": 0.5}, **arguments)


@pytest.mark.parametrize("example", [True, False])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget": {"macs": 1e-6}}, r"cannot be met: limits.*of the dense model"),
        ({"budget": {"macs": -1}}, r"in \(0, 1\]"),
        ({"budget": {"flops": 0.5}, "amount": {}}, r"unknown resource 'flops'"),
        ({"budget": {"macs": 0.5}, "amount": {"mac": 0.1}}, r"unknown resource 'mac' in amount"),
        ({"budget": {"macs": 0.5}, "exclude": ["net.00"]}, r"did you mean 'net.0'"),
        ({"budget": {"macs": 0.5}, "exclude": ["net"]}, r"covers every layer"),
        ({"budget": {"macs": 0.5}, "submodule": "nat"}, r"did you mean 'net'"),
        ({"budget": {"macs": 0.5}, "limits": Limits(overrides={"nte": 1})}, r"limit 'nte' matches no layer"),
    ],
)
def test_bad_input_raises_before_training_and_changes_nothing(arguments, message, example):
    module = Tupled(example)
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(ValueError, match=message):
        trainer(FilterPruningCallback(**arguments)).fit(module, data())
    assert not module.losses
    assert all(torch.equal(a, b) for a, b in zip(before.values(), module.state_dict().values(), strict=True))
    assert not any(m._forward_hooks for m in module.modules())


def test_a_missing_example_input_raises_with_advice():
    class Strings(Blobs):
        def training_step(self, batch: Any, index: int) -> Tensor:
            raise AssertionError("too late")

    with pytest.raises(ValueError, match="set example_input_array"):
        trainer(FilterPruningCallback({"macs": 0.5})).fit(Strings(), DataLoader(["a", "b"]))


def test_a_network_without_prunable_units_is_refused():
    class Fixed(Tupled):
        def __init__(self) -> None:
            super().__init__(example=True)
            self.net = nn.Sequential(nn.Flatten(), nn.Linear(144, 4))

    with pytest.raises(ValueError, match="nothing to prune"):
        trainer(FilterPruningCallback({"macs": 0.5})).fit(Fixed(), data())


@pytest.mark.filterwarnings("ignore:Total length of `.*` across ranks is zero")
def test_an_empty_loader_is_an_error():
    with pytest.raises(ValueError, match="no batches"):
        trainer(FilterPruningCallback({"macs": 0.5})).fit(Tupled(), DataLoader([]))


def test_activations_that_are_not_finite_raise_and_leave_the_network_unchanged():
    class Diverged(Tupled):
        def training_step(self, batch: Any, index: int) -> Tensor:
            return super().training_step([batch[0] * float("nan"), batch[1]], index)

    module = Diverged()
    with pytest.raises(ValueError, match=r"activations of 'net.0' were NaN"):
        trainer(FilterPruningCallback({"macs": 0.5})).fit(module, data())
    assert cost(module) == cost(Blobs())
    assert not any(m._forward_hooks for m in module.modules())


def test_a_budget_out_of_reach_is_warned_of_before_and_after_training():
    module = Tupled()
    with pytest.warns(UserWarning, match="budget") as warned:
        trainer(FilterPruningCallback({"macs": 0.3}, limits=Limits(0.5)), epochs=9).fit(module, data())
    messages = [str(warning.message) for warning in warned]
    assert any("the limits may stop pruning above the budget" in message for message in messages)
    assert any(
        re.search(r"not met: macs 0\.\d+ of the dense.*loosen limits", message) for message in messages
    )


@pytest.mark.filterwarnings("ignore:.*not met")
def test_the_status_at_the_end_of_training_can_be_read_afterwards():
    met, unmet = FilterPruningCallback({"macs": 0.5}), FilterPruningCallback({"macs": 0.5})
    assert not met.within_budget
    trainer(met).fit(Tupled(), data())
    trainer(unmet, epochs=2).fit(Tupled(), data())
    assert (met.within_budget, met.finished) == (True, True)
    assert (unmet.within_budget, unmet.finished) == (False, False)
