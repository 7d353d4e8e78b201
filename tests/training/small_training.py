"""A small classifier, batches that it can learn, and one call that trains it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pfs_fast.training.train import TrainConfig, TrainResult, train

CPU = torch.device("cpu")


class Net(nn.Module):
    def __init__(self, classes: int = 2, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.depthwise = nn.Conv2d(4, 4, 3, groups=4)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(4, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.conv(x)))
        return self.fc(self.dropout(self.depthwise(x).mean((2, 3))))


def batches(count: int = 3, size: int = 8, classes: int = 2) -> list[tuple[Tensor, Tensor]]:
    """Images whose brightness tells the class."""
    generator = torch.Generator().manual_seed(1)
    result = []
    for _ in range(count):
        labels = torch.randint(classes, (size,), generator=generator)
        noise = 0.1 * torch.randn(size, 2, 4, 4, generator=generator)
        result.append((noise + labels.view(-1, 1, 1, 1), labels))
    return result


def fit(model: nn.Module, loader=None, val_loader=None, **options) -> TrainResult:
    options = {"epochs": 3, "lr": 0.05} | options
    loader = batches() if loader is None else loader
    return train(model, loader, val_loader, TrainConfig(**options), progress=False)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    torch.testing.assert_close(first, second, rtol=0, atol=0, check_stride=False)
