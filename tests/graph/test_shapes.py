"""What a run on fake tensors finds: values, MACs, writes in place, and who reads the same memory afterwards."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from small_nets import Net, conv, head
from torch import fx, nn

import pfs_fast as pfs
from pfs_fast.graph.trace import trace

IMAGE = torch.zeros(1, 3, 6, 6)


def nodes(body, **layers) -> dict[str, fx.Node]:
    graph = trace(Net(body, a=conv(3, 4), **layers), IMAGE).train.graph
    return {node.name: node for node in graph.nodes}


def add_in_place(y, z):
    y += z
    return y


WRITES = {
    "relu, function": (lambda m, x: F.relu(m.a(x)), False),
    "relu, keyword": (lambda m, x: F.relu(m.a(x), inplace=True), True),
    "relu, position": (lambda m, x: F.relu(m.a(x), True), True),
    "relu, underscore": (lambda m, x: torch.relu_(m.a(x)), True),
    "relu, method": (lambda m, x: m.a(x).relu_(), True),
    "add": (lambda m, x: m.a(x) + 1, False),
    "augmented add": (lambda m, x: add_in_place(m.a(x), 1), True),
    "out": (lambda m, x: (lambda y: torch.square(y, out=y))(m.a(x)), True),
    "square": (lambda m, x: torch.square(m.a(x)), False),
    "view": (lambda m, x: m.a(x).view(2, -1), False),
}


@pytest.mark.parametrize("form", WRITES)
def test_writes_in_place_are_seen_in_every_form(form):
    body, writes = WRITES[form]
    found = nodes(body)
    last = next(reversed([n for n in found.values() if n.op.startswith("call")]))
    assert [n.name for n in last.meta["writes"]] == (["a"] if writes else [])


@pytest.mark.parametrize("operation", ["+=", "-=", "*=", "/=", "**="])
def test_augmented_assignments_are_recorded_in_place(operation):
    namespace: dict = {}
    exec(f"def f(y, z):\n    y {operation} z\n    return y", namespace)
    model = Net(lambda m, x: namespace["f"](m.a(x), 2.0), a=conv(3, 4))
    traced, x = trace(model, IMAGE).train, torch.rand(2, 3, 6, 6)
    assert [n.meta["writes"] != () for n in traced.graph.nodes] == [False, False, True, False]
    assert torch.equal(traced(x), model(x))


def test_augmented_assignment_of_a_size_stays_arithmetic():
    def body(m, x):
        n = x.size(0)
        n *= 2
        n -= x.size(0)
        return m.a(x).view(n, -1)

    assert nodes(body)["view"].meta["val"].shape == (2, 144)


def test_names_that_are_read_after_a_write_are_stale():
    def body(m, x):
        y = m.a(x)
        z = m.i(y)
        flat, read_before = y.flatten(1), y.flatten(2).relu()
        y += 1
        return y, z, flat, read_before

    found = nodes(body, i=nn.Identity())
    assert {n.name for n in found["iadd"].meta["stale"]} == {"i", "flatten"}


def test_nothing_is_stale_where_only_the_result_is_read():
    found = nodes(lambda m, x: F.relu(add_in_place(m.a(x), 1), True).flatten(1))
    assert all(n.meta["stale"] == () for n in found.values())


def test_traced_network_equals_the_model_under_aliases():
    def body(m, x):
        y = m.a(x)
        z = y
        y += m.b(x)
        z *= 2
        return m.fc(y + z)

    model = Net(body, a=conv(3, 4), b=conv(3, 4), fc=head(4)).double()
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    assert torch.equal(trace(copy.deepcopy(model), x).train(x), model(x))


PLAIN = {
    "conv1d": (nn.Conv1d(3, 4, 3, 2, 1, 2, bias=False), (3, 11)),
    "conv2d": (nn.Conv2d(4, 6, (3, 2), (1, 3), (2, 0), groups=2), (4, 7, 9)),
    "conv3d": (nn.Conv3d(3, 4, 2), (3, 4, 5, 6)),
    "conv same": (nn.Conv2d(3, 4, 3, padding="same"), (3, 6, 6)),
    "conv reflect": (nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), (3, 6, 6)),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, 2, groups=2), (4, 5, 5)),
    "linear": (nn.Linear(5, 7), (5,)),
    "linear over positions": (nn.Linear(5, 7), (3, 4, 5)),
    "batch norm": (nn.BatchNorm2d(3), (3, 4, 4)),
    "batch norm 1d": (nn.BatchNorm1d(3), (3, 4)),
    "layer norm": (nn.LayerNorm((4, 5)), (3, 4, 5)),
    "gelu": (nn.GELU(), (3, 4)),
    "attention": (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), (5, 8)),
}


@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_shapes_and_macs_are_those_of_a_real_run(kind):
    """Layers are not run where their attributes tell the result: it must be the same."""
    layer, shape = PLAIN[kind]
    model = nn.Sequential(layer).eval()
    x = torch.randn(2, *shape)
    traced = trace(model, x)
    expected = model(x)
    found = next(n for n in reversed(traced.eval.graph.nodes) if n.op == "output").args[0]
    assert found.meta["val"].shape == expected.shape
    assert found.meta["val"].dtype == expected.dtype
    if any(True for _ in model.parameters()):
        assert traced.macs == pfs.count(model, x[:1]).macs


def test_what_does_not_depend_on_the_images_counts_in_full_for_one():
    model = Net(
        lambda m, x: m.fc(m.a(x)) + m.b(m.table).mean(0),
        a=conv(3, 4),
        b=nn.Linear(5, 4),
        table=nn.Parameter(torch.rand(7, 5)),
        fc=head(4),
    )
    assert trace(model, IMAGE).macs == pfs.count(model, IMAGE).macs == 36 * 27 * 4 + 16 + 7 * 20


def test_hooks_of_a_layer_are_run():
    model = nn.Sequential(conv(3, 4), nn.Flatten(), nn.Linear(18, 2))
    model[0].register_forward_hook(lambda m, args, y: y[..., ::2, ::2][:, :2])
    assert trace(model, IMAGE).macs == 36 * 27 * 4 + 36


def test_errors_are_not_printed_a_second_time(capfd):
    with pytest.raises(ValueError, match="example_input must fit the model"):
        trace(Net(lambda m, x: torch.cat([m.a(x), x], 2), a=conv(3, 4)), IMAGE)
    assert capfd.readouterr() == ("", "")
