"""NEW."""

from __future__ import annotations

from torch import Tensor


def mean_iou(per_class: Tensor) -> Tensor:
    """Mean over the classes that occurred.

    Args:
        per_class: IoU ``(num_classes,)``, NaN where the class occurred neither in target nor in prediction.

    Example:
        >>> mean_iou(torch.tensor([0.5, 1.0, float("nan")]))
        tensor(0.7500)
    """
    return per_class.nanmean()
