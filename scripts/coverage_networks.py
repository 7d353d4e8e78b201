"""The networks of the coverage table: how each is built, and about the smallest input that it takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torchvision
from torch import Tensor, nn


@dataclass(frozen=True)
class Network:
    """One row of the table.

    Attributes:
        name: Name in its library.
        suite: ``"torchvision"``, ``"segmentation"``, ``"detection"``, ``"video"``, ``"1-d"`` or ``"timm"``.
        family: Module of the library that defines it.
        build: Makes it, with random weights.
        shape: Of one image, (C, H, W) or (C, T, H, W) or (C, L).
    """

    name: str
    suite: str
    family: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]

    @property
    def key(self) -> str:
        return f"{self.suite}/{self.name}"


class Logits(nn.Module):
    """A network with feature maps for outputs, as a classifier that a search can train: one logit for each output channel.

    The channels of every output stay outputs, so they are held whole as in the bare network.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        maps = self.network(x)
        maps = list(maps.values()) if isinstance(maps, dict) else [maps]
        return torch.cat([y.mean((2, 3)) for y in maps], 1)


def networks(suites: tuple[str, ...] = ()) -> Iterator[Network]:
    """All networks, or those of some suites."""
    for suite, listed in _SUITES.items():
        if not suites or suite in suites:
            yield from listed()


# -- torchvision ------------------------------------------------------------------------------------------------------

_PLAIN = {"weights": None}
_NO_AUX = {**_PLAIN, "aux_logits": False, "init_weights": False}
# Sizes other than 64, and arguments besides ``weights``.
_CLASSIFIERS: dict[str, tuple[int, dict[str, Any]]] = {
    "googlenet": (64, _NO_AUX),
    "inception_v3": (96, _NO_AUX),
    "maxvit_t": (224, {**_PLAIN, "input_size": (224, 224)}),  # windows of 7x7 at a stride of 32
    **{
        f"vit_{size}": (patch * 4, {**_PLAIN, "image_size": patch * 4})
        for size, patch in {"b_16": 16, "b_32": 32, "l_16": 16, "l_32": 32, "h_14": 14}.items()
    },
}


def _classification() -> Iterator[Network]:
    for name in torchvision.models.list_models(module=torchvision.models):
        size, options = _CLASSIFIERS.get(name, (64, _PLAIN))
        builder = torchvision.models.get_model_builder(name)
        family = builder.__module__.rpartition(".")[2]
        build = partial(_with_head, builder, **options)
        yield Network(name, "torchvision", family, build, (3, size, size))


def _with_head(builder: Callable[..., nn.Module], **options: Any) -> nn.Module:
    """With random weights also in a classifier that begins as zeros (ViT): zeros prove nothing."""
    model = builder(**options)
    for module in model.modules():
        if isinstance(module, nn.Linear) and not module.weight.any():
            nn.init.normal_(module.weight, std=0.02)
    return model


def _segmentation() -> Iterator[Network]:
    module = torchvision.models.segmentation
    for name in torchvision.models.list_models(module=module):
        builder = torchvision.models.get_model_builder(name)
        family = builder.__module__.rpartition(".")[2]
        build = partial(_with_logits, builder, weights_backbone=None, **_PLAIN)
        yield Network(name, "segmentation", family, build, (3, 64, 64))


def _with_logits(builder: Callable[..., nn.Module], **options: Any) -> nn.Module:
    return Logits(builder(**options))


def _detection() -> Iterator[Network]:
    for name in torchvision.models.list_models(module=torchvision.models.detection):
        builder = torchvision.models.get_model_builder(name)
        family = builder.__module__.rpartition(".")[2]
        size = 300 if name == "ssd300_vgg16" else 128  # its last maps are unpadded
        yield Network(name, "detection", family, partial(_backbone, builder), (3, size, size))


def _backbone(builder: Callable[..., nn.Module]) -> nn.Module:
    """The part that makes feature maps; what follows (anchors, non-maximum suppression) depends on data."""
    return Logits(builder(weights=None, weights_backbone=None).backbone)


def _video() -> Iterator[Network]:
    for name in ("r3d_18", "mc3_18", "r2plus1d_18", "s3d"):
        builder = torchvision.models.get_model_builder(name)
        family = builder.__module__.rpartition(".")[2]
        # S3D pools windows of 2x7x7 at a stride of 8x32x32.
        shape = (3, 16, 224, 224) if name == "s3d" else (3, 8, 32, 32)
        yield Network(name, "video", family, partial(builder, **_PLAIN), shape)


def _one_dimension() -> Iterator[Network]:
    yield Network("fcn_1d", "1-d", "own", _fcn_1d, (3, 128))
    yield Network("resnet_1d", "1-d", "own", _resnet_1d, (3, 128))


def _fcn_1d() -> nn.Module:
    """Time-series network of three convolutions (Wang et al., 2017, arXiv 1611.06455)."""
    widths = (3, 128, 256, 128)
    layers: list[nn.Module] = []
    for inputs, outputs, kernel in zip(widths, widths[1:], (7, 5, 3), strict=False):
        layers += [nn.Conv1d(inputs, outputs, kernel, padding="same"), nn.BatchNorm1d(outputs)]
        layers.append(nn.ReLU())
    return nn.Sequential(*layers, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(128, 10))


class _Block1d(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv1d(inputs, outputs, 7, padding=3),
            nn.BatchNorm1d(outputs),
            nn.ReLU(),
            nn.Conv1d(outputs, outputs, 3, padding=1),
            nn.BatchNorm1d(outputs),
        )
        self.shortcut = nn.Sequential(nn.Conv1d(inputs, outputs, 1), nn.BatchNorm1d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


def _resnet_1d() -> nn.Module:
    blocks = [_Block1d(3, 64), _Block1d(64, 128), _Block1d(128, 128)]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(128, 10))


# -- timm -------------------------------------------------------------------------------------------------------------

# About the smallest of each family, large ones last. A colon gives the image size where 64 is not legal, or too small for the network.
_TIMM = """
    gernet_s repvgg_a0 mobileone_s0 resnext26ts seresnext26ts eca_resnext26ts gcresnext26ts bat_resnext26ts:128
    regnetz_b16 resnet32ts resnet51q botnet26t_256:256 halonet26t:256 lambda_resnet26t:128 sebotnet33ts_256:256
    convmixer_768_32 convnext_atto convnextv2_atto convnext_zepto_rms cspresnet50 cspresnext50 cspdarknet53
    cs3darknet_focus_s cs3sedarknet_l darknet17 darknetaa53 cspnext_tiny densenet121 densenetblur121d dla34 dla46x_c
    dla60_res2net dla60_res2next dpn48b dpn68 edgenext_xx_small efficientformer_l1:224 efficientformerv2_s0:224
    cpubone_nano efficientnet_b0 efficientnet_lite0 efficientnet_es efficientnet_cc_b0_4e efficientnetv2_rw_t
    gc_efficientnetv2_rw_t mixnet_s mnasnet_small mobilenetv1_100 mobilenetv2_050 mobilenet_edgetpu_v2_xs fbnetc_100
    spnasnet_100 tinynet_e tf_efficientnet_b0 efficientnet_blur_b0 efficientnet_b0_gn efficientvit_b0 efficientvit_m0:224
    fasternet_t0 fastvit_t8 ghostnet_050 ghostnetv2_100 ghostnetv3_050 hardcorenas_a hgnet_tiny hgnetv2_b0 hrnet_w18_small
    inception_next_atto inception_v3:96 inception_v4:96 lcnetv2_small levit_conv_128s:224 mambaout_femto
    coatnet_bn_0_rw_224:224 poolformer_s12 convformer_s18 lcnet_035 fbnetv3_b mobilenetv3_small_050
    mobilenetv4_conv_small_035 mobilenetv4_hybrid_medium_075:128 mobilevit_xxs:128 mobilevitv2_050:128 nextvit_small:96
    nf_resnet26 nf_regnet_b0 eca_nfnet_l0 regnetx_002 regnety_002 regnetz_005 regnetv_040 repghostnet_050 repvit_m0_9
    res2net50_14w_8s res2next50 resnest14d resnest50d_4s2x40d resnet10t resnet18 resnet18d resnext50_32x4d seresnet18
    ecaresnet26t ecaresnetlight resnetblur18 resnetaa34d resnetrs50 resnet50_gn resnetv2_18 resnetv2_50 resnetv2_50x1_bit
    rdnet_tiny rexnet_100 rexnetr_100 selecsls42b legacy_seresnet18 legacy_seresnext26_32x4d skresnet18 skresnext50_32x4d
    starnet_s1 swiftformer_xs tresnet_m visformer_tiny:224 vovnet39a ese_vovnet19b_dw eca_vovnet39b legacy_xception
    xception41 xception41p focalnet_tiny_srf shvit_s1:128 iformer_t:128 lowformer_b0:128 vgg11 vgg11_bn nasnetalarge:96
    pnasnet5large:96 dm_nfnet_f0 inception_resnet_v2:96 legacy_senet154 repvgg_b1g4
"""


def _timm() -> Iterator[Network]:
    import timm
    from timm.models import _registry

    for entry in _TIMM.split():
        name, _, size = entry.partition(":")
        side = int(size or 64)
        family = _registry._model_to_module[name]
        yield Network(name, "timm", family, partial(timm.create_model, name), (3, side, side))


_SUITES: dict[str, Callable[[], Iterator[Network]]] = {
    "torchvision": _classification,
    "segmentation": _segmentation,
    "detection": _detection,
    "video": _video,
    "1-d": _one_dimension,
    "timm": _timm,
}
