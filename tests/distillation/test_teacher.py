"""The teacher: frozen, separate from everything that is trained, its scores, its file, resumed runs, bad input."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from torch import Tensor, nn

from lightning_prune.callbacks.pruning import FilterPruningCallback
from lightning_prune.callbacks.slimming import SlimmingCallback
from lightning_prune.distillation.config import Distillation, Ramp
from lightning_prune.distillation.taps import trace_taps
from lightning_prune.distillation.teacher import Teacher, TeacherError
from lightning_prune.serialization.record import PruningRecord
from lightning_prune.utils.hashing import network_digest
from tests.support.students import (
    ALL_LOSSES,
    QUIET,
    AfterEachBatch,
    PlainModule,
    Student,
    data,
    pruning,
    small_net,
    student,
    trainer,
)

pytestmark = QUIET


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def checkpoints(folder: Path, **kwargs: Any) -> ModelCheckpoint:
    return ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, **kwargs)


# -- a frozen network -----------------------------------------------------------------------------------------


def test_training_does_not_change_the_teacher_and_the_module_does_not_contain_it(tmp_path):
    net = small_net()
    before, mode = network_digest(net), net.training
    module = student(Distillation(net, **ALL_LOSSES, submodule="net"))
    states: list[tuple[bool, bool, int]] = []

    def inspect(trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any) -> None:
        teacher = pl_module.distillation.callback.teacher
        trained = sum(len(group["params"]) for group in trainer.optimizers[0].param_groups)
        states.append((teacher.net.training, any(p.requires_grad for p in teacher.net.parameters()), trained))

    fit = trainer(pruning(), checkpoints(tmp_path), AfterEachBatch(inspect), enable_checkpointing=True)
    fit.fit(module, data())
    assert set(states) == {(False, False, len(list(module.net.parameters())))}
    assert (network_digest(net), net.training) == (before, mode)
    assert network_digest(module.distillation.callback.teacher.net) == before
    saved = torch.load(tmp_path / "epoch=2.ckpt", weights_only=True)
    assert saved["state_dict"].keys() == module.state_dict().keys() == PlainModule().state_dict().keys()
    assert not any(layer._forward_hooks for layer in module.modules())


def test_a_teacher_that_was_changed_raises():
    module = student(Distillation(small_net(), alpha=1.0, submodule="net"))

    def change_teacher(trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any) -> None:
        pl_module.distillation.callback.teacher.net[0].bias.data.add_(1.0)

    with pytest.raises(TeacherError, match="have changed"):
        trainer(AfterEachBatch(change_teacher), epochs=1).fit(module, data())


def test_features_are_freed_after_the_step_and_memory_does_not_grow():
    module = student(Distillation(small_net(), **ALL_LOSSES, submodule="net"))
    features: list[weakref.ref[Tensor]] = []
    module.net[2].register_forward_hook(lambda layer, args, out: features.append(weakref.ref(out)))
    alive: list[int] = []

    def inspect(trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any) -> None:
        if trainer.is_last_batch:
            gc.collect()
            alive.append(sum(issubclass(type(thing), Tensor) for thing in gc.get_objects()))

    trainer(AfterEachBatch(inspect), epochs=4).fit(module, data())
    assert all(reference() is None for reference in features)
    assert alive[-1] == alive[1]


def test_moving_averages_share_the_teacher():
    class Averaging(WeightAveraging):
        def should_update(self, step_idx: Any = None, epoch_idx: Any = None) -> bool:
            return step_idx is not None

    module = student(Distillation(small_net(), **ALL_LOSSES, submodule="net"))
    averaging = Averaging()
    trainer(averaging, epochs=2).fit(module, data())
    assert averaging._average_model.module.distillation is module.distillation
    assert averaging._average_model.state_dict().keys() == {
        "n_averaged", *(f"module.{name}" for name in module.state_dict())
    }  # fmt: skip


def test_the_precision_of_the_teacher_is_its_own():
    image = torch.rand(2, 1, 8, 8)
    net = small_net()
    expected = copy.deepcopy(net).eval()(image)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, _ = Teacher(net).run(((image,), {}))
        assert output.dtype == torch.float32
        torch.testing.assert_close(output, expected)
        assert Teacher(net, "bf16").run(((image,), {}))[0].dtype == torch.bfloat16
    assert Teacher(net).run(((image.bfloat16(),), {}))[0].dtype == torch.float32


# -- its scores -----------------------------------------------------------------------------------------------


class MetricsLogger(L.pytorch.loggers.Logger):
    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict[str, float]] = []

    name, version = "metrics", ""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append(dict(metrics))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass


@pytest.mark.parametrize("submodule", ["net", None])
def test_the_teacher_is_validated_and_its_metric_logged_once_before_training(submodule):
    net = small_net()
    alone = PlainModule(copy.deepcopy(net))
    (expected,) = trainer().validate(alone, data(), verbose=False)
    distillation = Distillation(net if submodule else alone, alpha=1.0, submodule=submodule)
    module, logger = student(distillation), MetricsLogger()
    weights, modes = copy.deepcopy(module.state_dict()), []

    def inspect(trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any) -> None:
        modes.append((trainer.training, pl_module.training, pl_module.net.training))

    module.lr = 0.0
    trainer(AfterEachBatch(inspect), logger=logger, epochs=2).fit(module, data(), data())
    assert set(modes) == {(True, True, True)}
    assert torch.equal(module.net[0].weight, weights["net.0.weight"])
    scores = [row["teacher/loss"] for row in logger.rows if "teacher/loss" in row]
    assert scores == [pytest.approx(expected["val/loss"])]
    assert logger.rows[0].keys() == {"teacher/loss", "epoch"}


def test_a_teacher_that_is_worse_than_its_student_warns_once():
    bad = small_net()
    bad[-1].weight.data.mul_(100)
    module = student(Distillation(bad, alpha=1e-6, submodule="net"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(epochs=3).fit(module, data(), data())
    warned = [
        str(w.message) for w in caught if "teacher is worse than its student: val/loss" in str(w.message)
    ]
    assert len(warned) == 1
    good = PlainModule()
    trainer(epochs=15).fit(good, data(), data())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(epochs=2).fit(student(Distillation(good.net, alpha=1.0, submodule="net")), data(), data())
    assert not [w for w in caught if "worse" in str(w.message)]


# -- its source ------------------------------------------------------------------------------------------------


def test_a_teacher_from_a_lightning_checkpoint(tmp_path):
    dense = PlainModule()
    trainer(checkpoints(tmp_path), epochs=1, enable_checkpointing=True).fit(dense, data())
    for submodule in ("net", None):
        module = student(Distillation(tmp_path / "epoch=0.ckpt", **ALL_LOSSES, submodule=submodule))
        trainer(pruning(submodule), epochs=2).fit(module, data())
        teacher = module.distillation.callback.teacher.net
        loaded = (teacher if submodule else teacher.net).state_dict()
        assert all(torch.equal(loaded[name], value) for name, value in dense.net.state_dict().items())


def test_the_student_is_copied_after_the_last_batch_before_the_first_cut():
    module = student(Distillation("copy", **ALL_LOSSES, submodule="net"))
    before: dict[int, str] = {}

    def inspect(trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any) -> None:
        before[trainer.current_epoch] = network_digest(pl_module.net)

    callback = pruning(start_epoch=1)
    logger = MetricsLogger()
    fit = trainer(callback, AfterEachBatch(inspect), epochs=4, logger=logger, log_every_n_steps=1)
    fit.fit(module, data(), data())
    assert module.distillation.callback.teacher.checksum == before[1]
    assert callback.history[0].epoch == 1
    epochs = [row["epoch"] for row in logger.rows if "distill/hinton" in row]
    assert epochs == [2, 3]  # no distillation before the copy
    scores = [row["val/loss"] for row in logger.rows if row.get("epoch") == 1 and "val/loss" in row]
    assert [row["teacher/loss"] for row in logger.rows if "teacher/loss" in row] == scores[:1]


def test_without_pruning_the_teacher_is_a_copy_of_the_initial_student():
    module = student(Distillation("copy", alpha=1.0, submodule="net"))
    before = network_digest(module.net)
    trainer().fit(module, data())
    assert module.distillation.callback.teacher.checksum == before != network_digest(module.net)


def test_without_a_cut_to_come_distillation_never_starts_and_says_so():
    module = student(Distillation("before_cut", alpha=1.0, submodule="net"))
    plain = PlainModule(copy.deepcopy(module.net))
    with pytest.warns(UserWarning, match="no pruning callback: there is no first cut"):
        trainer().fit(module, data())
    trainer().fit(plain, data())
    assert module.totals == plain.totals


class BeforeCut(L.Callback):
    """Keeps the digest of the network before each cut, the number of cuts and of attempts."""

    def __init__(self) -> None:
        self.digests: list[str] = []
        self.cuts = 0

    def on_before_cut(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.digests.append(network_digest(pl_module.net))

    def on_after_cut(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.cuts += 1


def by_steps() -> L.Callback:
    return FilterPruningCallback({"macs": 0.5}, amount={"macs": 0.3}, every_n_steps=3, optimizer="carry",
                                 submodule="net", verbose=False)  # fmt: skip


def slimming() -> L.Callback:
    return SlimmingCallback({"macs": 0.7}, submodule="net", end_epoch=1, verbose=False)


@pytest.mark.parametrize("callback", [pruning, by_steps, slimming])
@pytest.mark.parametrize("teacher", ["copy", "before_cut"])
def test_the_teacher_is_the_network_just_before_the_first_cut(callback, teacher):
    module = student(Distillation(teacher, cwd=1.0, cwd_features=1.0, lambda_=1.0, submodule="net"))
    watch, cutter = BeforeCut(), callback()
    fit = trainer(cutter, watch, epochs=5)
    fit.fit(module, data())
    distiller = module.distillation.callback
    assert watch.cuts == len(cutter.history) >= 1
    assert distiller.teacher.checksum == watch.digests[0] == network_digest(distiller.teacher.net)
    assert distiller.teacher.net[0].out_channels == 8
    assert "distill/cwd_features" in fit.callback_metrics


@pytest.mark.parametrize("source", ["copy", "before_cut", "module"])
def test_a_resumed_run_has_the_same_teacher_and_the_same_losses(tmp_path, source):
    def built() -> Student:
        torch.manual_seed(len(source))
        teacher = small_net() if source == "module" else source
        return student(Distillation(teacher, **ALL_LOSSES, submodule="net"))

    whole = built()
    trainer(pruning(optimizer="carry"), checkpoints(tmp_path), enable_checkpointing=True, epochs=4).fit(
        whole, data()
    )
    (file,) = tmp_path.glob("teacher-*.pt")  # written once
    before = whole.distillation.callback.teacher.checksum
    again = built()
    again.net[0].weight.data.zero_()  # a copy of this student would be another teacher
    if source == "module":
        again.distillation.teacher = small_net()  # another teacher as well
    resumed = trainer(
        pruning(optimizer="carry"), checkpoints(tmp_path / "late"), enable_checkpointing=True, epochs=4
    )
    resumed.fit(again, data(), ckpt_path=tmp_path / "epoch=1.ckpt")
    assert again.distillation.callback.teacher.checksum == before
    assert again.totals == whole.totals[-4:]
    file.unlink()
    late = built()
    late.distillation.teacher = small_net() if source == "module" else source
    after = trainer(pruning(), checkpoints(tmp_path / "late"), enable_checkpointing=True, epochs=4)
    with pytest.raises(TeacherError, match=r"is missing: put teacher-\w+\.pt beside"):
        after.fit(late, data(), ckpt_path=tmp_path / "epoch=1.ckpt")


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.parametrize("step", [2, 3, 4])  # before the first cut, after it, and after a distilled step
def test_a_run_that_is_resumed_around_a_cut_by_steps_has_the_same_teacher_and_losses(tmp_path, step):
    def built(seed: int) -> Student:
        torch.manual_seed(seed)
        return student(Distillation("before_cut", alpha=1.0, cwd_features=1.0, submodule="net"))

    def run(module: Student, folder: Path, resume: Path | None = None) -> None:
        saving = ModelCheckpoint(folder, filename="{step}", save_top_k=-1, every_n_train_steps=1)
        fit = trainer(by_steps(), saving, enable_checkpointing=True, epochs=4)
        fit.fit(module, data(), data(), ckpt_path=resume)

    whole, again = built(0), built(1)
    run(whole, tmp_path)
    assert len(list(tmp_path.glob("teacher-*.pt"))) == 1
    run(again, tmp_path / "late", tmp_path / f"step={step}.ckpt")
    assert again.totals == whole.totals[step:]
    teachers = [module.distillation.callback.teacher for module in (whole, again)]
    assert teachers[0].checksum == teachers[1].checksum == network_digest(teachers[1].net)


def test_a_run_resumed_from_the_validation_before_the_first_cut_copies_the_same_network(tmp_path):
    """The checkpoint still owes the cut, which the resumed run makes before its first batch."""

    def built(seed: int) -> Student:
        torch.manual_seed(seed)
        return student(Distillation("before_cut", alpha=1.0, submodule="net"))

    def run(module: Student, folder: Path, resume: Path | None = None) -> None:
        saving = checkpoints(folder, save_on_train_epoch_end=False)
        fit = trainer(pruning(optimizer="carry"), saving, enable_checkpointing=True)
        fit.fit(module, data(), data(), ckpt_path=resume)

    whole, again = built(0), built(1)
    run(whole, tmp_path)
    assert not torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)["callbacks"]["DistillationCallback"][
        "started"
    ]
    run(again, tmp_path / "late", tmp_path / "epoch=0.ckpt")
    assert again.totals == whole.totals[2:]
    teachers = [module.distillation.callback.teacher for module in (whole, again)]
    assert teachers[0].checksum == teachers[1].checksum


def test_a_cut_network_without_its_teacher_is_refused(tmp_path):
    """The run before had no distillation."""
    plain = PlainModule()
    trainer(pruning(), checkpoints(tmp_path), enable_checkpointing=True).fit(plain, data())
    module = student(Distillation("before_cut", alpha=1.0, submodule="net"))
    fit = trainer(pruning(), checkpoints(tmp_path / "late"), enable_checkpointing=True, epochs=4)
    with pytest.raises(TeacherError, match="was cut before without a teacher: give the checkpoint"):
        fit.fit(module, data(), ckpt_path=tmp_path / "epoch=1.ckpt")
    assert module.totals == []


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"standardised": 1.0}, "at least three classes"),
        ({"alpha": 1.0, "kind": "multiclass"}, "softmax of one class is always 1"),
        ({"dist": 1.0, "kind": "multiclass"}, "softmax of one class is always 1"),
    ],
)
def test_losses_without_a_meaning_for_one_channel_are_refused_before_the_first_step(kwargs, match):
    module = Student(small_net(classes=1))
    module.distillation = Distillation(small_net(classes=1), submodule="net", **kwargs)
    with pytest.raises(ValueError, match=match):
        trainer(epochs=1).fit(module, data())
    assert module.totals == []


def test_a_checkpoint_with_the_former_name_of_the_callback_restores_its_state(tmp_path):
    def built(seed: int) -> Student:
        torch.manual_seed(seed)
        return student(Distillation("copy", **ALL_LOSSES, submodule="net"))

    whole = built(0)
    trainer(pruning(), checkpoints(tmp_path), enable_checkpointing=True).fit(whole, data(), data())
    checkpoint = torch.load(tmp_path / "epoch=1.ckpt", weights_only=True)
    checkpoint["callbacks"]["Teaching"] = checkpoint["callbacks"].pop("DistillationCallback")
    torch.save(checkpoint, tmp_path / "old.ckpt")
    resumed, saved = built(1), checkpoint["callbacks"]["Teaching"]
    fit = trainer(pruning(), checkpoints(tmp_path / "late"), enable_checkpointing=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*callbacks used to create the checkpoint.*")
        fit.fit(resumed, data(), data(), ckpt_path=tmp_path / "old.ckpt")
    callback = resumed.distillation.callback
    assert saved["started"]
    assert callback.started
    assert callback.scores.values == saved["scores"] != {}
    assert callback.teacher.checksum == saved["checksum"] == whole.distillation.callback.teacher.checksum
    assert resumed.totals == whole.totals[-2:]
    assert (
        "DistillationCallback" in torch.load(tmp_path / "late/epoch=2.ckpt", weights_only=True)["callbacks"]
    )


# -- another architecture -------------------------------------------------------------------------------------


def test_projections_to_another_architecture_with_pruning_and_after_a_resume(tmp_path):
    def built() -> Student:
        torch.manual_seed(1)
        return student(Distillation(small_net(width=6), **ALL_LOSSES, taps=["2", "6"], submodule="net"))

    module = built()
    start: list[Tensor] = []

    def inspect(trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any) -> None:
        start.append(pl_module.distillation_projections.tap0.detach().clone())

    fit = trainer(
        pruning(), AfterEachBatch(inspect), checkpoints(tmp_path), epochs=4, enable_checkpointing=True
    )
    fit.fit(module, data())
    assert not torch.equal(start[0], start[-1])  # the projection is trained
    assert start[-1].shape == (6, 8)  # and keeps the width of the dense student
    assert sum(module.net[tap].out_channels for tap in (0, 4)) < 8 + 16
    assert module.state_dict().keys() == PlainModule().state_dict().keys()
    assert [pair.student.name for pair in module.distillation.callback._distiller.pairs] == ["2", "6"]
    again = built()
    late = trainer(pruning(), checkpoints(tmp_path / "late"), epochs=4, enable_checkpointing=True)
    late.fit(again, data(), ckpt_path=tmp_path / "epoch=1.ckpt")
    assert again.totals == module.totals[-4:]


def test_a_teacher_of_another_architecture_is_tapped_at_its_own_stages():
    teacher = nn.Sequential(nn.Conv2d(1, 5, 3, padding=1), nn.ReLU(), *list(small_net())[3:])
    teacher[3] = nn.Conv2d(5, 16, 3, padding=1)
    names = trace_taps(teacher, ((torch.zeros(1, 1, 8, 8),), {})).stages()
    module = student(Distillation(teacher, beta=1.0, submodule="net"))
    trainer(pruning()).fit(module, data())
    assert [pair.teacher.name for pair in module.distillation.callback._distiller.pairs] == names


def test_a_student_that_was_pruned_before_is_compared_by_its_record():
    teacher = small_net()
    kept = [1, 3, 5]
    cut = {f"0.{name}": {0: kept} for name in ("weight", "bias")} | {"4.weight": {1: kept}}
    cut |= {f"1.{name}": {0: kept} for name in ("weight", "bias", "running_mean", "running_var")}
    shapes = {name: list(teacher.state_dict()[name].shape) for name in cut}
    record = PruningRecord(cut, shapes, {"0.out_channels": 3, "1.num_features": 3, "4.in_channels": 3})
    small = record.apply_(copy.deepcopy(teacher))
    module = Student(small)
    module.distillation = Distillation(teacher, lambda_=1.0, submodule="net", record=record)
    trainer(epochs=1).fit(module, data())
    assert module.distillation.callback._projections is None
    assert len(module.distillation.callback._distiller.kept[0]) == 3


# -- bad input, refused before the first step--------------------------------------------------------------------


def assert_refused(
    distillation: Distillation, match: str, error: type[Exception] = ValueError, **kwargs: Any
) -> None:
    module = student(distillation, **kwargs)
    before = network_digest(module.net)
    with pytest.raises(error, match=match):
        trainer(epochs=1).fit(module, data())
    assert module.totals == []
    assert network_digest(module.net) == before


@pytest.mark.parametrize("example", [True, False])
def test_bad_taps_and_teachers_are_refused_before_the_first_step(example):
    net = small_net()
    cases = [
        ({"beta": 1.0, "taps": ["2", "66"]}, net, r"no module '66' to tap; did you mean '6'"),
        (
            {"alpha": 1.0},
            small_net(classes=4),
            r"student's logits are \(n, 3, 8, 8\), the teacher's \(n, 4, 8, 8\)",
        ),
        ({"beta": 1.0, "taps": ["2"], "teacher_taps": ["2", "6"]}, net, "need as many taps"),
    ]
    for arguments, teacher, match in cases:
        assert_refused(Distillation(teacher, submodule="net", **arguments), match, example=example)


def test_taps_that_cannot_be_pooled_to_each_other_raise():
    net = nn.Sequential(*list(small_net())[:7], nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3))
    module = Student(net)
    module.distillation = Distillation(copy.deepcopy(net), lambda_=1.0, taps=["2", "8"], submodule="net")
    with pytest.raises(ValueError, match=r"outputs of '8' .* cannot be pooled to each other"):
        trainer(epochs=1).fit(module, data())


def test_a_teacher_in_the_optimizer_or_the_module_raises():
    teacher = small_net()

    class OwnsTeacher(Student):
        def __init__(self) -> None:
            super().__init__()
            self.teacher = teacher

    module = OwnsTeacher()
    module.distillation = Distillation(teacher, alpha=1.0, submodule="net")
    with pytest.raises(TeacherError, match="keep the teacher out of the module"):
        trainer(epochs=1).fit(module, data())

    class Optimized(Student):
        def configure_optimizers(self) -> Any:
            return torch.optim.Adam([*self.parameters(), *teacher.parameters()], 1e-2)

    other = Optimized()
    other.distillation = Distillation(teacher, alpha=1.0, submodule="net")
    with pytest.raises(TeacherError, match="in the optimizer"):
        trainer(epochs=1).fit(other, data())
    assert module.totals == other.totals == []


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"temperature": 0.0}, "temperature must be above 0, got 0"),
        ({"temperature": -1.0}, "temperature must be above 0"),
        ({"alpha": -0.1}, "alpha must not be negative, got -0.1"),
        ({"beta": -1.0}, "beta must not be negative"),
        ({"lambda_": float("nan")}, "lambda_ must not be negative"),
        ({"alpha_task": -1.0}, "alpha_task must not be negative"),
        ({"alpha": Ramp(1.0, -1.0)}, "alpha must not be negative, got -1"),
        ({"kind": "softmax"}, "kind must be"),
        ({"cwd": -1.0}, "cwd must not be negative"),
        ({"kind": "multilabel", "standardised": 1.0}, "standardised needs classes that exclude each other"),
        ({"precision": "8"}, "precision must be"),
    ],
)
def test_arguments_out_of_range_raise(arguments, match):
    with pytest.raises(ValueError, match=match):
        Distillation("copy", **arguments)


def test_other_mistakes_raise(tmp_path):
    assert_refused(
        Distillation(tmp_path / "none.ckpt", alpha=1.0, submodule="net"), "no teacher at", FileNotFoundError
    )
    assert_refused(Distillation(small_net(), alpha=1.0, submodule="nett"), "did you mean 'net'")
    torch.save(
        {"state_dict": small_net().state_dict(), "record": {"kept": {"0.weight": {}}}}, tmp_path / "small.pt"
    )
    assert_refused(Distillation(tmp_path / "small.pt", alpha=1.0, submodule="net"), "holds a pruned network")
    torch.save({"state_dict": small_net(width=4).state_dict()}, tmp_path / "other.pt")
    assert_refused(Distillation(tmp_path / "other.pt", alpha=1.0, submodule="net"), "does not fit Sequential")
    assert_refused(
        Distillation(small_net(width=6), lambda_=1.0, submodule="net"),
        "set example_input_array", TeacherError, example=False,
    )  # fmt: skip
    module = student(Distillation(small_net(), alpha=1.0, submodule="net"))
    module.automatic_optimization = False
    with pytest.raises(NotImplementedError, match="automatic optimization"):
        trainer(epochs=1).fit(module, data())
