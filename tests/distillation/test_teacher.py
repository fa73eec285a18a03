"""The teacher: frozen, apart from everything that is trained, and there again after a resume."""

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

from lightning_prune.distillation.config import Distillation, Ramp
from lightning_prune.distillation.taps import trace_taps
from lightning_prune.distillation.teacher import Teacher, TeacherError
from lightning_prune.serialization.record import PruningRecord
from lightning_prune.utils.hashing import network_digest
from tests.support.students import (
    ALL,
    QUIET,
    Bare,
    Student,
    Watch,
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


def kept(folder: Path, **kwargs: Any) -> ModelCheckpoint:
    return ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, **kwargs)


# -- what it is -----------------------------------------------------------------------------------------------


def test_nothing_touches_it_and_it_is_part_of_nothing(tmp_path):
    net = small_net()
    before, mode = network_digest(net), net.training
    module = student(Distillation(net, **ALL, submodule="net"))
    seen: list[tuple[bool, bool, int]] = []

    def look(trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any) -> None:
        teacher = pl_module.distillation.callback.teacher
        held = sum(len(group["params"]) for group in trainer.optimizers[0].param_groups)
        seen.append((teacher.net.training, any(p.requires_grad for p in teacher.net.parameters()), held))

    fit = trainer(pruning(), kept(tmp_path), Watch(look), enable_checkpointing=True)
    fit.fit(module, data())
    assert set(seen) == {(False, False, len(list(module.net.parameters())))}
    assert (network_digest(net), net.training) == (before, mode)
    assert network_digest(module.distillation.callback.teacher.net) == before
    saved = torch.load(tmp_path / "epoch=2.ckpt", weights_only=True)
    assert saved["state_dict"].keys() == module.state_dict().keys() == Bare().state_dict().keys()
    assert not any(layer._forward_hooks for layer in module.modules())


def test_a_teacher_that_was_changed_is_found_out():
    module = student(Distillation(small_net(), alpha=1.0, submodule="net"))

    def meddle(trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any) -> None:
        pl_module.distillation.callback.teacher.net[0].bias.data.add_(1.0)

    with pytest.raises(TeacherError, match="have changed"):
        trainer(Watch(meddle), epochs=1).fit(module, data())


def test_no_features_outlive_the_step_and_no_memory_grows():
    module = student(Distillation(small_net(), **ALL, submodule="net"))
    heard: list[weakref.ref[Tensor]] = []
    module.net[2].register_forward_hook(lambda layer, args, out: heard.append(weakref.ref(out)))
    alive: list[int] = []

    def look(trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any) -> None:
        if trainer.is_last_batch:
            gc.collect()
            alive.append(sum(issubclass(type(thing), Tensor) for thing in gc.get_objects()))

    trainer(Watch(look), epochs=4).fit(module, data())
    assert all(reference() is None for reference in heard)
    assert alive[-1] == alive[1]


def test_moving_averages_share_it():
    class Averaging(WeightAveraging):
        def should_update(self, step_idx: Any = None, epoch_idx: Any = None) -> bool:
            return step_idx is not None

    module = student(Distillation(small_net(), **ALL, submodule="net"))
    averaging = Averaging()
    trainer(averaging, epochs=2).fit(module, data())
    assert averaging._average_model.module.distillation is module.distillation
    assert averaging._average_model.state_dict().keys() == {
        "n_averaged", *(f"module.{name}" for name in module.state_dict())
    }  # fmt: skip


def test_its_own_precision():
    image = torch.rand(2, 1, 8, 8)
    net = small_net()
    expected = copy.deepcopy(net).eval()(image)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, _ = Teacher(net).run(((image,), {}))
        assert output.dtype == torch.float32
        torch.testing.assert_close(output, expected)
        assert Teacher(net, "bf16").run(((image,), {}))[0].dtype == torch.bfloat16
    assert Teacher(net).run(((image.bfloat16(),), {}))[0].dtype == torch.float32


# -- how good it is -------------------------------------------------------------------------------------------


class Noted(L.pytorch.loggers.Logger):
    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict[str, float]] = []

    name, version = "noted", ""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append(dict(metrics))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass


@pytest.mark.parametrize("submodule", ["net", None])
def test_its_metric_is_that_of_a_validation_of_its_own_logged_once_before_training(submodule):
    net = small_net()
    alone = Bare(copy.deepcopy(net))
    (expected,) = trainer().validate(alone, data(), verbose=False)
    told = Distillation(net if submodule else alone, alpha=1.0, submodule=submodule)
    module, noted = student(told), Noted()
    weights, modes = copy.deepcopy(module.state_dict()), []

    def look(trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any) -> None:
        modes.append((trainer.training, pl_module.training, pl_module.net.training))

    module.lr = 0.0
    trainer(Watch(look), logger=noted, epochs=2).fit(module, data(), data())
    assert set(modes) == {(True, True, True)}
    assert torch.equal(module.net[0].weight, weights["net.0.weight"])
    found = [row["teacher/loss"] for row in noted.rows if "teacher/loss" in row]
    assert found == [pytest.approx(expected["val/loss"])]
    assert noted.rows[0].keys() == {"teacher/loss", "epoch"}


def test_a_teacher_that_is_worse_than_its_student_is_reported_once():
    bad = small_net()
    bad[-1].weight.data.mul_(100)
    module = student(Distillation(bad, alpha=1e-6, submodule="net"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(epochs=3).fit(module, data(), data())
    told = [str(w.message) for w in caught if "teacher is worse than its student: val/loss" in str(w.message)]
    assert len(told) == 1
    good = Bare()
    trainer(epochs=15).fit(good, data(), data())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(epochs=2).fit(student(Distillation(good.net, alpha=1.0, submodule="net")), data(), data())
    assert not [w for w in caught if "worse" in str(w.message)]


# -- where it comes from --------------------------------------------------------------------------------------


def test_from_a_checkpoint_of_lightning(tmp_path):
    dense = Bare()
    trainer(kept(tmp_path), epochs=1, enable_checkpointing=True).fit(dense, data())
    for submodule in ("net", None):
        module = student(Distillation(tmp_path / "epoch=0.ckpt", **ALL, submodule=submodule))
        trainer(pruning(submodule), epochs=2).fit(module, data())
        inside = module.distillation.callback.teacher.net
        found = (inside if submodule else inside.net).state_dict()
        assert all(torch.equal(found[name], value) for name, value in dense.net.state_dict().items())


def test_a_copy_is_taken_after_the_last_batch_before_the_first_cut():
    module = student(Distillation("copy", **ALL, submodule="net"))
    before: dict[int, str] = {}

    def look(trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any) -> None:
        before[trainer.current_epoch] = network_digest(pl_module.net)

    callback = pruning(start_epoch=1)
    noted = Noted()
    trainer(callback, Watch(look), epochs=4, logger=noted, log_every_n_steps=1).fit(module, data(), data())
    assert module.distillation.callback.teacher.checksum == before[1]
    assert callback.history[0].epoch == 1
    epochs = [row["epoch"] for row in noted.rows if "distill/hinton" in row]
    assert epochs == [2, 3]  # it cannot teach before it is taken
    scores = [row["val/loss"] for row in noted.rows if row.get("epoch") == 1 and "val/loss" in row]
    assert [row["teacher/loss"] for row in noted.rows if "teacher/loss" in row] == scores[:1]


def test_without_pruning_the_copy_is_the_student_as_it_comes():
    module = student(Distillation("copy", alpha=1.0, submodule="net"))
    before = network_digest(module.net)
    trainer().fit(module, data())
    assert module.distillation.callback.teacher.checksum == before != network_digest(module.net)


@pytest.mark.parametrize("source", ["copy", "module"])
def test_a_resumed_run_has_the_same_teacher_and_ends_the_same(tmp_path, source):
    def built() -> Student:
        torch.manual_seed(len(source))
        teacher = "copy" if source == "copy" else small_net()
        return student(Distillation(teacher, **ALL, submodule="net"))

    whole = built()
    trainer(pruning(optimizer="carry"), kept(tmp_path), enable_checkpointing=True, epochs=4).fit(
        whole, data()
    )
    (file,) = tmp_path.glob("teacher-*.pt")  # written once
    before = whole.distillation.callback.teacher.checksum
    again = built()
    again.net[0].weight.data.zero_()  # a copy of this one would be another teacher
    if source == "module":
        again.distillation.teacher = small_net()  # so is this one
    resumed = trainer(
        pruning(optimizer="carry"), kept(tmp_path / "late"), enable_checkpointing=True, epochs=4
    )
    resumed.fit(again, data(), ckpt_path=tmp_path / "epoch=1.ckpt")
    assert again.distillation.callback.teacher.checksum == before
    assert again.totals == whole.totals[-4:]
    file.unlink()
    late = built()
    late.distillation.teacher = small_net() if source == "module" else "copy"
    after = trainer(pruning(), kept(tmp_path / "late"), enable_checkpointing=True, epochs=4)
    with pytest.raises(TeacherError, match=r"is missing: put teacher-\w+\.pt beside"):
        after.fit(late, data(), ckpt_path=tmp_path / "epoch=1.ckpt")


# -- another architecture -------------------------------------------------------------------------------------


def test_another_architecture_is_projected_to_through_cuts_and_after_a_resume(tmp_path):
    def built() -> Student:
        torch.manual_seed(1)
        told = Distillation(small_net(width=6), **ALL, taps=["2", "6"], submodule="net")
        return student(told)

    module = built()
    start: list[Tensor] = []

    def look(trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any) -> None:
        start.append(pl_module.distillation_projections.tap0.detach().clone())

    fit = trainer(pruning(), Watch(look), kept(tmp_path), epochs=4, enable_checkpointing=True)
    fit.fit(module, data())
    assert not torch.equal(start[0], start[-1])  # it trains with the student
    assert start[-1].shape == (6, 8)  # and follows the record, not the cut
    assert sum(module.net[tap].out_channels for tap in (0, 4)) < 8 + 16
    assert module.state_dict().keys() == Bare().state_dict().keys()
    assert [pair.student.name for pair in module.distillation.callback._distiller.pairs] == ["2", "6"]
    again = built()
    late = trainer(pruning(), kept(tmp_path / "late"), epochs=4, enable_checkpointing=True)
    late.fit(again, data(), ckpt_path=tmp_path / "epoch=1.ckpt")
    assert again.totals == module.totals[-4:]


def test_a_teacher_of_another_architecture_has_stages_of_its_own():
    teacher = nn.Sequential(nn.Conv2d(1, 5, 3, padding=1), nn.ReLU(), *list(small_net())[3:])
    teacher[3] = nn.Conv2d(5, 16, 3, padding=1)
    names = trace_taps(teacher, ((torch.zeros(1, 1, 8, 8),), {})).stages()
    module = student(Distillation(teacher, beta=1.0, submodule="net"))
    trainer(pruning()).fit(module, data())
    assert [pair.teacher.name for pair in module.distillation.callback._distiller.pairs] == names


def test_a_student_that_was_pruned_before_needs_its_record():
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


# -- bad input, all before the first step ---------------------------------------------------------------------


def refused(told: Distillation, match: str, error: type[Exception] = ValueError, **kwargs: Any) -> None:
    module = student(told, **kwargs)
    before = network_digest(module.net)
    with pytest.raises(error, match=match):
        trainer(epochs=1).fit(module, data())
    assert module.totals == []
    assert network_digest(module.net) == before


@pytest.mark.parametrize("example", [True, False])
def test_bad_taps_and_teachers_are_refused_before_the_first_step(example):
    net = small_net()
    known = {"submodule": "net", "example": example}

    def told(teacher: Any, example: bool, **kwargs: Any) -> tuple[Distillation, dict[str, bool]]:
        return Distillation(teacher, **kwargs), {"example": example}

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
        distillation, more = told(teacher, **known, **arguments)
        refused(distillation, match, **more)


def test_taps_that_cannot_be_pooled_to_each_other():
    net = nn.Sequential(*list(small_net())[:7], nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3))
    module = Student(net)
    module.distillation = Distillation(copy.deepcopy(net), lambda_=1.0, taps=["2", "8"], submodule="net")
    with pytest.raises(ValueError, match=r"outputs of '8' .* cannot be pooled to each other"):
        trainer(epochs=1).fit(module, data())


def test_a_teacher_in_the_optimizer_or_the_module():
    teacher = small_net()

    class Held(Student):
        def __init__(self) -> None:
            super().__init__()
            self.teacher = teacher

    module = Held()
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
        ({"precision": "8"}, "precision must be"),
    ],
)
def test_numbers_out_of_range(arguments, match):
    with pytest.raises(ValueError, match=match):
        Distillation("copy", **arguments)


def test_other_mistakes_are_told(tmp_path):
    refused(
        Distillation(tmp_path / "none.ckpt", alpha=1.0, submodule="net"), "no teacher at", FileNotFoundError
    )
    refused(Distillation(small_net(), alpha=1.0, submodule="nett"), "did you mean 'net'")
    torch.save(
        {"state_dict": small_net().state_dict(), "record": {"kept": {"0.weight": {}}}}, tmp_path / "small.pt"
    )
    refused(Distillation(tmp_path / "small.pt", alpha=1.0, submodule="net"), "holds a pruned network")
    torch.save({"state_dict": small_net(width=4).state_dict()}, tmp_path / "other.pt")
    refused(Distillation(tmp_path / "other.pt", alpha=1.0, submodule="net"), "does not fit Sequential")
    refused(
        Distillation(small_net(width=6), lambda_=1.0, submodule="net"),
        "set example_input_array", TeacherError, example=False,
    )  # fmt: skip
    module = student(Distillation(small_net(), alpha=1.0, submodule="net"))
    module.automatic_optimization = False
    with pytest.raises(NotImplementedError, match="automatic optimization"):
        trainer(epochs=1).fit(module, data())
