"""Small networks for tests of the search side."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Net(nn.Module):
    """Layers by name, and a forward that is one expression: ``Net(lambda m, x: m.b(m.a(x)), a=..., b=...)``."""

    def __init__(self, body: Callable[..., Any], **layers: Any) -> None:
        super().__init__()
        self.body = body
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


class Net2(Net):
    """The same with two inputs."""

    def forward(self, x: Tensor, y: Tensor) -> Any:
        return self.body(self, x, y)


def conv(inputs: int, outputs: int, kernel: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False, **options)


def cbr(inputs: int, outputs: int, kernel: int = 3, **options: Any) -> nn.Sequential:
    """Convolution ``.0``, batch norm ``.1``, ReLU."""
    return nn.Sequential(
        conv(inputs, outputs, kernel, **options), nn.BatchNorm2d(outputs), nn.ReLU()
    )


def head(inputs: int, classes: int = 4) -> nn.Sequential:
    """Global pooling and a linear layer ``.2``."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))


def tiny(classes: int = 4) -> nn.Sequential:
    """Two gated convolutions, 3 and 5 channels wide; for images of 3 channels and any size."""
    return nn.Sequential(cbr(3, 3), cbr(3, 5), head(5, classes))


def batches(
    count: int = 3,
    size: int = 4,
    images: tuple[int, ...] = (3, 6, 6),
    classes: int = 4,
    seed: int = 0,
) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(size, *images, generator=generator),
            torch.randint(classes, (size,), generator=generator),
        )
        for _ in range(count)
    ]


class Frozen:
    """Everything of a model that a call must leave alone; ``check()`` compares bit by bit."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.before = self._picture()

    def _picture(self) -> dict[str, Any]:
        model = self.model
        picture: dict[str, Any] = {}
        for kind, tensors in (
            ("parameter", model.named_parameters()),
            ("buffer", model.named_buffers()),
        ):
            for name, tensor in tensors:
                bits = None if tensor.is_meta else tensor.detach().cpu().contiguous().clone()
                picture[f"{kind} {name}"] = (
                    id(tensor),
                    bits,
                    tensor.dtype,
                    tensor.stride(),
                    tensor.requires_grad,
                    tensor.grad,
                    None if tensor.is_meta else tensor._version,
                )
        for name, module in model.named_modules():
            hooks = {
                key: list(value.items())
                for key, value in vars(module).items()
                if key.endswith("hooks") and isinstance(value, dict)
            }
            plain = {
                key: copy.copy(value)
                for key, value in vars(module).items()
                if not key.startswith("_") and not callable(value)
            }
            picture[f"module {name}"] = (
                id(module),
                type(module),
                module.training,
                sorted(vars(module)),
                hooks,
                plain,
            )
        return picture

    def check(self) -> None:
        after = self._picture()
        assert after.keys() == self.before.keys()
        for key, old in self.before.items():
            for a, b in zip(old, after[key], strict=True):
                same = (
                    torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b
                )
                assert same, f"{key} changed from {a} to {b}"
