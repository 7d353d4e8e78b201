"""The classification networks of torchvision, and about the smallest images that they take."""

from __future__ import annotations

import torchvision
from torchvision.models import list_models

NAMES = list_models(module=torchvision.models)
# The blocks of MaxViT and the position tables of ViT stand for one size.
SIZES = {"alexnet": 64, "inception_v3": 299, "maxvit_t": 224, "squeezenet1_0": 48, "squeezenet1_1": 48}  # fmt: skip


def size_of(name: str) -> int:
    """Height and width."""
    return 224 if name.startswith("vit") else SIZES.get(name, 32)
