"""Tests that a Pruner in a plain loop prunes as the Lightning callback does, resumes exactly, and refuses misuse."""

from __future__ import annotations

import copy
import gc
import io
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, Adam, Optimizer
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import (
    L2,
    DepthSettings,
    FilterPruningCallback,
    Linear,
    Pruner,
    PruningRecord,
    load_pruned,
    save_pruned,
)
from lightning_prune.criteria import TaylorGate, TaylorWeight

EPOCHS = 5


class Branches(nn.Module):
    """Two layers with norms in a residual block, and a strided layer behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.inner, self.inner_norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.down, self.head = nn.Conv2d(8, 12, 3, stride=2), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = x + self.inner_norm(self.inner(x)).relu()
        return self.head(self.down(x).relu().mean((2, 3)))


def network() -> Branches:
    torch.manual_seed(0)
    return Branches()


def data() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(32, 1, 8, 8, generator=generator)
    labels = (images.mean((1, 2, 3)) * 60).long() % 3
    return DataLoader(TensorDataset(images, labels), 8)


EXAMPLE = torch.zeros(1, 1, 8, 8)


def train(
    net: nn.Module,
    optimizer: Optimizer,
    pruner: Pruner,
    epochs: range = range(EPOCHS),
    by_steps: bool = False,
    after: Callable[[int], Any] = lambda epoch: None,
) -> list[float]:
    losses, loader = [], data()
    for epoch in epochs:
        net.train()
        for number, (images, labels) in enumerate(loader):
            with pruner.observe():
                loss = cross_entropy(net(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            if by_steps:
                pruner.step(optimizer, epoch * len(loader) + number + 1)
        if not by_steps:
            pruner.step(optimizer, epoch)
        after(epoch)
    return losses


class Trained(L.LightningModule):
    """The same training under Lightning."""

    def __init__(self, make_optimizer: Callable[[Any], Optimizer]) -> None:
        super().__init__()
        self.net, self.make_optimizer, self.losses = network(), make_optimizer, list[float]()

    def training_step(self, batch: Any, index: int) -> Tensor:
        loss = cross_entropy(self.net(batch[0]), batch[1])
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Optimizer:
        return self.make_optimizer(self.net.parameters())


def under_lightning(make_optimizer: Callable[[Any], Optimizer], **arguments: Any) -> tuple[Trained, Any]:
    module = Trained(make_optimizer)
    callback = FilterPruningCallback({"macs": 0.5}, submodule="net", verbose=False, **arguments)
    trainer = L.Trainer(
        max_epochs=EPOCHS,
        callbacks=[callback],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data())
    return module, callback


def equal(one: nn.Module, other: nn.Module) -> bool:
    left, right = one.state_dict(), other.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def adam(parameters: Any) -> Optimizer:
    return Adam(parameters, 1e-2)


def momentum(parameters: Any) -> Optimizer:
    return SGD(parameters, 0.05, momentum=0.9)


@pytest.mark.filterwarnings("ignore:.*(many workers|GPU available)")
@pytest.mark.parametrize(
    ("make_optimizer", "arguments"),
    [
        (adam, {}),
        (momentum, {"criterion": TaylorGate(), "amount": {"macs": 0.25}}),
        (momentum, {"criterion": TaylorWeight(), "every_n_steps": 3, "schedule": Linear(3)}),
        (adam, {"criterion": L2(), "statistics": "pass", "start_epoch": 0}),
        (adam, {"statistics": "pass", "compensate": False, "recalibrate_batches": 2}),
        (adam, {"criterion": L2(), "depth": DepthSettings(max_depth_ratio=1, images=16)}),
    ],
    ids=["default", "gradients", "steps", "weights", "pass", "depth"],
)
def test_a_plain_loop_gives_the_bits_of_the_lightning_callback(
    make_optimizer: Callable[[Any], Optimizer], arguments: dict[str, Any]
) -> None:
    module, callback = under_lightning(make_optimizer, **arguments)
    net = network()
    optimizer = make_optimizer(net.parameters())
    pruner = Pruner(net, EXAMPLE, {"macs": 0.5}, batches=data(), verbose=False, **arguments)
    losses = train(net, optimizer, pruner, by_steps="every_n_steps" in arguments)
    assert pruner.record is not None
    assert pruner.record.to_dict() == callback.record.to_dict()
    assert losses == module.losses
    assert equal(net, module.net)
    assert pruner.finished == callback.finished
    assert [cut.after for cut in pruner.history] == [cut.after for cut in callback.history]


@pytest.mark.parametrize("by_steps", [False, True])
@pytest.mark.parametrize("criterion", [None, TaylorGate()])
def test_a_resumed_training_gives_the_same_bits(by_steps: bool, criterion: Any) -> None:
    timing = {"every_n_steps": 3} if by_steps else {}

    def start() -> tuple[nn.Module, Optimizer, Pruner]:
        net = network()
        pruner = Pruner(
            net, EXAMPLE, {"macs": 0.5}, criterion=criterion, batches=data(), verbose=False, **timing
        )
        return net, adam(net.parameters()), pruner

    net, optimizer, pruner = start()
    saved = io.BytesIO()

    def save(epoch: int) -> None:
        if epoch == 2:
            parts = {"net": net, "optimizer": optimizer, "pruner": pruner}
            torch.save({name: part.state_dict() for name, part in parts.items()}, saved)

    losses = train(net, optimizer, pruner, by_steps=by_steps, after=save)
    saved.seek(0)
    state = torch.load(saved, weights_only=True)
    again, other_optimizer, other = start()
    other.load_state_dict(state["pruner"])
    again.load_state_dict(state["net"])
    other_optimizer.load_state_dict(state["optimizer"])
    continued = train(again, other_optimizer, other, range(3, EPOCHS), by_steps)
    assert continued == losses[-len(continued) :]
    assert equal(again, net)
    assert other.record is not None
    assert pruner.record is not None
    assert other.record.to_dict() == pruner.record.to_dict()
    assert len(other.history) == len(pruner.history)


def test_a_state_gives_a_network_that_was_cut_further_its_former_size() -> None:
    net = network()
    pruner = Pruner(net, EXAMPLE, {"macs": 0.5}, criterion=L2(), verbose=False)
    dense, weights = pruner.state_dict(), {name: x.clone() for name, x in net.state_dict().items()}
    train(net, adam(net.parameters()), pruner)
    assert pruner.finished
    pruner.load_state_dict(dense)
    net.load_state_dict(weights)
    assert equal(net, network())
    assert not pruner.finished
    assert not pruner.history


def test_a_pruned_network_is_saved_loaded_and_pruned_on(tmp_path: Any) -> None:
    net = network()
    path, pruner = (
        tmp_path / "net.safetensors",
        Pruner(net, EXAMPLE, {"macs": 0.7}, criterion=L2(), verbose=False),
    )
    train(net, adam(net.parameters()), pruner)
    save_pruned(net, pruner.record, path)
    loaded = load_pruned(Branches(), path)
    assert equal(loaded, net)
    further = Pruner(loaded, EXAMPLE, {"macs": 0.5}, criterion=L2(), verbose=False)
    assert 0.5 < further.metrics["prune/macs_share"] <= 0.7
    train(loaded, adam(loaded.parameters()), further)
    assert further.metrics["prune/macs_share"] <= 0.5


def test_copies_and_their_optimizer_are_cut_along_and_hooks_get_the_record() -> None:
    net = network()
    average, records = AveragedModel(net), list[PruningRecord]()
    pruner = Pruner(
        net, EXAMPLE, {"macs": 0.5}, criterion=L2(), copies=[average], on_cut=[records.append], verbose=False
    )
    train(net, adam(net.parameters()), pruner, after=lambda epoch: average.update_parameters(net))
    assert len(records) == len(pruner.history) > 1
    whole = records[0]
    for record in records[1:]:
        whole = whole.then(record)
    assert pruner.record is not None
    assert whole.kept == pruner.record.kept
    shapes = {name: tensor.shape for name, tensor in net.state_dict().items()}
    assert {name: tensor.shape for name, tensor in average.module.state_dict().items()} == shapes


def test_a_loop_that_counts_epochs_from_one_is_observed_in_time() -> None:
    net = network()
    pruner = Pruner(net, EXAMPLE, {"macs": 0.5}, verbose=False, compensate=False)
    train(net, adam(net.parameters()), pruner, range(1, EPOCHS + 1))
    assert [cut.epoch for cut in pruner.history] == [1, 2, 3, 4, 5][: len(pruner.history)]


def test_a_batch_that_an_exception_ends_is_forgotten() -> None:
    net = network()
    pruner = Pruner(net, EXAMPLE, {"macs": 0.5}, start_epoch=0, verbose=False, compensate=False)
    images = next(iter(data()))[0]
    with pruner.observe():
        net(images)
    before = pruner.state_dict()["session"]["statistics"]
    with pytest.raises(RuntimeError), pruner.observe():
        net.head(net(images))  # of another width than the layer takes
    after = pruner.state_dict()["session"]["statistics"]
    assert str(before) == str(after)


# -- misuse: a clear error, and nothing changed -------------------------------------------------------------------


def unchanged(net: nn.Module, reference: nn.Module) -> None:
    assert equal(net, reference)
    assert all(a.shape == b.shape for a, b in zip(net.parameters(), reference.parameters(), strict=True))


def stepped(net: nn.Module, *optimizers: Optimizer) -> None:
    for optimizer in optimizers:
        net(next(iter(data()))[0]).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("criterion", [None, TaylorGate()])
def test_a_criterion_with_statistics_needs_observe(criterion: Any) -> None:
    net = network()
    pruner = Pruner(net, EXAMPLE, {"macs": 0.5}, criterion=criterion, start_epoch=0, verbose=False)
    optimizer = adam(net.parameters())
    stepped(net, optimizer)
    reference = copy.deepcopy(net)
    with pytest.raises(ValueError, match=r"needs statistics, and no forward .* pruner\.observe"):
        pruner.step(optimizer, 0)
    unchanged(net, reference)
    with pruner.observe():
        net(next(iter(data()))[0]).sum().backward()
        optimizer.step()
    assert pruner.step(optimizer, 0) is not None  # the same moment again, once it is put right


def test_a_second_call_for_one_step_does_nothing() -> None:
    net = network()
    pruner = Pruner(net, EXAMPLE, {"macs": 0.5}, criterion=L2(), start_epoch=0, verbose=False)
    optimizer = adam(net.parameters())
    assert pruner.step(optimizer, 0) is not None
    reference = copy.deepcopy(net)
    with pytest.warns(UserWarning, match="called twice for 0 epochs"):
        assert pruner.step(optimizer, 0) is None
    unchanged(net, reference)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the warning comes once
        pruner.step(optimizer, 0)


@pytest.mark.parametrize("now", [-1, 1.5, "one", None])
def test_a_moment_is_a_whole_number(now: Any) -> None:
    net = network()
    pruner = Pruner(net, EXAMPLE, {"macs": 0.5}, criterion=L2(), verbose=False)
    with pytest.raises(ValueError, match="whole number from 0"):
        pruner.step(adam(net.parameters()), now)


def test_moments_do_not_go_back() -> None:
    net = network()
    pruner = Pruner(net, EXAMPLE, {"macs": 0.5}, criterion=L2(), start_epoch=9, verbose=False)
    pruner.step(adam(net.parameters()), 5)
    with pytest.raises(ValueError, match="was called for 3 epochs after 5"):
        pruner.step(adam(net.parameters()), 3)


def test_an_optimizer_of_another_network_is_refused() -> None:
    net = network()
    reference, optimizer = copy.deepcopy(net), adam(Branches().parameters())
    pruner = Pruner(net, EXAMPLE, {"macs": 0.5}, criterion=L2(), start_epoch=0, verbose=False)
    with pytest.raises(ValueError, match="Adam holds no parameter of the network"):
        pruner.step(optimizer, 0)
    unchanged(net, reference)
    with pytest.raises(ValueError, match="give the optimizer, or a list"):
        pruner.step(net, 0)  # type: ignore[arg-type]


@pytest.mark.parametrize("given", ["old", "none"])
def test_an_optimizer_that_was_built_behind_our_back_is_seen(given: str) -> None:
    net = network()
    old, new = adam(net.parameters()), momentum(net.parameters())
    pruner = Pruner(net, EXAMPLE, {"macs": 0.5}, criterion=L2(), start_epoch=0, verbose=False)
    stepped(net, new)
    reference = copy.deepcopy(net)
    with pytest.raises(ValueError, match=r"was not given to step\(\) trains the network \(SGD; given: "):
        pruner.step(old if given == "old" else None, 0)
    unchanged(net, reference)
    assert pruner.step([old, new], 0) is not None


def test_a_network_that_was_changed_behind_our_back_is_seen() -> None:
    net = network()
    pruner = Pruner(net, EXAMPLE, {"macs": 0.5}, criterion=L2(), start_epoch=0, verbose=False)
    net.head = nn.Linear(12, 5)
    reference = copy.deepcopy(net)
    with pytest.raises(ValueError, match=r"'head\.weight' had shape \[3, 12\], and is now \[5, 12\]"):
        pruner.step(adam(net.parameters()), 0)
    unchanged(net, reference)


def test_forwards_of_another_module_are_noticed() -> None:
    net = network()
    pruner = Pruner(net, EXAMPLE, {"macs": 0.5}, start_epoch=0, verbose=False)
    with pytest.warns(UserWarning, match="no forward of the network ran"), pruner.observe():
        copy.deepcopy(net)(next(iter(data()))[0])
    with pytest.raises(ValueError, match="needs statistics"):
        pruner.step(adam(net.parameters()), 0)


def test_observe_is_not_entered_within_itself() -> None:
    pruner = Pruner(network(), EXAMPLE, {"macs": 0.5}, verbose=False)
    with pytest.raises(RuntimeError, match="within observe"), pruner.observe(), pruner.observe():
        pass
    with pruner.observe():  # and can be entered again
        pruner.model(EXAMPLE)


def test_networks_on_several_devices_and_wrapped_ones_are_refused() -> None:
    net = network()
    with pytest.raises(ValueError, match=r"model\.module, instead of DataParallel"):
        Pruner(nn.DataParallel(net), EXAMPLE, {"macs": 0.5})
    net.head.to("meta")
    with pytest.raises(ValueError, match=r"on several devices \(cpu, meta\)"):
        Pruner(net, EXAMPLE, {"macs": 0.5})


def test_a_network_that_moves_to_several_devices_is_refused_before_a_cut() -> None:
    net = network()
    pruner = Pruner(net, EXAMPLE, {"macs": 0.5}, criterion=L2(), start_epoch=0, verbose=False)
    optimizer = adam(net.parameters())
    net.head.to("meta")
    with pytest.raises(ValueError, match="on several devices"):
        pruner.step(optimizer, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"compensate": True}, "compensate needs batches"),
        ({"recalibrate_batches": 3}, "recalibrate_batches needs batches"),
        ({"statistics": "pass"}, 'statistics="pass".* needs batches'),
        ({"batches": iter([1])}, "can be read only once"),
        ({"statistics": "all"}, "statistics"),
        ({"budget": {}}, "budget is empty"),
        ({"budget": {"macs": 0.0001}}, "budget"),
        ({"copies": [nn.Linear(1, 1)]}, "copies: a Linear"),
        ({"every_n_epochs": 0}, "every_n_epochs >= 1"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    net = network()
    budget = arguments.pop("budget", {"macs": 0.5})
    with pytest.raises(ValueError, match=message):
        Pruner(net, EXAMPLE, budget, **arguments)
    unchanged(net, network())


def test_states_of_other_networks_are_refused_and_change_nothing() -> None:
    net = network()
    pruner = Pruner(net, EXAMPLE, {"macs": 0.5}, criterion=L2(), start_epoch=0, verbose=False)
    with pytest.raises(ValueError, match="no state of a Pruner"):
        pruner.load_state_dict({"record": None})
    other = nn.Sequential(nn.Conv2d(1, 9, 3), nn.ReLU(), nn.Conv2d(9, 2, 1))
    foreign = Pruner(other, EXAMPLE, {"macs": 0.5}, criterion=L2(), start_epoch=0, verbose=False)
    foreign.step(None, 0)
    with pytest.raises(ValueError, match="that of another network"):
        pruner.load_state_dict(foreign.state_dict())
    unchanged(net, network())
    with pytest.raises(ValueError, match="has version 99"):
        pruner.load_state_dict({**pruner.state_dict(), "version": 99})


def test_a_pruner_leaves_nothing_behind() -> None:
    net = network()
    pruner = Pruner(net, EXAMPLE, {"macs": 0.5}, verbose=False)
    with pruner.observe():
        net(EXAMPLE.expand(2, 1, 8, 8))
    gone = weakref.ref(pruner)
    del pruner
    gc.collect()
    assert gone() is None
    stepped(net, adam(net.parameters()))


def test_a_pruner_shows_what_it_did(capsys: pytest.CaptureFixture[str]) -> None:
    net = network()
    pruner = Pruner(net, EXAMPLE, {"macs": 0.5}, criterion=L2(), every_n_steps=2, amount={"macs": 0.6})
    assert repr(pruner) == "Pruner(budget: macs 50.0%; no cuts yet)"
    pruner.step(adam(net.parameters()), 2)
    assert capsys.readouterr().out.startswith("step 2: cut ")
    assert repr(pruner).startswith("Pruner(budget: macs 50.0%; 1 cut; left: macs ")


def test_residual_blocks_vanish_in_a_loop_of_ones_own() -> None:
    net = network()
    pruner = Pruner(
        net, EXAMPLE, {"macs": 0.5}, criterion=L2(), batches=data(), amount={"macs": 1}, verbose=False,
        depth=DepthSettings(blocks=1, max_depth_ratio=1, images=16),
    )  # fmt: skip
    losses = train(net, adam(net.parameters()), pruner)
    assert pruner.record is not None
    assert set(pruner.record.vanished) == {"inner", "inner_norm"}
    assert pruner.within_budget
    assert losses[-1] < losses[0]
    again = pruner.record.apply_(network())
    again.load_state_dict(net.state_dict())
    assert torch.equal(again.eval()(next(iter(data()))[0]), net.eval()(next(iter(data()))[0]))


def test_blocks_of_a_loop_without_batches_are_refused_at_once() -> None:
    with pytest.raises(ValueError, match="depth needs batches=: a data loader"):
        Pruner(network(), EXAMPLE, {"macs": 0.5}, depth=True)
