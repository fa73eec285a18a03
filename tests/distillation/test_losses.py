"""The distillation losses, compared with closed forms, finite differences and torchdistill."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_prune.distillation.logit_losses import hinton
from lightning_prune.distillation.losses import attention, attention_map, flow, fsp


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def double(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


# The losses of torchdistill 1.1.5 (torchdistill/losses/mid_level.py) as plain functions. Tests below state where ours
# differ.


def torchdistill_kd(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """``KDLoss.forward`` with targets, alpha 0 and beta 1 (without targets it leaves out the factor T^2)."""
    soft = nn.KLDivLoss(reduction="batchmean")(
        torch.log_softmax(student / temperature, dim=1), torch.softmax(teacher / temperature, dim=1)
    )
    return temperature**2 * soft


def torchdistill_at(student: Tensor, teacher: Tensor) -> Tensor:
    """``ATLoss.compute_at_loss``, ``mode='code'``."""
    maps = [F.normalize(x.pow(2).mean(1).flatten(1)) for x in (student, teacher)]
    return (maps[0] - maps[1]).pow(2).mean()


def torchdistill_fsp(first: Tensor, second: Tensor) -> Tensor:
    """``FSPLoss.compute_fsp_matrix``. (Its loss then sums norms of the columns' differences.)"""
    size = [min(a, b) for a, b in zip(first.shape[2:], second.shape[2:], strict=True)]
    one, two = (x if list(x.shape[2:]) == size else F.adaptive_max_pool2d(x, size) for x in (first, second))
    return torch.bmm(one.flatten(2), two.flatten(2).transpose(1, 2)) / (size[0] * size[1])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_hinton_equals_torchdistill_for_samples_and_torchdistill_per_pixel_for_maps(temperature):
    student, teacher = double(5, 7), double(5, 7)
    torch.testing.assert_close(
        hinton(student, teacher, temperature), torchdistill_kd(student, teacher, temperature)
    )
    student, teacher = double(2, 3, 4, 5), double(2, 3, 4, 5)
    # torchdistill divides by the batch size only, so that its loss grows with the image
    expected = torchdistill_kd(student, teacher, temperature) / 20
    torch.testing.assert_close(hinton(student, teacher, temperature), expected)


def test_hinton_in_closed_form():
    """Two classes, logits 0 and z: p = sigmoid(z / T), against 1/2."""
    for z, temperature in ((1.0, 1.0), (3.0, 2.0)):
        p = 1 / (1 + math.exp(-z / temperature))
        expected = temperature**2 * (p * math.log(2 * p) + (1 - p) * math.log(2 * (1 - p)))
        loss = hinton(torch.zeros(1, 2), torch.tensor([[0.0, z]]), temperature)
        assert loss.item() == pytest.approx(expected, rel=1e-5)
        one = hinton(torch.zeros(1, 1, 1, 1), torch.full((1, 1, 1, 1), z), temperature, "binary")
        assert one.item() == pytest.approx(expected, rel=1e-5)  # a Bernoulli variable is a softmax of two


def test_hinton_of_several_labels_is_the_mean_of_the_binary_losses():
    student, teacher = double(2, 3, 4), double(2, 3, 4)
    losses = [hinton(student[:, k], teacher[:, k], 2.0, "binary") for k in range(3)]
    torch.testing.assert_close(hinton(student, teacher, 2.0, "multilabel"), torch.stack(losses).mean())


def test_hinton_at_high_temperature_is_half_the_squared_distance_of_centred_logits():
    """Section 2.1 of the paper: matching logits is the limit."""
    student, teacher = double(6, 10), double(6, 10)
    centred = [x - x.mean(1, keepdim=True) for x in (student, teacher)]
    expected = (centred[0] - centred[1]).square().sum(1).mean() / 2 / 10
    torch.testing.assert_close(hinton(student, teacher, 1e4), expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("kind", ["multiclass", "binary", "multilabel"])
def test_ignored_positions_have_no_loss_and_no_gradient(kind):
    channels = 1 if kind == "binary" else 3
    student, teacher = double(2, channels, 4, 4), double(2, channels, 4, 4)
    target = torch.zeros((2, 3, 4, 4) if kind == "multilabel" else (2, 4, 4), dtype=torch.int64)
    target[..., :2] = 255
    loss = hinton(student, teacher, 3.0, kind, target, 255)
    torch.testing.assert_close(loss, hinton(student[..., 2:], teacher[..., 2:], 3.0, kind))
    (gradient,) = torch.autograd.grad(loss, student)
    assert gradient[..., :2].abs().max() == 0 < gradient[..., 2:].abs().min()
    empty = hinton(student, teacher, 3.0, kind, torch.full_like(target, 255), 255)
    assert empty.item() == 0
    assert torch.autograd.grad(empty, student)[0].abs().max() == 0


def test_attention_equals_torchdistill_and_pools_where_sizes_differ():
    student, teacher = double(3, 4, 6, 6), double(3, 9, 6, 6)
    torch.testing.assert_close(attention(student, teacher), torchdistill_at(student, teacher))
    # torchdistill cannot compare maps of different sizes
    large = double(3, 4, 12, 12)
    pooled = F.avg_pool2d(large.square().mean(1, keepdim=True), 2).sqrt()
    torch.testing.assert_close(attention(large, teacher), torchdistill_at(pooled, teacher))


def test_attention_in_closed_form_and_its_range():
    """Maps that are 1 at different places of four; maps that differ by a factor only."""
    one, other = torch.zeros(1, 2, 2, 2), torch.zeros(1, 2, 2, 2)
    one[0, :, 0, 0], other[0, 0, 1, 1] = 3.0, 0.1
    assert attention(one, other).item() == pytest.approx(2 / 4)
    assert attention(one, 7 * one).item() == pytest.approx(0)
    torch.testing.assert_close(attention_map(torch.randn(5, 3, 4, 4)).norm(dim=1), torch.ones(5))


def test_fsp_equals_torchdistill_at_one_size_and_pools_by_the_mean_where_sizes_differ():
    first, second = double(2, 3, 4, 4), double(2, 5, 4, 4)
    torch.testing.assert_close(flow(first, second), torchdistill_fsp(first, second))
    others = double(2, 3, 4, 4), double(2, 5, 4, 4)
    expected = (torchdistill_fsp(first, second) - torchdistill_fsp(*others)).square().mean()
    torch.testing.assert_close(fsp((first, second), others), expected)
    # torchdistill pools by the maximum; we pool by the mean, like the common benchmark code
    large = double(2, 3, 8, 8)
    torch.testing.assert_close(flow(large, second), torchdistill_fsp(F.avg_pool2d(large, 2), second))
    assert not torch.allclose(flow(large, second), torchdistill_fsp(large, second))


@pytest.mark.parametrize(
    "loss",
    [
        lambda s, t: hinton(s, t),
        lambda s, t: hinton(s, t, 2.0, "multilabel"),
        attention,
        lambda s, t: attention(F.interpolate(s, scale_factor=2.0, mode="bilinear"), t),
        lambda s, t: fsp((s, s[:, :2]), (t, t[:, :2])),
    ],
)
def test_gradients_equal_finite_differences(loss):
    assert torch.autograd.gradcheck(loss, (double(2, 3, 4, 3), double(2, 3, 4, 3)))


def test_half_precision_does_not_overflow():
    features = torch.full((1, 2, 4, 4), 300.0, dtype=torch.float16)  # its square is beyond float16
    features[..., 0] = 200.0
    assert 0 < attention(features, torch.ones(1, 2, 4, 4)).item() < 1
    assert flow(features, features).max().item() == pytest.approx(77500)
    assert hinton(features, features.flip(-1)).isfinite()


def test_tokens_are_compared_like_maps_of_one_row():
    tokens, others = double(2, 8, 17), double(2, 8, 17)
    torch.testing.assert_close(attention(tokens, others), attention(tokens[..., None], others[..., None]))
    torch.testing.assert_close(
        fsp((tokens, tokens), (others, others)), fsp((tokens[..., None],) * 2, (others[..., None],) * 2)
    )


def test_arguments_that_do_not_fit_raise():
    x = torch.zeros(2, 3, 4, 4)
    with pytest.raises(ValueError, match="temperature must be above 0, got 0"):
        hinton(x, x, 0)
    with pytest.raises(ValueError, match="kind must be one of"):
        hinton(x, x, kind="softmax")
    with pytest.raises(
        ValueError, match=r"student's logits are \(2, 3, 4, 4\), the teacher's \(2, 2, 4, 4\)"
    ):
        hinton(x, x[:, :2])
    for other in (x.flatten(2), x[:1], torch.zeros(2, 3)):
        with pytest.raises(ValueError, match="cannot be pooled to each other"):
            attention(x, other)
    with pytest.raises(ValueError, match="must have the same channels"):
        fsp((x, x), (x, x[:, :2]))
