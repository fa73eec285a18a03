"""Losses of logits for dense prediction, compared with the published equations written in NumPy, and invariances."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_prune.distillation.logit_losses import cwd, dist, hinton, standardised
from lightning_prune.distillation.logits import kind_of

SHAPES = [(5, 4), (2, 4, 3), (2, 4, 3, 5), (2, 3, 2, 3, 2)]
MAPS = SHAPES[1:]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def double(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def softmax(values: np.ndarray) -> np.ndarray:
    powers = np.exp(values - values.max())
    return powers / powers.sum()


def divergence(teacher: np.ndarray, student: np.ndarray) -> float:
    return float((teacher * (np.log(teacher) - np.log(student))).sum())


def rows(logits: Tensor) -> list[np.ndarray]:
    """The logits of each sample and position."""
    array = logits.detach().numpy()
    positions = itertools.product(range(len(array)), *map(range, array.shape[2:]))
    return [array[(n, slice(None), *position)] for n, *position in positions]


def numpy_cwd(student: Tensor, teacher: Tensor, temperature: float) -> float:
    """Equation 4 of arXiv 2011.13256, mean over the batch."""
    n, c = student.shape[:2]
    ours, theirs = (x.detach().numpy().reshape(n, c, -1) / temperature for x in (student, teacher))
    total = sum(divergence(softmax(theirs[i, j]), softmax(ours[i, j])) for i in range(n) for j in range(c))
    return temperature**2 * total / (n * c)


def numpy_standardised(student: Tensor, teacher: Tensor, temperature: float) -> float:
    """Algorithm 1 of arXiv 2403.01427, then the divergence of softmax."""
    ours, theirs = (
        [(row - row.mean()) / row.std() / temperature for row in rows(x)] for x in (student, teacher)
    )
    losses = [divergence(softmax(t), softmax(s)) for s, t in zip(ours, theirs, strict=True)]
    return temperature**2 * float(np.mean(losses))


def numpy_dist(student: Tensor, teacher: Tensor, temperature: float, sigmoid: bool = False) -> float:
    """Equations 7 to 10 of arXiv 2205.10536, with ``numpy.corrcoef``."""

    def probabilities(logits: Tensor) -> np.ndarray:
        scaled = [row / temperature for row in rows(logits)]
        return np.array([1 / (1 + np.exp(-row)) if sigmoid else softmax(row) for row in scaled])

    ours, theirs = probabilities(student), probabilities(teacher)

    def uncorrelated(ours: np.ndarray, theirs: np.ndarray) -> float:
        return float(np.mean([1 - np.corrcoef(s, t)[0, 1] for s, t in zip(ours, theirs, strict=True)]))

    between = uncorrelated(ours, theirs) if ours.shape[1] > 1 else 0.0
    return temperature**2 * (between + uncorrelated(ours.T, theirs.T))


# -- the published equations ---------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", MAPS)
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_cwd_is_the_published_equation(shape, temperature):
    student, teacher = double(*shape), double(*shape)
    assert cwd(student, teacher, temperature).item() == pytest.approx(
        numpy_cwd(student, teacher, temperature)
    )
    assert cwd(student, teacher).item() == pytest.approx(numpy_cwd(student, teacher, 4.0))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_standardised_is_the_published_equation(shape, temperature):
    student, teacher = double(*shape), double(*shape)
    expected = numpy_standardised(student, teacher, temperature)
    assert standardised(student, teacher, temperature).item() == pytest.approx(expected)
    assert standardised(student, teacher).item() == pytest.approx(numpy_standardised(student, teacher, 2.0))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_dist_is_the_published_equation(shape, temperature):
    student, teacher = double(*shape), double(*shape)
    expected = numpy_dist(student, teacher, temperature)
    assert dist(student, teacher, temperature).item() == pytest.approx(expected, abs=1e-4)
    expected = numpy_dist(student, teacher, temperature, sigmoid=True)
    assert dist(student, teacher, temperature, "multilabel").item() == pytest.approx(expected, abs=1e-4)


def test_the_two_parts_of_dist_have_their_own_weights():
    student, teacher = double(6, 4), double(6, 4)
    both = [dist(student, teacher, between=1.0, within=0.0), dist(student, teacher, between=0.0, within=1.0)]
    torch.testing.assert_close(dist(student, teacher, between=2.0, within=3.0), 2 * both[0] + 3 * both[1])


def test_the_temperature_of_hinton_is_1_for_maps_and_4_for_classes():
    for shape in MAPS:
        student, teacher = double(*shape), double(*shape)
        torch.testing.assert_close(hinton(student, teacher), hinton(student, teacher, 1.0))
    student, teacher = double(5, 4), double(5, 4)
    torch.testing.assert_close(hinton(student, teacher), hinton(student, teacher, 4.0))


# -- what the losses do not see ------------------------------------------------------------------------------


def test_cwd_does_not_see_a_constant_of_a_channel():
    student, teacher = double(2, 3, 4, 5), double(2, 3, 4, 5)
    shifted = student + torch.randn(2, 3, 1, 1)
    torch.testing.assert_close(cwd(shifted, teacher), cwd(student, teacher))
    assert cwd(teacher + torch.randn(2, 3, 1, 1), teacher).item() == pytest.approx(0, abs=1e-12)
    assert cwd(2 * teacher, teacher).item() > 0.01


def test_dist_does_not_see_scale_and_shift_of_the_probabilities():
    """Of sigmoids ``y``, the student has ``y / 2 + 1 / 4``."""
    teacher = double(8, 5)
    student = torch.logit(teacher.sigmoid() / 2 + 0.25)
    assert dist(student, teacher, kind="multilabel").item() == pytest.approx(0, abs=1e-5)
    assert hinton(student, teacher, 1.0, "multilabel").item() > 0.01
    other = double(8, 5)
    seen = torch.logit(other.sigmoid() / 2 + 0.25)
    torch.testing.assert_close(
        dist(seen, teacher, kind="multilabel"), dist(other, teacher, kind="multilabel"), rtol=1e-4, atol=0
    )


def test_dist_of_opposite_probabilities_is_its_largest_value():
    teacher = double(8, 5)
    assert dist(-teacher, teacher, kind="multilabel").item() == pytest.approx(4, abs=1e-5)


def test_standardised_does_not_see_scale_and_shift_of_the_logits_of_a_pixel():
    student, teacher = double(2, 4, 3, 5), double(2, 4, 3, 5)
    moved = student * torch.rand(2, 1, 3, 5).add(0.1) + torch.randn(2, 1, 3, 5)
    torch.testing.assert_close(standardised(moved, teacher), standardised(student, teacher))
    assert standardised(7 * teacher - 1, teacher).item() == pytest.approx(0, abs=1e-12)


# -- labels that are left out --------------------------------------------------------------------------------

LOSSES = {
    "hinton": hinton,
    "multilabel": lambda s, t, **kwargs: hinton(s, t, kind="multilabel", **kwargs),
    "standardised": standardised,
    "cwd": cwd,
    "dist": dist,
    "dist of labels": lambda s, t, **kwargs: dist(s, t, kind="multilabel", **kwargs),
}


@pytest.mark.parametrize("name", LOSSES)
def test_ignored_positions_have_no_loss_and_no_gradient(name):
    loss = LOSSES[name]
    student, teacher = double(2, 3, 4, 4), double(2, 3, 4, 4)
    target = torch.zeros(2, 4, 4, dtype=torch.int64)
    target[..., :2] = 255
    value = loss(student, teacher, target=target, ignore_index=255)
    torch.testing.assert_close(value, loss(student[..., 2:], teacher[..., 2:]))
    (gradient,) = torch.autograd.grad(value, student)
    assert gradient[..., :2].abs().max() == 0 < gradient[..., 2:].abs().min()
    empty = loss(student, teacher, target=torch.full_like(target, 255), ignore_index=255)
    assert empty.item() == 0
    assert torch.autograd.grad(empty, student)[0].abs().max() == 0


@pytest.mark.parametrize("name", LOSSES)
def test_a_sample_without_labels_has_no_influence(name):
    loss = LOSSES[name]
    student, teacher = double(3, 4, 2, 5), double(3, 4, 2, 5)
    target = torch.zeros(3, 2, 5, dtype=torch.int64)
    target[1] = -1
    value = loss(student, teacher, target=target, ignore_index=-1)
    torch.testing.assert_close(value, loss(student[[0, 2]], teacher[[0, 2]]))


def test_several_labels_are_left_out_one_by_one():
    student, teacher = double(2, 3, 4), double(2, 3, 4)
    target = torch.zeros(2, 3, 4, dtype=torch.int64)
    target[0, 1], target[1, 2, :2] = 255, 255
    value = cwd(student, teacher, 1.0, target, 255)
    parts = [numpy_cwd(student[i : i + 1, j : j + 1], teacher[i : i + 1, j : j + 1], 1.0)
             for i, j in ((0, 0), (0, 2), (1, 0), (1, 1))]  # fmt: skip
    parts.append(numpy_cwd(student[1:, 2:, 2:], teacher[1:, 2:, 2:], 1.0))
    assert value.item() == pytest.approx(float(np.mean(parts)))


def test_labels_of_other_sizes_raise():
    x = torch.zeros(2, 3, 4, 4)
    for loss in LOSSES.values():
        with pytest.raises(ValueError, match=r"labels \(2, 8, 8\) do not fit logits \(2, 3, 4, 4\)"):
            loss(x, x, target=torch.zeros(2, 8, 8), ignore_index=255)


# -- one channel ---------------------------------------------------------------------------------------------


def test_hinton_of_one_channel_is_a_bernoulli_divergence_and_not_silently_zero():
    """The softmax of one class is 1: as a multiclass problem the loss was 0 whatever the logits."""
    student, teacher = double(2, 1, 4, 4), double(2, 1, 4, 4)
    p, q = (1 / (1 + np.exp(-x.detach().numpy())) for x in (teacher, student))
    expected = (p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))).mean()
    assert hinton(student, teacher).item() == pytest.approx(expected) != 0
    assert hinton(student[:, 0], teacher[:, 0], kind="binary").item() == pytest.approx(expected)
    with pytest.raises(ValueError, match="softmax of one class is always 1: use kind='binary'"):
        hinton(student, teacher, kind="multiclass")
    assert kind_of(torch.zeros(3)) == "binary"


def test_dist_of_one_channel_is_the_correlation_of_its_probabilities_over_the_pixels():
    student, teacher = double(2, 1, 3, 4), double(2, 1, 3, 4)
    expected = numpy_dist(student, teacher, 1.0, sigmoid=True)
    assert dist(student, teacher).item() == pytest.approx(expected, abs=1e-6)
    assert dist(student[:, 0], teacher[:, 0], kind="binary").item() == pytest.approx(expected, abs=1e-6)
    with pytest.raises(ValueError, match="use kind='binary'"):
        dist(student, teacher, kind="multiclass")


def test_cwd_of_one_channel_is_its_distribution_over_the_pixels():
    student, teacher = double(2, 1, 3, 4), double(2, 1, 3, 4)
    assert cwd(student, teacher).item() == pytest.approx(numpy_cwd(student, teacher, 4.0))


@pytest.mark.parametrize("classes", [1, 2])
def test_standardised_logits_of_one_or_two_classes_raise(classes):
    """Two standardised logits are 1 and -1: the loss has no gradient."""
    x = torch.randn(2, classes, 4, 4)
    with pytest.raises(ValueError, match="at least three classes"):
        standardised(x, x)


def test_cwd_without_positions_raises():
    with pytest.raises(ValueError, match=r"distributions over positions, and \(2, 3\) has none"):
        cwd(torch.zeros(2, 3), torch.zeros(2, 3))


# -- numbers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [cwd, standardised, dist, lambda s, t: dist(s, t, kind="multilabel")])
def test_gradients_equal_finite_differences(loss: Any):
    assert torch.autograd.gradcheck(loss, (double(2, 3, 4, 3), double(2, 3, 4, 3)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("loss", [hinton, standardised, cwd, dist])
def test_half_precision_is_computed_in_single_precision(loss: Any, dtype: torch.dtype):
    """Logits whose squares and exponentials are beyond float16; also ones that are all equal."""
    student, teacher = (300 * torch.randn(2, 4, 8, 8)).to(dtype), (300 * torch.randn(2, 4, 8, 8)).to(dtype)
    target = torch.zeros(2, 8, 8, dtype=torch.int64)
    target[0], target[1, :3] = 9, 9
    student.requires_grad_()
    for options in ({}, {"target": target, "ignore_index": 9}):
        value = loss(student, teacher, **options)
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, loss(student.float(), teacher.float(), **options))
        (gradient,) = torch.autograd.grad(value, student)
        assert gradient.isfinite().all()


@pytest.mark.parametrize("loss", [hinton, standardised, cwd, dist])
def test_equal_and_certain_logits_have_finite_losses_and_gradients(loss: Any):
    certain = torch.zeros(2, 3, 4, 4)
    certain[:, 1] = 1e4
    for student, teacher in itertools.product((torch.zeros(2, 3, 4, 4), certain, -certain), repeat=2):
        ours = student.clone().requires_grad_()
        value = loss(ours, teacher)
        assert math.isfinite(value.item())
        assert torch.autograd.grad(value, ours)[0].isfinite().all()
