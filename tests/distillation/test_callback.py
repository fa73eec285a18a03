"""Distillation in a Lightning Trainer: the computed losses, pruning, precision, compilation."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import lightning as L
import pytest
import segmentation_models_pytorch as smp
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune.distillation.config import Distillation, Ramp
from lightning_prune.distillation.logit_losses import hinton
from lightning_prune.distillation.losses import attention, fsp
from lightning_prune.distillation.mixin import DistillationMixin
from lightning_prune.distillation.taps import record_outputs
from lightning_prune.segmentation.module import SegmentationModule
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


# -- the losses ------------------------------------------------------------------------------------------------


def test_the_total_is_the_weighted_sum_of_the_losses_computed_separately():
    teacher, module = small_net(), PlainModule()
    image, mask = next(iter(data()))
    taps, losses = ["2", "6"], {}
    net = copy.deepcopy(module.net)
    with record_outputs(net, taps) as ours, record_outputs(teacher.eval(), taps) as theirs:
        logits, soft = net(image), teacher(image)
        losses["task"] = F.cross_entropy(logits, mask)
        losses["hinton"] = hinton(logits, soft, 3.0)
        losses["attention"] = sum(attention(ours[tap], theirs[tap]) for tap in taps)
        losses["fsp"] = fsp((ours["2"], ours["6"]), (theirs["2"], theirs["6"]))
    expected = 0.5 * losses["task"] + 2 * losses["hinton"] + 30 * losses["attention"] + 4 * losses["fsp"]
    distilled = Student(module.net)
    distilled.distillation = Distillation(teacher, 2, 30, 4, 0.5, temperature=3.0, taps=taps, submodule="net")
    fit = trainer(epochs=1, limit_train_batches=1)
    fit.fit(distilled, data())
    assert distilled.totals == [pytest.approx(expected.item(), rel=1e-5)]
    logged = {name: fit.callback_metrics[f"distill/{name}"].item() for name in losses}
    assert logged == {name: pytest.approx(value.item(), rel=1e-5) for name, value in losses.items()}
    assert fit.callback_metrics["distill/total"] == pytest.approx(expected.item(), rel=1e-5)


def test_a_module_with_its_own_training_step_that_returns_a_dictionary():
    class OwnStep(DistillationMixin, L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = small_net()

        def training_step(self, batch: Any, index: int) -> Any:
            return {"loss": F.cross_entropy(self.net(batch[0]), batch[1]), "more": 1}

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.0)

    step_outputs = []
    module = OwnStep()
    module.distillation = Distillation(copy.deepcopy(module.net), alpha=1.0, alpha_task=0.0, submodule="net")
    watch = AfterEachBatch(
        lambda trainer, module, outputs: step_outputs.append((float(outputs["loss"]), outputs["more"]))
    )
    # The teacher equals the student, but its batch norms run in eval mode: the loss is not zero.
    trainer(watch, epochs=1).fit(module, data())
    assert all(loss > 0 and more == 1 for loss, more in step_outputs)


def test_the_loss_of_a_student_equal_to_its_teacher_is_zero():
    net = nn.Sequential(*(layer for layer in small_net() if not isinstance(layer, nn.BatchNorm2d)))
    module = Student(net)
    module.distillation = Distillation(copy.deepcopy(net), **ALL_LOSSES, alpha_task=0.0, submodule="net")
    module.lr = 0.0  # Adam makes steps of rounding errors
    trainer(epochs=2).fit(module, data())
    assert max(module.totals) == pytest.approx(0, abs=1e-6)


def test_training_with_the_hinton_loss_alone_halves_the_distance_to_the_teacher():
    def distance() -> float:
        with torch.no_grad():
            logits = module.net.eval()(image)
            module.train()
            return hinton(logits, teacher.eval()(image)).item()

    teacher = small_net()
    image, _ = next(iter(data()))
    module = student(Distillation(teacher, alpha=1.0, alpha_task=0.0, submodule="net"))
    before = distance()
    trainer(epochs=20).fit(module, data())
    assert distance() < 0.5 * before


def test_weights_can_be_functions_of_the_progress_of_training():
    shares: list[float] = []

    def weight(share: float) -> float:
        shares.append(share)
        return 0.0

    module = student(Distillation(small_net(), alpha=weight, alpha_task=Ramp(1, 0), submodule="net"))
    shares.clear()
    fit = trainer(epochs=3)
    fit.fit(module, data())
    assert shares == pytest.approx([n / 6 for n in range(6)])
    logged = fit.callback_metrics  # means of the last epoch, whose weights were 2/6 and 1/6
    low, high = logged["distill/task"] / 6, logged["distill/task"] / 3
    assert low < logged["distill/total"] < high


def test_without_weights_training_is_the_same_as_without_distillation():
    module = student(Distillation("no such file", submodule="net"))
    plain = PlainModule(copy.deepcopy(module.net))
    trainer().fit(module, data())
    trainer().fit(plain, data())
    assert module.totals == plain.totals


# -- with pruning ---------------------------------------------------------------------------------------------


def test_fsp_compares_the_kept_channels_with_the_same_channels_of_the_teacher():
    """Pruning removes only dead filters of a student that equals its teacher: the loss stays zero."""
    teacher = nn.Sequential(*(layer for layer in small_net() if not isinstance(layer, nn.BatchNorm2d)))
    for number in (0, 3):
        convolution = teacher[number]
        dead = torch.arange(0, convolution.out_channels, 2)
        convolution.weight.data[dead], convolution.bias.data[dead] = 0.0, 0.0
    module = Student(copy.deepcopy(teacher))
    module.distillation = Distillation(copy.deepcopy(teacher), lambda_=1.0, alpha_task=0.0, submodule="net")
    callback = pruning(budget={"macs": 0.6}, amount={"macs": 1.0})
    trainer(callback, epochs=3).fit(module, data())
    assert callback.record
    assert module.net[0].out_channels < 8
    assert max(module.totals) == pytest.approx(0, abs=1e-9)


def test_the_record_of_a_callback_that_prunes_the_whole_module():
    """The whole module is pruned, but a submodule is distilled."""
    teacher = small_net()
    module = student(Distillation(teacher, **ALL_LOSSES, submodule="net"))
    callback = pruning(submodule=None)
    trainer(callback).fit(module, data())
    assert callback.history[-1].share["macs"] <= 0.5
    assert len(module.totals) == 6


IMAGES = partial(data, number=8, size=64)


def seg(arch: Any, **kwargs: Any) -> nn.Module:
    return arch("resnet18", encoder_weights=None, in_channels=1, classes=3, **kwargs)


@pytest.mark.parametrize(
    ("build", "taps"),
    [
        (partial(seg, smp.Unet, decoder_channels=(64, 32, 16, 16, 8)), 10),
        (partial(seg, smp.DeepLabV3Plus, decoder_channels=32), 5),
        (partial(seg, smp.FPN, decoder_pyramid_channels=32, decoder_segmentation_channels=32), 5),
    ],
)
def test_segmentation_networks_while_they_are_pruned(build, taps):
    module = SegmentationModule(build(), 3, example_input_shape=(1, 1, 64, 64))
    module.distillation = Distillation(build(), **ALL_LOSSES, submodule="net")
    finite: list[bool] = []
    callback = pruning(amount={"macs": 0.3}, optimizer="carry")
    watch = AfterEachBatch(lambda trainer, module, outputs: finite.append(bool(outputs["loss"].isfinite())))
    trainer(callback, watch, epochs=3).fit(module, IMAGES())
    assert callback.history[-1].share["macs"] <= 0.5
    assert finite == [True] * 3
    assert len(module.distillation.callback._distiller.pairs) == taps


class Classifier(DistillationMixin, L.LightningModule):
    def __init__(self, net: nn.Module, size: int) -> None:
        super().__init__()
        self.net = net
        self.example_input_array = torch.zeros(1, 3, size, size)

    def forward(self, image: Tensor) -> Tensor:
        return self.net(image)

    def training_step(self, batch: Any, index: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), 1e-3)


def vit() -> nn.Module:
    return torchvision.models.VisionTransformer(32, 8, 4, 4, 32, 64, num_classes=5)


@pytest.mark.parametrize(
    ("build", "size"),
    [(partial(torchvision.models.mobilenet_v2, num_classes=5, width_mult=0.25), 64), (vit, 32)],
)
def test_classifiers_while_they_are_pruned(build, size):
    generator = torch.Generator().manual_seed(0)
    images = TensorDataset(torch.rand(8, 3, size, size, generator=generator), torch.arange(8) % 5)
    module = Classifier(build(), size)
    module.distillation = Distillation(build(), **ALL_LOSSES, submodule="net")
    callback = pruning(amount={"macs": 0.3}, budget={"macs": 0.75})
    losses: list[float] = []
    watch = AfterEachBatch(lambda trainer, module, outputs: losses.append(float(outputs["loss"])))
    trainer(callback, watch, epochs=3).fit(module, DataLoader(images, 8))
    assert callback.history[-1].share["macs"] <= 0.75
    assert all(torch.tensor(losses).isfinite())
    assert all(
        pair.student.name == pair.teacher.name for pair in module.distillation.callback._distiller.pairs
    )


# -- with other features----------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_precisions_of_the_trainer(precision):
    module = student(Distillation(small_net(), **ALL_LOSSES, submodule="net"))
    callback = pruning(optimizer="carry")
    trainer(callback, epochs=4, precision=precision).fit(module, data())
    assert callback.history[-1].share["macs"] <= 0.5
    assert all(torch.tensor(module.totals).isfinite())
    teacher = module.distillation.callback.teacher.net
    assert teacher[0].weight.dtype == torch.float32


def totals(compiled: Any = lambda module: module) -> list[float]:
    torch.manual_seed(0)
    module = student(Distillation(small_net(), **ALL_LOSSES, submodule="net"))
    trainer(pruning(statistics="pass", optimizer="carry"), epochs=4).fit(compiled(module), data())
    return module.totals


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo's own
def test_compiled_networks_and_modules_have_the_same_losses():
    def inside(module: Student) -> Student:
        module.net.compile(backend="eager")
        return module

    expected = totals()
    assert totals(inside) == pytest.approx(expected, rel=1e-4)
    assert totals(lambda module: torch.compile(module, backend="eager")) == pytest.approx(expected, rel=1e-4)


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_batch_that_training_step_skips_is_not_distilled():
    class Skipping(Student):
        def training_step(self, batch: Any, index: int) -> Any:
            return None if index else super().training_step(batch, index)

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.totals.append(float(outputs["loss"]) if outputs else 0.0)

    module = Skipping()
    module.distillation = Distillation(small_net(), **ALL_LOSSES, submodule="net")
    trainer(epochs=2).fit(module, data())
    assert [total > 0 for total in module.totals] == [True, False] * 2


def test_the_loss_of_two_forwards_in_one_step_is_their_mean():
    class Views(Student):
        def training_step(self, batch: Any, index: int) -> Any:
            image, mask = batch
            return F.cross_entropy(self(image), mask) + F.cross_entropy(self(image.flip(-1)), mask.flip(-1))

    teacher = small_net()
    module = Views()
    module.net.eval()
    module.distillation = Distillation(teacher, alpha=1.0, alpha_task=0.0, submodule="net")
    image, _ = next(iter(data()))
    with torch.no_grad():
        views = [hinton(small.train()(x), teacher.eval()(x)) for x in (image, image.flip(-1))
                 for small in [copy.deepcopy(module.net)]]  # fmt: skip
    module.train()
    trainer(epochs=1, limit_train_batches=1).fit(module, data())
    assert module.totals == [pytest.approx(torch.stack(views).mean().item(), rel=1e-4)]


def test_a_training_step_that_does_not_call_the_network_raises():
    class CallsOnlyPart(Student):
        def training_step(self, batch: Any, index: int) -> Any:
            return F.cross_entropy(self.net(batch[0]), batch[1])

    module = CallsOnlyPart()
    module.distillation = Distillation(PlainModule(), alpha=1.0)
    with pytest.raises(RuntimeError, match=r"Distillation\(submodule=...\)"):
        trainer(epochs=1).fit(module, data())


def test_hinton_leaves_out_pixels_without_a_class():
    module = student(Distillation(small_net(), alpha=1.0, alpha_task=0.0, submodule="net", ignore_index=1))
    image, mask = next(iter(data()))
    expected = hinton(copy.deepcopy(module.net)(image), module.distillation.teacher.eval()(image), 1.0,
                      "multiclass", mask, 1)  # fmt: skip
    trainer(epochs=1, limit_train_batches=1).fit(module, data())
    assert module.totals == [pytest.approx(expected.item(), rel=1e-5)]
