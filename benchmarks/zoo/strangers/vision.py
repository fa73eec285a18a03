"""Torchvision's detectors, video networks, optical flow, and its segmentation heads on other backbones; smp."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.zoo.strangers.case import Case, images, whole

__all__ = ["cases"]

DETECTORS = """
fasterrcnn_resnet50_fpn fasterrcnn_mobilenet_v3_large_fpn maskrcnn_resnet50_fpn keypointrcnn_resnet50_fpn
retinanet_resnet50_fpn fcos_resnet50_fpn ssd300_vgg16 ssdlite320_mobilenet_v3_large
""".split()  # noqa: SIM905
FIXED_SIZE = ("ssd300_vgg16", "ssdlite320_mobilenet_v3_large")
VIDEO = """r3d_18 mc3_18 r2plus1d_18 s3d mvit_v1_b mvit_v2_s swin3d_t""".split()  # noqa: SIM905
CLASSES = 5


def cases() -> Iterator[Case]:
    """Yield the networks of torchvision and smp."""
    for name in DETECTORS:
        yield Case(
            f"torchvision/{name}", "torchvision", partial(_detector, name), _two_images, prepare=_calibrate_
        )
    for name in VIDEO:
        clip = (3, 16, 224, 224) if name == "s3d" else (3, 8, 64, 64)
        reference = _scale_queries_by_kept_ if name == "swin3d_t" else whole
        build = partial(_video, name)
        yield Case(f"torchvision/{name}", "torchvision", build, images(*clip), reference=reference)
    for name in ("raft_small", "raft_large"):
        yield Case(
            f"torchvision/{name}", "torchvision", partial(_flow, name), _pair, reference=_scale_by_kept_
        )
    for head in ("fcn", "deeplabv3"):
        for backbone in ("resnet18", "mobilenet_v2", "regnet_y_400mf"):
            build = partial(_segmenter, head, backbone)
            yield Case(f"torchvision/{head}-{backbone}", "torchvision", build, images(3, 64, 64))
    for decoder, encoder in SMP:
        build = partial(_smp, decoder, encoder)
        image = images(3, 128, 128) if decoder == "PAN" else images(3, 64, 64)
        yield Case(f"smp/{decoder}-{encoder}", "segmentation_models_pytorch", build, image)


# no pair of the first zoo
SMP = (
    ("Unet", "resnext50_32x4d"), ("UnetPlusPlus", "timm-regnetx_002"), ("MAnet", "efficientnet-b1"),
    ("Linknet", "tu-hrnet_w18_small"), ("FPN", "tu-mobilevitv2_050"), ("PSPNet", "tu-ghostnetv2_100"),
    ("DeepLabV3Plus", "tu-mobilenetv3_small_050"), ("PAN", "tu-mobilenetv1_100"),
    ("UPerNet", "tu-swin_tiny_patch4_window7_224"), ("Segformer", "mit_b1"),
    ("FPN", "inceptionv4"), ("Unet", "tu-edgenext_xx_small"), ("UPerNet", "tu-pvt_v2_b0"),
)  # fmt: skip


def _two_images() -> tuple[Any, ...]:
    return ([torch.rand(3, 64, 64), torch.rand(3, 64, 64)],)


def _pair() -> tuple[Any, ...]:
    return torch.rand(1, 3, 128, 128), torch.rand(1, 3, 128, 128)


def _detector(name: str) -> nn.Module:
    import torchvision

    small = {} if name in FIXED_SIZE else {"min_size": 64, "max_size": 64}
    # a threshold of zero, so that a network with random weights finds something that can be compared
    few: dict[str, Any] = {"score_thresh": 0.0, "detections_per_img": 10, "topk_candidates": 50}
    if "rcnn" in name:
        few = {"box_score_thresh": 0.0, "box_detections_per_img": 10, "rpn_post_nms_top_n_test": 50}
    return torchvision.models.get_model(
        name, weights=None, weights_backbone=None, num_classes=CLASSES, **small, **few
    )


def _calibrate_(detector: nn.Module) -> None:
    """Estimate the norms of the backbone, without which its features are so large that no box remains."""
    norms = [module for module in detector.modules() if isinstance(module, nn.BatchNorm2d)]
    if not norms:
        return
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    detector.backbone.train()
    with torch.no_grad():
        detector.backbone(torch.randn(4, 3, 64, 64))
    detector.eval()
    for norm in norms:
        norm.momentum = 0.1


def _video(name: str) -> nn.Module:
    import torchvision

    if name.startswith("mvit"):
        return _small_mvit(name)
    return torchvision.models.get_model(name, weights=None, num_classes=CLASSES)


def _small_mvit(name: str) -> nn.Module:
    """Return a network as the two of torchvision, whose builders take large clips only, with three blocks."""
    from torchvision.models.video.mvit import MSBlockConfig, MViT

    whole, halved, third = [1, 1, 1], [1, 2, 2], [3, 3, 3]
    blocks = [
        MSBlockConfig(1, 24, 24, third, third, whole, [1, 4, 4]),
        MSBlockConfig(2, 24, 48, third, third, halved, halved),
        MSBlockConfig(2, 48, 48, third, third, whole, halved),
    ]
    second = name == "mvit_v2_s"
    return MViT(
        (64, 64), 8, blocks, residual_pool=second, residual_with_cls_embed=not second, rel_pos_embed=second,
        proj_after_attn=second, num_classes=CLASSES,
    )  # fmt: skip


class _Flow(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, first: torch.Tensor, second: torch.Tensor) -> Any:
        return self.network(first, second, num_flow_updates=2)


def _flow(name: str) -> nn.Module:
    import torchvision

    return _Flow(torchvision.models.get_model(name, weights=None))


def _scale_by_kept_(network: nn.Module) -> None:
    """Divide correlations by the root of the number of channels that are not zero, which RAFT reads from a shape."""
    from torchvision.models.optical_flow.raft import CorrBlock

    def volume(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        kept = (first != 0).any(dim=3).any(dim=2).any(dim=0).sum()
        return CorrBlock._compute_corr_volume(block, first, second) * (first.shape[1] / kept) ** 0.5

    block = next(module for module in network.modules() if isinstance(module, CorrBlock))
    block._compute_corr_volume = volume


def _scale_queries_by_kept_(network: nn.Module) -> None:
    """Divide queries by the root of the width of heads that is not zero, which the network reads from a shape."""
    from torchvision.models.video.swin_transformer import ShiftedWindowAttention3d

    for module in network.modules():
        if isinstance(module, ShiftedWindowAttention3d):
            queries = module.qkv.weight.data[: len(module.qkv.weight) // 3]
            factor = (len(queries) / (queries != 0).any(dim=1).sum()) ** 0.5
            queries.mul_(factor)
            module.qkv.bias.data[: len(queries)].mul_(factor)


def _segmenter(head: str, backbone: str) -> nn.Module:
    import torchvision
    from torchvision.models import segmentation
    from torchvision.models._utils import IntermediateLayerGetter

    body = torchvision.models.get_model(backbone, weights=None)
    if backbone.startswith("resnet"):
        features, width = IntermediateLayerGetter(body, {"layer4": "out"}), 512
    else:
        trunk = body.features if hasattr(body, "features") else nn.Sequential(body.stem, body.trunk_output)
        features = IntermediateLayerGetter(nn.Sequential(OrderedDict(trunk=trunk)), {"trunk": "out"})
        width = {"mobilenet_v2": 1280, "regnet_y_400mf": 440}[backbone]
    if head == "fcn":
        return segmentation.FCN(features, segmentation.fcn.FCNHead(width, CLASSES), None)
    return segmentation.DeepLabV3(features, segmentation.deeplabv3.DeepLabHead(width, CLASSES), None)


def _smp(decoder: str, encoder: str) -> nn.Module:
    import segmentation_models_pytorch as smp

    size = {"img_size": 64} if "swin" in encoder else {}
    return getattr(smp, decoder)(encoder, encoder_weights=None, classes=CLASSES, **size)
