"""The operators behave as PyTorch's own: tracing, compiling, autocast, saved tensors, modes."""

from __future__ import annotations

import pytest
import torch
from cases import Case, make
from torch.autograd.graph import saved_tensors_hooks

from pfs_fast import _library, ops
from pfs_fast.ops import reference

if not _library.is_loaded():
    pytest.skip("needs the compiled operators", allow_module_level=True)

library = torch.ops.pfs_fast
LAYOUT_CASES = [
    Case((3, 6, 4, 5)),
    Case((3, 6, 4, 5), "channels_last"),
    Case((4, 1, 5, 5), "channels_last"),
    Case((3, 4, 6, 6), "sliced"),
    Case((3, 4, 6, 6), "sliced_channels_last"),
    Case((3, 4, 6, 6), "permuted"),
    Case((5, 7, 1, 1)),
    Case((5, 7)),
    Case((3, 5, 4, 3, 2), "channels_last"),
]


def arguments(case, device, residual=True, training=True, act="relu", dtype=torch.float64):
    problem = make(case, dtype, device, residual)
    statistics = (problem.running_mean, problem.running_var)
    return (*problem.inputs, *statistics, training, 1e-5, act)


@pytest.mark.parametrize("case", LAYOUT_CASES, ids=str)
def test_opcheck_bn_gate_act_layouts(case, device):
    torch.library.opcheck(library.bn_gate_act, arguments(case, device))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("act", ["identity", "relu", "relu6", "silu", "hardswish"])
def test_opcheck_bn_gate_act_options(act, residual, training, device):
    case = Case((3, 6, 4, 5), "channels_last")
    for dtype in (torch.float32, torch.float64):
        args = arguments(case, device, residual, training, act, dtype)
        torch.library.opcheck(library.bn_gate_act, args)


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("act", ["relu", "silu"])
def test_opcheck_bn_gate_act_backward(act, residual, device):
    problem = make(Case((3, 6, 4, 5), "channels_last"), torch.float32, device, residual)
    x, gate, weight, bias, rest = [None if t is None else t.detach() for t in problem.inputs]
    _, mean, var, aux = library.bn_gate_act(
        x, gate, weight, bias, rest, None, None, True, 1e-5, act
    )
    for mask in ([True] * 5, [False, True, False, False, False]):
        mask[4] = mask[4] and residual
        torch.library.opcheck(
            library._bn_gate_act_backward,
            (
                problem.grad_y,
                x,
                mean,
                var,
                gate,
                weight,
                bias,
                aux,
                True,
                1e-5,
                act,
                residual,
                mask,
            ),
        )


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_opcheck_frozen_conv(layout, device):
    x = torch.randn(2, 4, 6, 5, device=device).contiguous(memory_format=layout).requires_grad_()
    weight = torch.randn(6, 2, 3, 3, device=device).contiguous(memory_format=layout)
    bias = torch.randn(6, device=device)
    torch.library.opcheck(library.frozen_conv, (x, weight, bias, [2, 2], [1, 1], [1, 1], 2))
    y = library.frozen_conv(x.detach(), weight, None, [2, 2], [1, 1], [1, 1], 2)
    torch.library.opcheck(
        library._frozen_conv_backward, (y, weight, x.shape, [2, 2], [1, 1], [1, 1], 2)
    )


def test_opcheck_gate_step(device):
    gates = torch.rand(9, device=device)
    step = torch.ones(1, dtype=torch.int64, device=device)
    died_at = torch.full((9,), -1, dtype=torch.int32, device=device)
    moments = (torch.zeros_like(gates), torch.zeros_like(gates))
    torch.library.opcheck(
        library.gate_step_,
        (
            gates,
            torch.randn_like(gates),
            *moments,
            step,
            died_at,
            0.01,
            0.9,
            0.999,
            1e-8,
            0.5,
            0.5,
            9,
        ),
    )


def gated_layer(x, weight, gate, module=ops):
    y = module.frozen_conv(x, weight, stride=1, padding=1)
    y = module.bn_gate_act(y, gate, residual=x, act="relu")
    return module.bn_gate_act(y, act="silu")


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning:torch")
@pytest.mark.filterwarnings(
    "ignore:TensorFloat32 tensor cores:UserWarning"
)  # advice of older versions
def test_compiles_without_graph_breaks(backend, device):
    torch.compiler.reset()
    x = torch.randn(2, 4, 5, 5, device=device, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 4, 3, 3, device=device, dtype=torch.float64)
    gate = torch.rand(4, device=device, dtype=torch.float64, requires_grad=True)
    compiled = torch.compile(gated_layer, fullgraph=True, backend=backend)
    grad_y = torch.randn_like(x)
    got = torch.autograd.grad(compiled(x, weight, gate), (x, gate), grad_y)
    expected = torch.autograd.grad(gated_layer(x, weight, gate, reference), (x, gate), grad_y)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def test_gate_step_compiles_without_graph_breaks(device):
    torch.compiler.reset()

    def step(gates, grad, m, v, count, died_at):
        ops.gate_step_(gates, grad, m, v, count, died_at, gamma=0.5, target=0.5)
        return gates * 2

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        gates = torch.linspace(0, 1, 7, device=device)
        count = torch.zeros(1, dtype=torch.int64, device=device)
        died_at = torch.full((7,), -1, dtype=torch.int32, device=device)
        tensors = (gates, torch.ones_like(gates), torch.zeros_like(gates), torch.zeros_like(gates))
        results.append((function(*tensors, count, died_at), gates, count, died_at))
    torch.testing.assert_close(results[0], results[1])
    assert results[1][2].item() == 1


def saved_bytes(run):
    """Bytes of the distinct storages that autograd keeps."""
    kept = {}
    with saved_tensors_hooks(
        lambda t: kept.__setitem__(t.data_ptr(), t.numel() * t.element_size()) or t, lambda t: t
    ):
        result = run()
    return sum(kept.values()), result


@pytest.mark.parametrize("act", ["identity", "relu", "relu6", "silu", "hardswish"])
def test_saves_x_and_nothing_of_its_size(act, device):
    problem = make(Case((4, 16, 16, 16), "channels_last"), torch.float32, device)
    per_channel = 5 * 16 * 4  # gate, weight, bias, mean, var
    image = problem.x.numel() * 4
    assert saved_bytes(lambda: ops.bn_gate_act(*problem.inputs, act=act))[0] == image + per_channel


def test_residual_relu_saves_one_more_bit_per_value(device):
    problem = make(Case((4, 16, 16, 16)), torch.float32, device, residual=True)
    image, bits, per_channel = problem.x.numel() * 4, problem.x.numel() // 8, 5 * 16 * 4
    size, _ = saved_bytes(lambda: ops.bn_gate_act(*problem.inputs, act="relu"))
    assert size == image + bits + per_channel


def test_saved_bytes_are_at_most_a_third_of_the_plain_chain(device):
    x = torch.randn(4, 16, 16, 16, device=device, requires_grad=True)
    weight = torch.randn(16, 16, 3, 3, device=device)
    gate = torch.ones(16, device=device, requires_grad=True)
    norm = torch.nn.BatchNorm2d(16, device=device).requires_grad_(False)

    def plain():
        z = norm(torch.nn.functional.conv2d(x * 1, weight.clone().requires_grad_(), padding=1))
        return torch.relu(z * gate.view(1, -1, 1, 1))

    def fused():
        return ops.bn_gate_act(ops.frozen_conv(x * 1, weight, padding=1), gate)

    # The plain chain keeps the convolution's input and output, the normalised and the final map.
    assert saved_bytes(fused)[0] * 3 <= saved_bytes(plain)[0]


@pytest.mark.parametrize("op", ["bn_gate_act", "frozen_conv"])
def test_double_backward_is_refused_by_name(op, device):
    x = torch.randn(2, 4, 5, 5, device=device, requires_grad=True)
    if op == "bn_gate_act":
        y = ops.bn_gate_act(x, act="silu")
    else:
        y = ops.frozen_conv(x, torch.randn(4, 4, 3, 3, device=device))
    grad_y = torch.ones_like(y).requires_grad_()
    (grad_x,) = torch.autograd.grad(y, x, grad_y, create_graph=True)
    with pytest.raises(RuntimeError, match=f"{op}: the gradient must be taken once"):
        grad_x.square().sum().backward()


def test_inference_mode_computes_and_checks(device):
    problem = make(Case((3, 6, 4, 5)), torch.float32, device)
    expected = ops.bn_gate_act(*problem.inputs)
    with torch.inference_mode():
        assert torch.equal(ops.bn_gate_act(*problem.inputs), expected)
        with pytest.raises(ValueError, match="gate must have shape"):
            ops.bn_gate_act(problem.x, torch.ones(7, device=device))


def test_nothing_is_recorded_without_a_gradient(device):
    x = torch.randn(2, 4, 5, 5, device=device)
    assert not ops.bn_gate_act(x, torch.ones(4, device=device)).requires_grad
    with torch.no_grad():
        assert not ops.bn_gate_act(x.requires_grad_()).requires_grad


def test_autocast_keeps_channel_values_in_float32(device):
    x = torch.randn(2, 4, 5, 5, device=device, requires_grad=True)
    weight = torch.randn(4, 4, 3, 3, device=device)
    gate = torch.rand(4, device=device, requires_grad=True)
    with torch.autocast(device, dtype=torch.bfloat16):
        hidden = ops.frozen_conv(x, weight, padding=1)
        y = ops.bn_gate_act(hidden, gate, residual=x)
        plain = ops.bn_gate_act(x, gate.bfloat16())
    assert hidden.dtype == torch.bfloat16 and y.dtype == torch.bfloat16
    assert plain.dtype == torch.float32
    lowered = x.bfloat16()
    expected = ops.bn_gate_act(
        ops.frozen_conv(lowered, weight.bfloat16(), padding=1), gate, residual=lowered
    )
    assert torch.equal(y, expected)
    y.sum().backward()
    assert x.grad.dtype == torch.float32 and gate.grad.dtype == torch.float32


def test_autocast_leaves_float64_alone(device):
    x = torch.randn(2, 4, 5, 5, device=device, dtype=torch.float64)
    weight = torch.randn(4, 4, 3, 3, device=device, dtype=torch.float64)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert ops.bn_gate_act(ops.frozen_conv(x, weight)).dtype == torch.float64


def test_forward_and_backward_do_not_change_inputs(device):
    problem = make(Case((3, 6, 4, 5)), torch.float32, device, residual=True)
    before = [t.detach().clone() for t in problem.inputs]
    ops.bn_gate_act(*problem.inputs).sum().backward()
    for now, then in zip(problem.inputs, before, strict=True):
        assert torch.equal(now, then)
