"""The gated network: equal to the model while all gates are 1, and lean in what it saves for the backward pass."""

from __future__ import annotations

import copy
import operator

import pytest
import torch
import torch.nn.functional as F
import torchvision
from small_nets import Net, cbr, conv, head
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

import pfs_fast as pfs
from pfs_fast import _library, ops
from pfs_fast.gating.gated import FrozenConv, GatedNetwork
from pfs_fast.gating.gates import GateBank, GateState
from pfs_fast.gating.scope import gate_sites, gated_groups
from pfs_fast.graph.analysis import channel_graph
from pfs_fast.ops import reference

needs_ops = pytest.mark.skipif(
    not _library.backends().cpu, reason=f"no compiled operators: {_library.backends().cpu_reason}"
)
BACKENDS = [pytest.param(reference, id="reference"), pytest.param(ops, id="fused", marks=needs_ops)]


def gate(
    model,
    example,
    kernels=reference,
    *,
    scope="all",
    dtype=torch.float64,
    channels_last=True,
    track=False,
):
    """A gated network of a model, and its bank, with all gates at 1."""
    graph = channel_graph(model, example)
    groups = gated_groups(graph, model, scope)
    state = GateState.create(
        groups.num_units, 1.0, torch.promote_types(dtype, torch.float32), torch.device("cpu")
    )
    bank = GateBank(groups, gate_sites(graph, groups, scope), state)
    return GatedNetwork(
        graph, bank, kernels, dtype=dtype, channels_last=channels_last, track_stats=track
    ), bank


def shaken(model: nn.Module) -> nn.Module:
    """float64, no dropout, batch norms with statistics and affine parameters that matter."""
    for module in model.modules():
        if isinstance(module, (nn.Dropout, nn.Dropout2d)):
            module.p = 0.0
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return model.double()


def tensors(outputs) -> list[torch.Tensor]:
    if isinstance(outputs, torch.Tensor):
        return [outputs]
    values = outputs.values() if isinstance(outputs, dict) else outputs
    return [t for t in values if isinstance(t, torch.Tensor)]


def assert_same(found, expected, rtol=1e-12) -> None:
    found, expected = tensors(found), tensors(expected)
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max() <= rtol * b.abs().max()


NETS = {
    "vgg16": (lambda: pfs.models.vgg16(expansion=0.125), 32),
    "resnet20": (lambda: pfs.models.resnet20(expansion=0.25), 16),
    "mobilenet_v1": (lambda: pfs.models.mobilenet_v1(10, expansion=0.125), 32),
    "mobilenet_v2": (lambda: pfs.models.mobilenet_v2(10, expansion=0.125, multiplier=0.25), 32),
    "resnet50": (lambda: pfs.models.resnet50(10, expansion=0.125, multiplier=0.125), 32),
    "tv densenet": (lambda: torchvision.models.DenseNet(4, (2, 3), 8, num_classes=5), 32),
    "tv googlenet": (lambda: torchvision.models.googlenet(num_classes=5, init_weights=False), 32),
    "tv mobilenet_v3": (lambda: torchvision.models.mobilenet_v3_small(num_classes=5), 32),
    "tv shufflenet": (lambda: torchvision.models.shufflenet_v2_x0_5(num_classes=5), 32),
    "tv efficientnet": (
        lambda: torchvision.models.efficientnet_b0(stochastic_depth_prob=0.0, num_classes=5),
        32,
    ),
    "tv squeezenet": (lambda: torchvision.models.squeezenet1_1(num_classes=5), 32),
    "tv regnet": (lambda: torchvision.models.regnet_y_400mf(num_classes=5), 32),
    "tv resnext": (
        lambda: torchvision.models.ResNet(
            torchvision.models.resnet.Bottleneck, [1, 1, 1, 1], 5, groups=4, width_per_group=8
        ),
        32,
    ),
}
FAMILIES = [(name, "all" if i % 2 else "paper", bool(i % 3)) for i, name in enumerate(NETS)]
FAMILIES += [("resnet20", "all", False), ("mobilenet_v2", "paper", True), ("vgg16", "all", True)]


@pytest.mark.parametrize("kernels", BACKENDS)
@pytest.mark.parametrize(("name", "scope", "channels_last"), FAMILIES)
def test_gated_network_with_gates_at_one_equals_the_model(name, scope, channels_last, kernels):
    make, size = NETS[name]
    model = shaken(make())
    # Few values a channel would make batch statistics ill-conditioned: batch norm divides by a variance near 0.
    x = torch.randn(8, 3, size, size, dtype=torch.float64)
    network, _ = gate(model, x, kernels, scope=scope, channels_last=channels_last, track=True)
    placed = x.contiguous(memory_format=torch.channels_last) if channels_last else x

    network.eval(), model.eval()
    assert_same(network(placed), model(x))
    network.train(), model.train()
    assert_same(network(placed), model(x))  # this updates the running statistics of both
    found = dict(network.root.named_buffers())
    for key, buffer in model.named_buffers():
        if key in found:
            assert (found[key] - buffer).abs().max() <= 1e-12 * buffer.abs().max(), key
    network.eval(), model.eval()
    assert_same(network(placed), model(x))


def test_gated_network_leaves_running_statistics_alone_unless_asked():
    model = shaken(nn.Sequential(cbr(3, 4), head(4)))
    x = torch.randn(3, 3, 6, 6, dtype=torch.float64)
    network, _ = gate(model, x)
    network(x)
    for key, buffer in network.root.named_buffers():
        assert torch.equal(buffer, dict(model.named_buffers())[key])


def test_gated_network_tracks_the_cumulative_average():
    model = nn.Sequential(conv(3, 4), nn.BatchNorm2d(4, momentum=None), head(4)).double()
    x = torch.randn(3, 3, 6, 6, dtype=torch.float64)
    network, _ = gate(model, x, track=True)
    for scale in (1.0, 2.0, 3.0):
        network(scale * x), model(scale * x)
    torch.testing.assert_close(
        dict(network.root.named_buffers())["1.running_var"], model[1].running_var
    )


def in_place_alias(m, x):
    y = m.a(x)
    y.add_(m.n(m.b(x)))
    return m.fc(y)  # reads the sum under its old name


def late_residual(m, x):
    out = m.n(m.a(x))
    identity = m.k(m.b(x))
    out += identity
    return m.fc(F.relu(out, inplace=True))


FORMS = {
    "sum written into an operand that is read later": Net(
        in_place_alias, a=conv(3, 4), b=conv(3, 4), n=nn.BatchNorm2d(4), fc=head(4)
    ),
    "other operand computed after the norm": Net(
        late_residual, a=conv(3, 4), b=conv(3, 4), n=nn.BatchNorm2d(4), k=nn.BatchNorm2d(4), fc=head(4)
    ),
    "norm read twice": Net(
        lambda m, x: (lambda y: m.fc(F.relu(y) + y))(m.n(m.a(x))), a=conv(3, 4), n=nn.BatchNorm2d(4), fc=head(4)
    ),
    "norm added to itself": Net(
        lambda m, x: (lambda y: m.fc(F.relu(y + y)))(m.n(m.a(x))), a=conv(3, 4), n=nn.BatchNorm2d(4), fc=head(4)
    ),
    "sum with alpha": Net(
        lambda m, x: m.fc(torch.add(m.n(m.a(x)), m.b(x), alpha=2)), a=conv(3, 4), b=conv(3, 4), n=nn.BatchNorm2d(4), fc=head(4)
    ),
    "sum of two dtypes": Net(
        lambda m, x: m.fc(m.d(F.relu(m.n(m.a(x)) + m.b(x).double()))), a=conv(3, 4), b=conv(3, 4), n=nn.BatchNorm2d(4), d=conv(4, 4), fc=head(4)
    ),
    "names that differ in a dot only": Net(
        lambda m, x: m.fc(F.relu(m.n_0(m.a(x))) + F.relu(m.n[0](m.b(x)))), a=conv(3, 4), b=conv(3, 4), n=nn.Sequential(nn.BatchNorm2d(4, eps=1.0)), n_0=nn.BatchNorm2d(4), fc=head(4)
    ),
    "keyword inputs": Net(
        lambda m, x: m.fc(F.relu(input=m.n(input=m.a(input=m.b(input=x))))), a=conv(5, 4), b=conv(3, 5), n=nn.BatchNorm2d(4), fc=head(4)
    ),
    "the same norm with two activations": Net(
        lambda m, x: m.fc(torch.cat([F.relu(m.n(m.a(x))), F.silu(m.n(m.a(2 * x)))], 1)), a=conv(3, 4), n=nn.BatchNorm2d(4), fc=head(8)
    ),
    "padding that is not zeros": nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding="same"), head(4)
    ),
    "transposed, one-dimensional": nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 5, 2), nn.BatchNorm2d(5), nn.Flatten(2), nn.Conv1d(5, 4, 3), nn.BatchNorm1d(4), nn.Flatten(), nn.Linear(56, 3)
    ),
    "no affine parameters, no running statistics": nn.Sequential(
        conv(3, 4), nn.BatchNorm2d(4, affine=False), conv(4, 5), nn.BatchNorm2d(5, track_running_stats=False), nn.Hardswish(), head(5)
    ),
    "parameters read in the forward": Net(
        lambda m, x: m.fc(F.relu(m.b(m.a(x) * m.scale)) + m.shift), a=conv(3, 4), b=conv(4, 4), scale=nn.Parameter(torch.tensor(2.0)), shift=nn.Parameter(torch.ones(4, 1, 1)), fc=head(4)
    ),
    "train and eval forward differ": Net(
        lambda m, x: m.fc(F.relu(m.n(m.a(x)))) if m.training else m.fc(2 * F.relu(m.n(m.a(x)))), a=conv(3, 4), n=nn.BatchNorm2d(4), fc=head(4)
    ),
    "norms of other kinds": nn.Sequential(
        conv(3, 4), nn.GroupNorm(2, 4), nn.ReLU(), conv(4, 6), nn.InstanceNorm2d(6, affine=True), nn.PReLU(6),
        conv(6, 4), torchvision.ops.FrozenBatchNorm2d(4), nn.SiLU(), conv(4, 6), nn.GLU(1), head(3)
    ),
    "transposed convolutions and shuffles": nn.Sequential(
        cbr(3, 8), nn.PixelShuffle(2), nn.ConvTranspose2d(2, 6, 3, groups=2), nn.ReLU(), nn.ChannelShuffle(3),
        nn.PixelUnshuffle(2), conv(24, 4), head(4)
    ),
    "functional forms": Net(
        lambda m, x: m.fc(F.relu(F.conv2d(F.relu(m.a(x)), m.b.weight, m.b.bias, padding=1))),
        a=conv(3, 4), b=nn.Conv2d(4, 5, 3, padding=1), fc=head(5)
    ),
    "view in channels_last": Net(
        lambda m, x: m.fc((lambda y: y.view(y.size(0), -1))(F.relu(m.a(x)))), a=conv(3, 4), fc=nn.Linear(100, 4)
    ),
    "dict of outputs": Net(
        lambda m, x: {"logits": m.fc(m.n(m.a(x))), "features": m.b(x)}, a=conv(3, 4), b=conv(3, 4), n=nn.BatchNorm2d(4), fc=head(4)
    ),
}  # fmt: skip


@pytest.mark.parametrize("kernels", BACKENDS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_gated_network_equals_every_form_of_model(form, kernels):
    model = copy.deepcopy(FORMS[form]).double()
    x = torch.randn(3, 3, 5, 5, dtype=torch.float64)
    network, _ = gate(model, x, kernels, track=True)
    for mode in (True, False):
        network.train(mode), model.train(mode)
        assert_same(network(x), model(x))


def test_gated_network_runs_hooks_that_change_what_a_layer_gives():
    model = nn.Sequential(cbr(3, 4), conv(4, 5), nn.BatchNorm2d(5), conv(5, 4), head(4)).double()
    model[1].register_forward_hook(lambda m, args, y: 2 * y + 1)
    model[2].register_forward_pre_hook(lambda m, args: (args[0].square(),))
    x = torch.randn(3, 3, 5, 5, dtype=torch.float64)
    network, _ = gate(model, x)
    assert_same(network(x), model(x))


@pytest.mark.parametrize("kernels", BACKENDS)
def test_gated_network_multiplies_before_the_sum_and_the_activation(kernels):
    model = Net(
        late_residual,
        a=conv(3, 4),
        b=conv(3, 4),
        n=nn.BatchNorm2d(4),
        k=nn.BatchNorm2d(4),
        fc=head(4),
    ).double()
    x = torch.randn(3, 3, 5, 5, dtype=torch.float64)
    network, bank = gate(model, x, kernels)
    gates = torch.rand(4, dtype=torch.float64)
    bank.state.values.copy_(gates)
    g = gates.view(1, -1, 1, 1)
    expected = model.fc(F.relu(g * model.n(model.a(x)) + g * model.k(model.b(x))))
    assert_same(network(x), expected)


@pytest.mark.parametrize("kernels", BACKENDS)
def test_gated_network_gradients_equal_autograd_of_a_multiplication(kernels):
    model = shaken(nn.Sequential(conv(3, 4), nn.ReLU(), cbr(4, 5), head(5)))
    x = torch.randn(3, 3, 5, 5, dtype=torch.float64)
    network, bank = gate(model, x, kernels)
    gates = torch.rand(9, dtype=torch.float64, requires_grad=True)
    bank.state.values.copy_(gates.detach())
    network(x).square().sum().backward()
    y = F.relu(model[0](x) * gates[:4].view(1, -1, 1, 1))
    y = F.relu(model[2][1](model[2][0](y)) * gates[4:].view(1, -1, 1, 1))
    model[3](y).square().sum().backward()
    torch.testing.assert_close(bank.grad, gates.grad, rtol=1e-10, atol=1e-12)


def test_gated_network_freezes_weights_and_spares_the_model():
    model = nn.Sequential(cbr(3, 4), head(4))
    network, bank = gate(model, torch.zeros(2, 3, 5, 5), dtype=torch.bfloat16)
    assert not any(p.requires_grad for p in network.parameters())
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())
    assert network.root.get_parameter("0.0.weight").dtype == torch.bfloat16
    assert network.root.get_parameter("0.1.weight").dtype == torch.float32
    network(torch.randn(2, 3, 5, 5).bfloat16()).float().sum().backward()
    assert bank.grad.dtype == torch.float32
    assert all(p.grad is None for p in network.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_constants_of_both_forwards_have_the_dtype_of_the_network(dtype):
    """A tensor that the forward makes becomes a constant of each graph; dropout makes the two graphs differ."""

    def forward(m, x):
        return m.fc(m.drop(m.a(x - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1))))

    model = Net(forward, a=cbr(3, 4), drop=nn.Dropout(0.5), fc=head(4))
    network, _ = gate(model, (torch.zeros(2, 3, 6, 6),), dtype=dtype)
    assert network.train_net is not network.eval_net
    for mode in (True, False):
        y = network.train(mode)(torch.rand(2, 3, 6, 6).to(dtype))
        assert y.dtype == dtype


class NaiveGate(nn.Module):
    """Batch norm times gate, as the method is usually written."""

    def __init__(self, bn: nn.BatchNorm2d) -> None:
        super().__init__()
        self.bn, self.gate = bn, nn.Parameter(torch.ones(bn.num_features))

    def forward(self, x):
        return self.bn(x) * self.gate.view(1, -1, 1, 1)


def saved_maps(run, skip) -> dict[int, int]:
    """Bytes of everything above 1 KiB (so without vectors [C]) that a forward saves for its backward pass, by address."""
    found = {}

    def pack(t):
        storage = t.untyped_storage()
        if storage.nbytes() > 1024 and storage.data_ptr() not in skip:
            found[storage.data_ptr()] = storage.nbytes()
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        loss = run().sum()
    loss.backward()
    return found


def pointers(model: nn.Module) -> set[int]:
    return {p.untyped_storage().data_ptr() for p in model.parameters()}


@needs_ops
def test_gated_network_saves_a_third_of_the_naive_maps_and_no_convolution_input():
    layers = [cbr(8 if i else 3, 8) for i in range(6)]
    model = nn.Sequential(*layers, head(8))
    x = torch.randn(4, 3, 16, 16)
    network, _ = gate(model, x, ops, dtype=torch.float32)
    inputs = []
    for module in network.modules():
        if isinstance(module, FrozenConv):
            module.register_forward_hook(lambda _m, args, _y: inputs.append(args[0]))
    naive = copy.deepcopy(model)
    for block in naive[:6]:
        block[1] = NaiveGate(block[1])

    lean = saved_maps(lambda: network(x), pointers(network))
    fat = saved_maps(lambda: naive(x), pointers(naive))
    assert len(inputs) == 6
    assert not {t.untyped_storage().data_ptr() for t in inputs} & set(lean)
    one = 4 * 8 * 16 * 16 * 4
    assert sum(fat.values()) >= 6 * 3 * one
    assert sum(lean.values()) <= sum(fat.values()) / 3
    assert sum(lean.values()) <= 6 * one


@needs_ops
def test_gated_network_saves_one_map_and_a_bit_mask_for_a_residual_sum():
    model = Net(
        lambda m, x: (lambda y: m.fc(F.relu(m.n(m.b(y)) + y)))(m.a(x)), a=cbr(3, 8), b=conv(8, 8), n=nn.BatchNorm2d(8), fc=head(8)
    )  # fmt: skip
    x = torch.randn(4, 3, 32, 32)
    network, _ = gate(model, x, ops, dtype=torch.float32)
    one = 4 * 8 * 32 * 32 * 4
    lean = saved_maps(lambda: network(x), pointers(network))
    assert sum(lean.values()) <= 2 * one + one // 32


def test_fused_norms_swallow_the_sum_and_the_activation():
    """The graph of a ResNet is convolutions, fused norms, pool, flatten and linear: no separate add or ReLU is left."""
    model = pfs.models.resnet20(expansion=0.25)
    network, _ = gate(model, torch.zeros(2, 3, 16, 16))
    nodes = list(network.train_net.graph.nodes)
    assert not [
        n for n in nodes if n.op == "call_function" and n.target in (operator.add, operator.iadd)
    ]
    called = [n.target for n in nodes if n.op == "call_module"]
    assert not [name for name in called if "relu" in name and not name.startswith("_norm.")]
    assert sum(name.startswith("_norm.") for name in called) == 21
