"""Fresh weights of transformers, ConvNeXt, video, segmentation and detection networks are as newly built."""

from __future__ import annotations

import warnings

import pytest
import torch
import torchvision
from torch import nn

from pfs_fast.slimming.init import initialise

models = torchvision.models
NETWORKS = {
    "vision transformer": lambda: models.VisionTransformer(32, 16, 1, 2, 16, 32, num_classes=5),
    "vision transformer with a hidden layer in its head": lambda: models.VisionTransformer(
        32, 16, 1, 2, 16, 32, num_classes=5, representation_size=24
    ),
    "swin": lambda: models.SwinTransformer([4, 4], 16, [1, 1], [2, 2], [4, 4], num_classes=5),
    "swin v2": lambda: models.SwinTransformer(
        [4, 4],
        16,
        [1, 1],
        [2, 2],
        [4, 4],
        num_classes=5,
        block=models.swin_transformer.SwinTransformerBlockV2,
        downsample_layer=models.swin_transformer.PatchMergingV2,
    ),
    "maxvit": lambda: models.MaxVit((32, 32), 16, 2, [16], [1], 8, 0.0, num_classes=5),
    "video resnet": lambda: models.video.r3d_18(num_classes=5),
    "segmentation": lambda: models.segmentation.lraspp_mobilenet_v3_large(
        num_classes=5, weights_backbone=None
    ),
    "feature pyramid": lambda: models.detection.backbone_utils.resnet_fpn_backbone(
        backbone_name="resnet18", weights=None
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_fresh_weights_have_the_moments_of_a_new_network(name):
    new = NETWORKS[name]()
    model = NETWORKS[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no parameter is left alone
        initialise(model)
    for (key, expected), found in zip(new.named_parameters(), model.parameters(), strict=True):
        if expected.std(correction=0) == 0:
            assert torch.equal(found, expected), key
        else:
            spread = 1 + 6 / expected.numel() ** 0.5
            ratio = (found.norm() / expected.norm()).item()
            assert 1 / spread < ratio < spread, f"{key}: {ratio}"


def test_layer_scale_keeps_its_constant_and_a_trained_one_is_reported():
    model = models.ConvNeXt([models.convnext.CNBlockConfig(8, None, 2)], layer_scale=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        initialise(model)
    scale = model.features[1][0].layer_scale
    assert (scale == 0.5).all()
    with torch.no_grad():
        scale[0] = 0.7
    with pytest.warns(UserWarning, match=r"no initialiser is known for .*layer_scale"):
        initialise(model)


def test_image_and_norm_layers_of_transformers_keep_their_defaults():
    model = NETWORKS["swin"]()
    initialise(model, seed=0)
    norms = [m for m in model.modules() if isinstance(m, nn.LayerNorm)]
    assert norms and all((m.weight == 1).all() and (m.bias == 0).all() for m in norms)
