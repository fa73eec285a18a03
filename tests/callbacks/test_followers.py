"""Tests that copies which a module keeps by hand are cut along or found, and that the hook serves the rest."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import FilterPruningCallback, Limits, PruningRecord, SlimmingCallback, load_pruned
from lightning_prune.criteria import L2

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*(many workers|GPU available|exists and is not empty|not met)"),
    pytest.mark.filterwarnings(
        "ignore:.*(LeafSpec|dirpath has changed|but have no|in eval mode|callbacks used to create)"
    ),
]
COPY = pytest.warns(UserWarning, match="'teacher' has the structure of 'net', which will be pruned")


def small_net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 12, 3),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Conv2d(12, 16, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 3),
    )


class Plain(L.LightningModule):
    """A classifier without a copy."""

    def __init__(self) -> None:
        super().__init__()
        self.net = small_net()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, index: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.net.parameters(), 1e-3)


class Distilled(Plain):
    """Has a frozen copy whose outputs it imitates."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = copy.deepcopy(self.net).requires_grad_(False).eval()

    def training_step(self, batch: Any, index: int) -> Tensor:
        return super().training_step(batch, index) + F.mse_loss(self(batch[0]), self.teacher(batch[0]))


class MeanTeacher(Distilled):
    """Has a copy that follows the network, as in Tarvainen & Valpola (2017)."""

    def on_train_batch_end(self, *args: Any) -> None:
        follow(self.net, self.teacher)


@torch.no_grad()
def follow(net: nn.Module, teacher: nn.Module) -> None:
    for new, average in zip(net.parameters(), teacher.parameters(), strict=True):
        average.lerp_(new, 0.1)


def data(number: int = 64) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(number, 3, 8, 8, generator=generator)
    return DataLoader(TensorDataset(x, torch.arange(number) % 3), batch_size=16)


def pruning(**options: Any) -> FilterPruningCallback:
    given: dict[str, Any] = {
        "amount": {"macs": 0.15},
        "criterion": L2(),
        "optimizer": "carry",
        "submodule": "net",
        "compensate": False,
        "recalibrate_batches": 0,
        "verbose": False,
        "limits": Limits(1.0),
    }
    return FilterPruningCallback({"macs": 0.5}, **{**given, **options})


def fit(module: L.LightningModule, *callbacks: L.Callback, epochs: int = 6, **options: Any) -> None:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(
        max_epochs=epochs,
        callbacks=list(callbacks),
        accelerator="cpu",
        enable_model_summary=False,
        **{**quiet, **{key: value for key, value in options.items() if key != "ckpt_path"}},
    )
    path = options.get("ckpt_path")
    trainer.fit(module, data(), ckpt_path=path, weights_only=True if path else None)


def made(kind: type[L.LightningModule]) -> Any:
    torch.manual_seed(0)
    return kind()


def shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in module.state_dict().items()}


def assert_same(one: nn.Module, other: nn.Module) -> None:
    for (name, a), b in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


class Cuts(L.Callback):
    """Keeps the record of each cut, relative to the network before it."""

    def __init__(self) -> None:
        self.records: dict[int, PruningRecord] = {}

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        def keep(record: PruningRecord) -> None:
            self.records[trainer.current_epoch] = record

        pl_module.net.on_after_prune = keep


def trained_by_hand(records: dict[int, PruningRecord], epochs: int = 6) -> MeanTeacher:
    """Train as Lightning does, and cut network, copy and momenta to the records by plain indexing."""
    module = made(MeanTeacher)
    optimizer = module.configure_optimizers()
    for epoch in range(epochs):
        for index, batch in enumerate(data()):
            optimizer.zero_grad()
            module.training_step(batch, index).backward()
            optimizer.step()
            follow(module.net, module.teacher)
        if epoch in records:
            states = {name: optimizer.state[p] for name, p in module.net.named_parameters()}
            for name, dims in records[epoch].kept.items():
                for dim, kept in dims.items():
                    for net in (module.net, module.teacher):
                        tensor = net.get_parameter(name) if name in states else net.get_buffer(name)
                        tensor.grad, tensor.data = None, tensor.data.index_select(dim, torch.tensor(kept))
                    for key in ("exp_avg", "exp_avg_sq") if name in states else ():
                        states[name][key] = states[name][key].index_select(dim, torch.tensor(kept))
    return module


def test_a_mean_teacher_trains_on_through_three_cuts_as_in_a_run_written_by_hand() -> None:
    module, callback, cuts = made(MeanTeacher), pruning(followers=["teacher"]), Cuts()
    fit(module, callback, cuts)
    assert len(callback.history) >= 3
    assert callback.copies == {"teacher": "net"}
    assert shapes(module.teacher) == shapes(module.net) != shapes(small_net())
    assert module.teacher[0].out_channels == module.net[0].out_channels
    assert_same(module, trained_by_hand(cuts.records))


def test_a_mean_teacher_that_is_not_named_stops_training_before_the_first_cut() -> None:
    module, callback = made(MeanTeacher), pruning()
    with (
        COPY,
        pytest.raises(ValueError, match=r"'teacher' has the structure of 'net' and is updated .*followers"),
    ):
        fit(module, callback)
    assert not callback.history
    assert shapes(module.net) == shapes(small_net())


def test_a_frozen_teacher_is_left_alone_without_a_word() -> None:
    module, callback = made(Distilled), pruning()
    fit(module, callback)  # a warning would be an error here
    assert callback.history
    assert shapes(module.teacher) == shapes(small_net())
    assert_same(module.teacher, made(Distilled).teacher)


def test_an_idle_copy_that_may_follow_later_is_asked_about() -> None:
    module = made(Distilled)
    module.teacher.requires_grad_(True)
    with COPY:
        fit(module, pruning(), epochs=1)


class Peers(Distilled):
    """Trains two networks of the same structure."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher.requires_grad_(True).train()

    def training_step(self, batch: Any, index: int) -> Tensor:
        return super().training_step(batch, index) + F.cross_entropy(self.teacher(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), 1e-3)


def test_a_second_network_that_is_trained_is_left_alone() -> None:
    module, callback = made(Peers), pruning()
    fit(module, callback)  # a warning would be an error here
    assert callback.history
    assert shapes(module.teacher) == shapes(small_net())


@pytest.mark.parametrize("optimizer", ["reset", "carry"])
def test_a_follower_that_is_trained_continues_with_its_momentum(optimizer: str) -> None:
    module = made(Peers)
    moments: list[dict[str, Tensor]] = []

    class Keep(L.Callback):
        def on_before_cut(self, trainer: L.Trainer, pl_module: Any) -> None:
            state = trainer.optimizers[0].state
            moments.append({n: state[p]["exp_avg"] for n, p in pl_module.teacher.named_parameters()})

        def on_after_cut(self, trainer: L.Trainer, pl_module: Any) -> None:
            state = trainer.optimizers[0].state
            for name, parameter in pl_module.teacher.named_parameters() if optimizer == "carry" else ():
                before = PruningRecord(records[-1].kept, records[-1].shapes).cut_tensors(moments[-1])
                assert torch.equal(state[parameter]["exp_avg"], before[name])

    records: list[PruningRecord] = []
    module.on_after_prune = lambda record: records.append(
        PruningRecord(
            {name.removeprefix("net."): dims for name, dims in record.kept.items()},
            {name.removeprefix("net."): shape for name, shape in record.shapes.items()},
        )
    )
    callback = pruning(followers=["teacher"], optimizer=optimizer)
    fit(module, callback, Keep())
    assert len(records) == len(callback.history) >= 3
    assert shapes(module.teacher) == shapes(module.net)


def test_a_resumed_mean_teacher_ends_with_the_same_bits(tmp_path: Path) -> None:
    def run(folder: Path, resume: Path | None = None, **options: Any) -> MeanTeacher:
        module, keep = made(MeanTeacher), ModelCheckpoint(folder, "{epoch}", save_top_k=-1)
        fit(module, pruning(**options), keep, enable_checkpointing=True, ckpt_path=resume)
        return module

    whole = run(tmp_path, followers=["teacher"])
    for epoch in (0, 2):
        again = run(tmp_path / str(epoch), tmp_path / f"epoch={epoch}.ckpt", followers=["teacher"])
        assert_same(again, whole)
    unnamed = run(tmp_path / "unnamed", tmp_path / "epoch=2.ckpt")  # the checkpoint knows its followers
    assert_same(unnamed, whole)
    assert_same(load_pruned(MeanTeacher(), tmp_path / "epoch=5.ckpt"), whole)
    assert_same(load_pruned(small_net(), tmp_path / "epoch=5.ckpt"), whole.net)


def test_a_follower_within_the_pruned_module_is_cut_and_resumed(tmp_path: Path) -> None:
    def run(resume: Path | None = None) -> MeanTeacher:
        module, keep = made(MeanTeacher), ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
        callback = pruning(submodule=None, followers=["teacher"])
        fit(module, callback, keep, enable_checkpointing=True, ckpt_path=resume)
        assert callback.copies == {"teacher": "net"}
        return module

    whole = run()
    assert shapes(whole.teacher) == shapes(whole.net) != shapes(small_net())
    assert_same(run(tmp_path / "epoch=2.ckpt"), whole)
    assert_same(load_pruned(MeanTeacher(), tmp_path / "epoch=5.ckpt"), whole)


def test_tensors_that_copy_and_original_share_are_cut_once() -> None:
    module = made(MeanTeacher)
    module.teacher[0] = module.net[0]
    fit(module, pruning(followers=["teacher"]))
    assert module.teacher[0] is module.net[0]
    assert shapes(module.teacher) == shapes(module.net) != shapes(small_net())


def test_an_average_of_the_whole_module_follows_with_its_own_teacher() -> None:
    module, averaging = made(MeanTeacher), EMAWeightAveraging(decay=0.9)
    callback = pruning(followers=["teacher"])
    fit(module, callback, averaging)
    average: Any = averaging._average_model
    assert len(callback.history) >= 3
    assert shapes(average.module.teacher) == shapes(average.module.net) == shapes(module.net)


@pytest.mark.parametrize("resumed", [True, False])
def test_a_checkpoint_with_an_average_in_the_module_loads(tmp_path: Path, resumed: bool) -> None:
    class Averaging(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.average = AveragedModel(self.net)

        def on_train_batch_end(self, *args: Any) -> None:
            self.average.update_parameters(self.net)

    module, keep = made(Averaging), ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    fit(module, pruning(), keep, enable_checkpointing=True)
    again = made(Averaging)
    if resumed:
        fit(again, pruning(), ckpt_path=tmp_path / "epoch=2.ckpt")
    else:
        load_pruned(again, tmp_path / "epoch=5.ckpt")
    assert_same(again, module)


class Anchored(Plain):
    """Is pulled towards earlier weights, as in EWC; the anchors are plain tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.anchors = {name: p.detach().clone() for name, p in self.net.named_parameters()}
        self.records: list[PruningRecord] = []

    def training_step(self, batch: Any, index: int) -> Tensor:
        pull = sum((p - self.anchors[name]).square().sum() for name, p in self.net.named_parameters())
        return super().training_step(batch, index) + pull

    def on_after_prune(self, record: PruningRecord) -> None:
        self.records.append(record)
        self.anchors = record.cut_tensors(self.anchors, prefix="net.")


def test_the_hook_serves_anchors_also_when_training_resumes(tmp_path: Path) -> None:
    module, callback = made(Anchored), pruning()
    keep = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    fit(module, callback, keep, enable_checkpointing=True)
    assert len(module.records) == len(callback.history) >= 3
    dense = made(Anchored).anchors
    assert callback.record is not None
    expected = callback.record.cut_tensors(dense)
    assert all(torch.equal(module.anchors[name], expected[name]) for name in dense)
    again = made(Anchored)
    fit(again, pruning(), ckpt_path=tmp_path / "epoch=2.ckpt")
    assert_same(again, module)


def test_the_hook_of_the_pruned_submodule_gets_its_own_names() -> None:
    module, callback = made(Plain), pruning(amount={"macs": 1})
    records: list[PruningRecord] = []
    module.net.on_after_prune = records.append
    fit(module, callback, epochs=3)
    assert [record.kept for record in records] == [callback.record.kept]  # type: ignore[union-attr]


def test_a_copy_that_is_updated_in_an_error_after_the_cut_is_named_in_a_note() -> None:
    class Rare(Distilled):
        def on_train_epoch_end(self) -> None:
            if self.trainer.current_epoch == 2:
                self.teacher.load_state_dict(self.net.state_dict())

    with pytest.raises(RuntimeError, match="size mismatch") as caught:
        fit(made(Rare), pruning())
    assert any("followers=['teacher']" in note for note in caught.value.__notes__)


def test_a_follower_of_a_part_of_the_network_is_cut() -> None:
    class Byol(Plain):
        def __init__(self) -> None:
            super().__init__()
            net = small_net()
            self.net = nn.Sequential(net[:7], net[7:])
            self.target = copy.deepcopy(self.net[0]).requires_grad_(False)

        def on_train_batch_end(self, *args: Any) -> None:
            follow(self.net[0], self.target)

    module, callback = made(Byol), pruning(followers={"target": "net.0"})
    fit(module, callback)
    assert callback.copies == {"target": "net.0"}
    assert shapes(module.target) == shapes(module.net[0]) != shapes(Byol().target)


def test_followers_are_repaired_by_what_they_gave_themselves() -> None:
    changes = {}
    x = torch.cat([batch for batch, _ in data()])
    for compensate in (False, True):
        module = made(MeanTeacher)
        outputs: list[Tensor] = []

        class Keep(L.Callback):
            @torch.no_grad()
            def on_before_cut(self, trainer: L.Trainer, pl_module: Any, outputs: Any = outputs) -> None:
                outputs.append(copy.deepcopy(pl_module.teacher).eval()(x))

            on_after_cut = on_before_cut

        callback = pruning(
            followers=["teacher"],
            compensate=compensate,
            amount={"macs": 1},
            start_epoch=2,
            recalibrate_batches=0,
        )
        fit(module, callback, Keep(), epochs=3)
        changes[compensate] = (outputs[1] - outputs[0]).square().mean().item()
    assert changes[True] < 0.5 * changes[False]


def test_slimming_folds_shifts_into_followers() -> None:
    module = made(MeanTeacher)
    with torch.no_grad():
        for net in (module.net, module.teacher):
            net[1].weight[:6], net[1].bias[:6] = 1e-5, 2.0
    x = torch.randn(4, 3, 8, 8)
    expected: list[Tensor] = []

    class Keep(L.Callback):
        @torch.no_grad()
        def on_before_cut(self, trainer: L.Trainer, pl_module: Any) -> None:
            expected.append(copy.deepcopy(pl_module.teacher).eval()(x))

        on_after_cut = on_before_cut

    callback = SlimmingCallback(
        submodule="net",
        followers=["teacher"],
        compensate=False,
        recalibrate_batches=0,
        verbose=False,
        threshold=0.05,
    )
    fit(module, callback, Keep(), epochs=2)
    assert module.teacher[0].out_channels == module.net[0].out_channels == 6
    torch.testing.assert_close(expected[1], expected[0], atol=2e-2, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"followers": ["techer"]}, "no submodule 'techer'; did you mean 'teacher'"),
        (
            {"followers": ["head"]},
            "the follower 'head' does not have the structure of any part of the network",
        ),
        (
            {"followers": {"teacher": "net.0"}},
            "the follower 'teacher' does not have the structure of 'net.0'",
        ),
        ({"followers": ["net"]}, "the follower 'net' is a part of the network that is pruned"),
        (
            {"followers": ["block"]},
            r"could be a copy of 'net.8' or of 'net.9': say which, by followers={'block': ",
        ),
    ],
)
def test_followers_that_cannot_follow_are_refused_before_training(options: Any, message: str) -> None:
    class Odd(Distilled):
        def __init__(self) -> None:
            super().__init__()
            block = nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 3))
            self.net.extend([block, copy.deepcopy(block)])
            self.block, self.head = copy.deepcopy(block), nn.Linear(5, 7)
            self.teacher = copy.deepcopy(self.net)
            self.example_input_array = torch.zeros(1, 3, 8, 8)

    module = made(Odd)
    before = shapes(module)
    with pytest.raises(ValueError, match=message):
        fit(module, pruning(**options))
    assert shapes(module) == before


@pytest.mark.parametrize("followers", ["teacher", [1], {"teacher": None}, 3])
def test_followers_must_be_names(followers: Any) -> None:
    with pytest.raises(ValueError, match="followers must be a list of names of modules"):
        pruning(followers=followers)
