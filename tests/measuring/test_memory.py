"""Peak memory of activations: predicted for any kept units, against a walk of the slim network on real tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from small_nets import Net, cbr, conv, head
from torch import fx, nn

import pfs_fast as pfs
from pfs_fast.budgets.cost import CostModel
from pfs_fast.budgets.structure import Structure
from pfs_fast.graph.analysis import channel_graph
from pfs_fast.measuring.memory import ActivationModel, allocations

BATCH = 3


def walked_peak(network: nn.Module, images: torch.Tensor) -> int:
    """Peak bytes by the definition: run a fresh trace on real tensors, and sum what lives at every node."""
    graph_module = fx.symbolic_trace(network.eval())
    weights = {t.untyped_storage().data_ptr() for t in graph_module.state_dict().values()}
    nodes = list(graph_module.graph.nodes)
    born: dict[int, tuple[int, int]] = {}
    last: dict[int, int] = {}

    class Walk(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            read = [self.env[source] for source in n.all_input_nodes]
            for tensor in [*_flat(value), *_flat(read)]:
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in weights:
                    born.setdefault(storage.data_ptr(), (nodes.index(n), storage.nbytes()))
                    last[storage.data_ptr()] = nodes.index(n)
            return value

    with torch.no_grad():
        Walk(graph_module, garbage_collect_values=False).run(images)
    return max(
        sum(size for key, (start, size) in born.items() if start <= i <= last[key])
        for i in range(len(nodes))
    )


def _flat(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for v in value for t in _flat(v)] if isinstance(value, (tuple, list)) else []


class Shuffled(nn.Module):
    """Chunks, a concatenation and a squeeze-excite block: views, gaps between reads, small tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left, self.right = cbr(3, 8), cbr(8, 6), cbr(8, 10)
        self.squeeze = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, 4, 1), nn.ReLU(), nn.Conv2d(4, 16, 1)
        )
        self.drop, self.head = nn.Dropout(0.5), head(16)

    def forward(self, x):
        x = self.stem(x)
        x = torch.cat([self.left(x), self.right(x)], 1)
        return self.head(self.drop(x * self.squeeze(x).sigmoid()))


NETWORKS = {
    "chain": lambda: nn.Sequential(cbr(3, 5), cbr(5, 7), head(7)),
    "in place": lambda: nn.Sequential(
        conv(3, 6), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.MaxPool2d(2), cbr(6, 4), head(4)
    ),
    "residual": lambda: Net(
        lambda m, x: m.h(m.b(m.a(x)) + m.a(x)), a=cbr(3, 6), b=cbr(6, 6), h=head(6)
    ),
    "depthwise": lambda: nn.Sequential(cbr(3, 8), cbr(8, 8, groups=8), cbr(8, 5, 1), head(5)),
    "flattened": lambda: nn.Sequential(cbr(3, 4), nn.Flatten(), nn.Linear(4 * 36, 4)),
    "squeeze and concatenate": Shuffled,
    "resnet20": lambda: pfs.models.resnet20(),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_prediction_equals_a_walk_of_the_slim_network(name):
    network = NETWORKS[name]().eval()
    graph = channel_graph(network, torch.zeros(1, 3, 6, 6))
    images = torch.randn(BATCH, 3, 6, 6)
    model = ActivationModel(
        allocations(graph.traced.eval, (images,)), graph.unit_of_label, graph.groups.num_units, 4
    )
    cost_model, rng = CostModel(graph.groups), np.random.default_rng(0)
    assert model.base == walked_peak(network, images)
    for share in (0.1, 0.4, 0.8):
        keep = rng.random(graph.groups.num_units) < share
        keep[[part.units[0] for part in cost_model.parts]] = True
        structure = Structure.from_keep(graph.groups, keep, cost_model)
        slim = pfs.slim(network, structure, weights="inherit")
        assert model.evaluate(keep) == walked_peak(slim, images)


def peaks(network: nn.Module, itemsize: int = 4, batch: int = 1) -> ActivationModel:
    graph = channel_graph(network, torch.zeros(1, 3, 6, 6))
    found = allocations(graph.traced.eval, (torch.zeros(batch, 3, 6, 6),))
    return ActivationModel(found, graph.unit_of_label, graph.groups.num_units, itemsize)


def test_bytes_follow_batch_and_precision():
    network = NETWORKS["chain"]()
    assert peaks(network, 2).base * 2 == peaks(network, 4).base
    assert peaks(network, 4, batch=5).base == 5 * peaks(network, 4).base


def test_peak_of_a_chain_is_that_of_two_neighbours():
    network = nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 2), head(2))
    # The convolution's output and the activation's, 8 x 6 x 6 each.
    assert peaks(network).base == 2 * 8 * 36 * 4
    network[1].inplace = True  # then the image and the first output
    assert peaks(network).base == (3 + 8) * 36 * 4


def test_model_is_left_as_it_was():
    network = NETWORKS["residual"]().train()
    graph = channel_graph(network, torch.zeros(1, 3, 6, 6))
    before = [m.training for m in graph.traced.eval.modules()]
    counters = {k: v.clone() for k, v in graph.traced.eval.state_dict().items()}
    allocations(graph.traced.eval, (torch.zeros(1, 3, 6, 6),))
    assert [m.training for m in graph.traced.eval.modules()] == before
    assert all(torch.equal(v, counters[k]) for k, v in graph.traced.eval.state_dict().items())


def test_more_channels_never_need_less():
    network = Shuffled()
    graph = channel_graph(network, torch.zeros(1, 3, 6, 6))
    model = ActivationModel(
        allocations(graph.traced.eval, (torch.zeros(1, 3, 6, 6),)),
        graph.unit_of_label,
        graph.groups.num_units,
        4,
    )
    keep, rng = np.zeros(graph.groups.num_units, dtype=bool), np.random.default_rng(1)
    before = model.evaluate(keep)
    for unit in rng.permutation(graph.groups.num_units):
        keep[unit] = True
        assert before <= model.evaluate(keep)
        before = model.evaluate(keep)
    assert before == model.base
