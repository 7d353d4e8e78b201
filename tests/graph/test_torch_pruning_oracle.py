"""The channels that live and die together are those that Torch-Pruning finds, on networks where it is right.

Torch-Pruning 1.6.1 (https://github.com/VainF/Torch-Pruning) walks the autograd graph, a method that shares nothing with
label propagation. Compared is the partition of all (layer, output channel) pairs into coupled units. Left out are channel
shuffles, which it takes for elementwise operations, and networks with layer norm. It knows no rule that every group of a
grouped convolution keeps the same number, so ties are not compared.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterable

import pytest
import torch
import torchvision
from torch import nn
from weightless import weightless

from pfs_fast.graph.propagation import NONE, Propagation
from pfs_fast.graph.trace import trace

tp = pytest.importorskip("torch_pruning", reason="needs torch-pruning to compare with")

NO_AUX = {"aux_logits": False, "init_weights": False}
LEFT_OUT = ("convnext", "maxvit", "shufflenet", "swin", "vit")
NAMES = [
    name
    for name in torchvision.models.list_models(module=torchvision.models)
    if not name.startswith(LEFT_OUT)
]
QUICK = {
    "googlenet", "mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small", "regnet_y_400mf", "resnet18", "squeezenet1_1",
}  # fmt: skip
# Numbers of units, the classifier's among them, as counted apart from this file with release 1.6.1.
UNITS = {
    "resnet18": 3880, "resnet50": 12456, "mobilenet_v2": 10128, "regnet_x_400mf": 13848, "densenet121": 11240,
    "efficientnet_b0": 12404, "vgg16_bn": 13416, "mnasnet1_0": 11024,
}  # fmt: skip

Partition = set[frozenset[tuple[str, int]]]


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in NAMES]
)
def test_coupled_channels_equal_those_of_torch_pruning(name):
    model = weightless(torchvision.models.get_model, name, weights=None, **_options(name)).eval()
    x = torch.empty(1, 3, *[96 if name == "inception_v3" else 64] * 2, device="meta")
    expected = oracle_partition(model, x)
    assert UNITS.get(name, len(expected)) == len(expected)
    found = own_partition(model, x)
    # Sets of thousands of sets: only the difference is worth showing.
    assert not [sorted(u)[:4] for u in sorted(found ^ expected, key=min)[:4]]


def test_sixty_networks_are_compared():
    assert len(NAMES) == 60 and set(NAMES) > QUICK


def test_partition_sees_one_wrong_pair():
    """A residual sum with its channels reversed couples others than a plain one: the comparison must tell."""

    class Net(nn.Module):
        def __init__(self, turn: bool) -> None:
            super().__init__()
            self.a, self.b, self.turn = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 1), turn
            self.fc = nn.Conv2d(6, 2, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y, z = self.a(x).chunk(2, 1) if self.turn else (self.a(x), None)
            y = torch.cat([z, y], 1) if self.turn else y
            return self.fc(y + self.b(y))

    x = torch.randn(1, 3, 8, 8)
    turned, plain = own_partition(Net(True), x), own_partition(Net(False), x)
    assert turned != plain and plain == oracle_partition(Net(False).eval(), x)


def _options(name: str) -> dict[str, bool]:
    return NO_AUX if name in ("googlenet", "inception_v3") else {}


def own_partition(model: nn.Module, x: torch.Tensor) -> Partition:
    """Output channels of convolutions and linear layers, those joined by pairs in one set."""
    constraints = Propagation(trace(model, x, values=False)).constraints
    joined = Classes(range(constraints.num_labels))
    for a, b in constraints.pairs:
        for one, other in zip(a.tolist(), b.tolist(), strict=True):
            if one != NONE and other != NONE:
                joined.union(one, other)
    modules = dict(model.named_modules())
    units = defaultdict(set)
    for name, use in constraints.layers.items():
        if isinstance(modules[name], (nn.Conv2d, nn.Linear)):
            for channel, label in enumerate(use.out.tolist()):
                units[joined.find(label) if label else (name, channel)].add((name, channel))
    return {frozenset(unit) for unit in units.values()}


def oracle_partition(model: nn.Module, x: torch.Tensor) -> Partition:
    """The same by Torch-Pruning's dependency graph."""
    model.requires_grad_(True)
    with torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = tp.DependencyGraph().build_dependency(model, example_inputs=x)
        names = {module: name for name, module in model.named_modules()}
        joined = Classes()
        for group in graph.get_all_groups(root_module_types=[nn.Conv2d, nn.Linear]):
            first: dict[int, tuple[str, int]] = {}  # root index -> the first channel seen with it
            for item in group.items:
                module = item.dep.target.module
                if not isinstance(module, (nn.Conv2d, nn.Linear)):
                    continue
                if not graph.is_out_channel_pruning_fn(item.dep.handler):
                    continue
                for channel, root in zip(item.idxs, item.root_idxs, strict=True):
                    member = (names[module], int(channel))
                    joined.union(member, first.setdefault(int(root), member))
    units = defaultdict(set)
    for member in joined.parent:
        units[joined.find(member)].add(member)
    return {frozenset(unit) for unit in units.values()}


class Classes:
    """Union-find over anything that can be hashed."""

    def __init__(self, members: Iterable = ()) -> None:
        self.parent = {member: member for member in members}

    def find(self, member):
        parent = self.parent
        parent.setdefault(member, member)
        while parent[member] != member:
            parent[member] = parent[parent[member]]
            member = parent[member]
        return member

    def union(self, a, b) -> None:
        self.parent[self.find(a)] = self.find(b)
