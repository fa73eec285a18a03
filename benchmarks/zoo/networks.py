"""The networks of the zoo: their names, builders, input sizes and numbers of classes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from typing import Any

import segmentation_models_pytorch as smp
import timm
import torchvision.models as tv
from torch import nn

__all__ = ["CLASSES", "Network", "catalogue"]

CLASSES = 1000
SEGMENTATION_CLASSES = 21  # no inner layer of these networks is that wide


@dataclass(frozen=True)
class Network:
    """One network: its name ``library/model``, its builder, the size of its square input, its number of classes."""

    name: str
    build: Callable[[], nn.Module]
    size: int
    classes: int = CLASSES


def catalogue() -> list[Network]:
    """Return all networks. The libraries alternate, so that the beginning of the list is a sample of all."""
    turns = zip_longest(list(_torchvision()), list(_smp()), list(_timm()))
    return [network for turn in turns for network in turn if network is not None]


# torchvision: every builder.

TV_FIXED = {
    "vit_b_16": 224,
    "vit_b_32": 224,
    "vit_h_14": 224,
    "vit_l_16": 224,
    "vit_l_32": 224,
    "maxvit_t": 224,
}
TV_LARGE = {"inception_v3": 128, "alexnet": 128, "squeezenet1_0": 96, "squeezenet1_1": 96}
TV_INIT_WEIGHTS = ("googlenet", "inception_v3")  # without the argument they warn


def _torchvision() -> Iterator[Network]:
    for name in tv.list_models(tv.segmentation):
        build = partial(
            tv.get_model, name, weights=None, weights_backbone=None, num_classes=21, aux_loss=_has_aux(name)
        )
        yield Network(f"torchvision/{name}", build, 64, SEGMENTATION_CLASSES)
    for name in sorted(tv.list_models(tv), key=_parameters):
        kwargs = {"init_weights": True} if name in TV_INIT_WEIGHTS else {}
        size = TV_FIXED.get(name) or TV_LARGE.get(name, 64)
        yield Network(f"torchvision/{name}", partial(tv.get_model, name, weights=None, **kwargs), size)


def _parameters(name: str) -> int:
    """Return the number of parameters, by which the largest networks come last."""
    return int(max(weights.meta["num_params"] for weights in tv.get_model_weights(name)))


def _has_aux(name: str) -> bool | None:
    return None if name.startswith("lraspp") else True


# smp: every decoder, with encoders of many families.

DECODERS = """
Unet UnetPlusPlus MAnet Linknet FPN PSPNet DeepLabV3 DeepLabV3Plus PAN UPerNet Segformer
""".split()  # noqa: SIM905
ENCODERS = """
resnet18 mobilenet_v2 efficientnet-b0 mit_b0 vgg11_bn densenet121 se_resnet50 timm-skresnet18 mobileone_s0
xception dpn68 tu-convnext_atto
""".split()  # noqa: SIM905
NOT_DILATED = ("densenet121", "vgg11_bn", "mit_b0", "xception")  # smp refuses to dilate these
NO_MIT = ("Linknet", "UnetPlusPlus")
DILATED = ("DeepLabV3", "DeepLabV3Plus", "PAN")
DPT_ENCODERS = """
tu-vit_tiny_patch16_224 tu-vit_small_patch32_224 tu-deit_tiny_patch16_224 tu-deit3_small_patch16_224
tu-flexivit_small tu-eva02_tiny_patch14_224 tu-vit_small_patch14_dinov2 tu-beit_base_patch16_224
tu-vit_pwee_patch16_reg1_gap_256 tu-vit_medium_patch16_reg4_gap_256 tu-vit_relpos_small_patch16_224
tu-samvit_base_patch16
""".split()  # noqa: SIM905


def _smp() -> Iterator[Network]:
    for number in range(len(ENCODERS)):
        for offset, decoder in enumerate(DECODERS):  # decoders and encoders both change from one to the next
            encoder = ENCODERS[(number + offset) % len(ENCODERS)]
            if _fits(decoder, encoder):
                yield Network(f"smp/{decoder}-{encoder}", partial(_segmenter, decoder, encoder), 128, 21)
    for encoder in DPT_ENCODERS:
        size = 256 if "256" in encoder else 518 if "dinov2" in encoder else 240 if "flexi" in encoder else 224
        yield Network(f"smp/DPT-{encoder}", partial(_segmenter, "DPT", encoder), size, 21)


def _fits(decoder: str, encoder: str) -> bool:
    if decoder in DILATED:
        return encoder not in NOT_DILATED
    return not (decoder in NO_MIT and encoder == "mit_b0")


def _segmenter(decoder: str, encoder: str) -> nn.Module:
    return getattr(smp, decoder)(encoder, encoder_weights=None, classes=SEGMENTATION_CLASSES)


# timm: one to four small members of every module of timm.models.

TIMM = """
beit_base_patch16_224 botnet26t_256 eca_botnext26ts_256 halonet26t lambda_resnet26t haloregnetz_b sehalonet33ts
bat_resnext26ts eca_resnet33ts gcresnext26ts gernet_s mobileone_s1 regnetz_b16 repvgg_a0 resnext26ts
cait_xxs24_224 coat_lite_tiny coat_tiny convit_tiny convmixer_768_32
convnext_atto convnext_atto_rms convnext_pico_ols convnextv2_atto convnextv2_femto cpubone_b0_bfrobust cpubone_nano
crossvit_tiny_240 crossvit_9_dagger_240 csatv2 cs3darknet_focus_s cs3sedarknet_l cspresnet50 cspresnext50 darknet17
cspdarknet53 cspnext_tiny davit_tiny deit3_small_patch16_224 deit_tiny_distilled_patch16_224 densenetblur121d
densenet169 dla34 dla46x_c dla60_res2net dpn48b dpn68b edgenext_xx_small edgenext_small_rw efficientformer_l1
efficientformerv2_s0 efficientnet_b0 efficientnet_b0_gn efficientnet_cc_b0_4e efficientnet_es efficientnetv2_rw_t
fbnetc_100 mixnet_s mnasnet_small mobilenetv1_100 mobilenetv2_050 semnasnet_050 spnasnet_100 tf_efficientnet_lite0
tinynet_e gc_efficientnetv2_rw_t efficientvim_m1 efficientvit_b0 efficientvit_l1 efficientvit_m0
eva02_tiny_patch14_224 vit_pe_core_tiny_patch16_384 vit_base_patch16_rope_224 vit_small_patch16_dinov3
fasternet_t0 fastvit_t8 fastvit_sa12 focalnet_tiny_srf gcvit_xxtiny ghostnet_050 ghostnetv2_100 ghostnetv3_050
hardcorenas_a hgnet_tiny hgnetv2_b0 hiera_tiny_224 sam2_hiera_tiny hrnet_w18_small iformer_t inception_next_atto
inception_resnet_v2 inception_v3 inception_v4 lcnetv2_small levit_128s levit_conv_128s lowformer_b0
mambaout_femto coatnet_pico_rw_224 coatnext_nano_rw_224 maxvit_pico_rw_256 maxxvitv2_nano_rw_256
caformer_s18 convformer_s18 poolformer_s12 poolformerv2_s12 gmixer_12_224 gmlp_ti16_224 mixer_s16_224 resmlp_12_224
fbnetv3_b lcnet_050 mobilenetv3_small_050 mobilenetv4_conv_small mobilenetv4_hybrid_medium mobilenetv5_base
mobilevit_xxs mobilevitv2_050 mvitv2_tiny mvitv2_small_cls naflexvit_base_patch16_gap nasnetalarge nest_tiny
nextvit_small eca_nfnet_l0 nf_regnet_b0 nf_resnet26 nfnet_l0 pit_ti_224 pit_ti_distilled_224 pnasnet5large
pvt_v2_b0 pvt_v2_b2_li qwen3_vit_88m rdnet_tiny regnetx_002 regnety_002 regnetz_005 regnetv_040 repghostnet_050
repvit_m0_9 res2net50_26w_4s res2next50 resnest14d resnest50d_1s4x24d resnet10t resnet18d resnet26t resnet50_gn
resnetaa34d resnetblur18 resnetrs50 resnext50_32x4d seresnet18 ecaresnet26t wide_resnet50_2 resnetv2_18
resnetv2_50d_evos resnetv2_50d_frn resnetv2_50x1_bit rexnet_100 rexnetr_100 selecsls42 legacy_seresnet18
legacy_senet154 sequencer2d_s shvit_s1 skresnet18 skresnext50_32x4d starnet_s1 swiftformer_xs
swin_tiny_patch4_window7_224 swin_s3_tiny_224 swinv2_tiny_window8_256 swinv2_cr_tiny_224 tiny_vit_5m_224
tnt_s_patch16_224 tresnet_m twins_pcpvt_small twins_svt_small vgg11 vgg11_bn visformer_tiny vit_tiny_patch16_224
vit_small_patch16_18x2_224 vit_small_patch14_reg4_dinov2 flexivit_small vit_xsmall_patch16_clip_224
vit_tiny_r_s16_p8_224 vit_small_resnet26d_224 vit_relpos_small_patch16_224 vit_srelpos_small_patch16_224
samvit_base_patch16_224 vitamin_small_224 volo_d1_224 vovnet39a ese_vovnet19b_dw eca_vovnet39b legacy_xception
xception41 xception41p xcit_nano_12_p16_224
""".split()  # noqa: SIM905
TIMM_SIZES = {
    "halonet26t": 256,
    "haloregnetz_b": 224,
    "sehalonet33ts": 256,
    "bat_resnext26ts": 256,
    "vit_small_patch14_reg4_dinov2": 280,
    "inception_v3": 128,
    "inception_v4": 128,
    "inception_resnet_v2": 128,
    "nasnetalarge": 96,
}
MAX_PIXELS = 288


def _timm() -> Iterator[Network]:
    for name in TIMM:
        yield Network(f"timm/{name}", partial(timm.create_model, name, **_smaller(name)), _timm_size(name))


def _config(name: str) -> dict[str, Any]:
    config = timm.get_pretrained_cfg(name)
    return {} if config is None else config.to_dict()


def _timm_size(name: str) -> int:
    """Return the input size if it is fixed, else a small one that leaves more than one pixel at the end."""
    config = _config(name)
    default = min(config.get("input_size", (3, 224, 224))[-1], MAX_PIXELS)
    usual = default if config.get("fixed_input_size") else 96 if default < 256 else 128
    return TIMM_SIZES.get(name, usual)


def _smaller(name: str) -> dict[str, Any]:
    config = _config(name)
    large = config.get("fixed_input_size") and config["input_size"][-1] > MAX_PIXELS
    return {"img_size": _timm_size(name)} if large else {}
