"""bn_gate_act equals its twin: outputs, gradients, layouts, statistics."""

from __future__ import annotations

import pytest
import torch
from cases import ACTS, CASES, DTYPES, EMPTY_CASES, Case, assert_agree, make, run
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._prims_common import suggest_memory_format

from pfs_fast import ops
from pfs_fast.ops import reference


def check(problem, dtype, **options):
    expected = run(reference.bn_gate_act, problem.double(), **options)
    stored_z = problem.residual is not None and options.get("act") in ("silu", "hardswish")
    got = run(ops.bn_gate_act, problem, **options)
    assert_agree(got, expected, dtype, problem.slack, stored_z and dtype != torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_shapes_agree_with_twin(case, dtype, device):
    check(make(case, dtype, device), dtype, act="relu")
    check(make(case, dtype, device, residual=True), dtype, act="relu")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", ACTS)
def test_activations_agree_with_twin(act, dtype, residual, training, device):
    for layout in ("contiguous", "channels_last"):
        problem = make(Case((3, 19, 5, 6), layout), dtype, device, residual)
        check(problem, dtype, act=act, training=training)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_eval_shapes_agree_with_twin(case, device):
    check(make(case, torch.float32, device, True), torch.float32, act="relu6", training=False)


@pytest.mark.parametrize("parts", [(), ("gate",), ("weight", "bias"), ("bias",)], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_absent_arguments_count_as_identity(parts, training, device):
    problem = make(Case((3, 9, 4, 5)), torch.float64, device, parts=parts)
    check(problem, torch.float64, act="silu", training=training)


def test_float16_agrees_with_twin_on_cuda(device):
    if device == "cpu":
        pytest.skip("float16 is supported on CUDA only")
    check(make(Case((3, 17, 5, 6), "channels_last"), torch.float16, device, True), torch.float16)


@pytest.mark.parametrize("case", EMPTY_CASES, ids=str)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("residual", [False, True])
def test_empty_inputs_give_empty_outputs_and_zero_gradients(case, training, residual, device):
    for act in ("relu", "silu"):
        problem = make(case, torch.float32, device, residual)
        got = run(ops.bn_gate_act, problem, training=training, act=act)
        assert got["y"].shape == case.shape
        for name in ("grad_gate", "grad_weight", "grad_bias"):
            assert torch.equal(got[name], torch.zeros_like(got[name])), name


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_large_mean_survives_in_float32(layout, device):
    problem = make(Case((8, 12, 16, 16), layout), torch.float32, device, mean=1e4)
    got = run(ops.bn_gate_act, problem, act="identity")
    expected = run(reference.bn_gate_act, problem.double(), act="identity")
    # The mean itself is a float32: half a unit of 1e4 is 5e-4, against a standard deviation of 1.
    # E[x^2] - E[x]^2 would be off by about 6.
    torch.testing.assert_close(got["y"].double(), expected["y"], rtol=0, atol=2e-3)
    torch.testing.assert_close(
        got["grad_gate"].double(), expected["grad_gate"], rtol=2e-3, atol=0.1
    )
    _, _, var, _ = torch.ops.pfs_fast.bn_gate_act(
        problem.x, None, None, None, None, None, None, True, 1e-5, "relu"
    )
    target = problem.x.double().var((0, 2, 3), unbiased=False)
    torch.testing.assert_close(var.double(), target, rtol=1e-4, atol=0)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_output_and_gradient_keep_the_layout_of_x(case, device):
    problem = make(case, torch.float32, device, residual=True)
    got = run(ops.bn_gate_act, problem)
    wanted = suggest_memory_format(problem.x)
    for name in ("y", "grad_x", "grad_residual"):
        assert got[name].is_contiguous(memory_format=wanted), name


def test_residual_and_gradient_of_another_layout_are_accepted(device):
    problem = make(Case((3, 8, 5, 6), "channels_last"), torch.float64, device, residual=True)
    assert not problem.grad_y.is_contiguous(memory_format=torch.channels_last)
    residual = problem.residual.detach().contiguous().requires_grad_()
    check(type(problem)(**{**vars(problem), "residual": residual}), torch.float64, act="relu")


@pytest.mark.parametrize("momentum", [0.1, 1.0])
def test_running_statistics_move_as_in_batch_norm(momentum, device):
    norm = nn.BatchNorm2d(5, momentum=momentum, dtype=torch.float64, device=device)
    x = torch.randn(4, 5, 3, 3, dtype=torch.float64, device=device)
    mean, var = norm.running_mean.clone(), norm.running_var.clone()
    norm(x)
    for op in (ops.bn_gate_act, reference.bn_gate_act):
        own_mean, own_var = mean.clone(), var.clone()
        op(x, running_mean=own_mean, running_var=own_var, momentum=momentum)
        torch.testing.assert_close(own_mean, norm.running_mean, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(own_var, norm.running_var, rtol=1e-12, atol=1e-12)


def test_running_statistics_stay_without_momentum_or_training(device):
    problem = make(Case((4, 5, 3, 3)), torch.float32, device)
    before = problem.running_mean.clone(), problem.running_var.clone()
    statistics = {"running_mean": problem.running_mean, "running_var": problem.running_var}
    ops.bn_gate_act(problem.x, **statistics)
    ops.bn_gate_act(problem.x, **statistics, training=False, momentum=0.1)
    assert torch.equal(before[0], problem.running_mean)
    assert torch.equal(before[1], problem.running_var)


def test_equals_batch_norm_times_gate(device):
    norm = nn.BatchNorm2d(6, dtype=torch.float64, device=device)
    x = torch.randn(4, 6, 3, 5, dtype=torch.float64, device=device)
    gate = torch.rand(6, dtype=torch.float64, device=device)
    expected = torch.relu(norm(x) * gate.view(1, -1, 1, 1))
    torch.testing.assert_close(ops.bn_gate_act(x, gate, norm.weight, norm.bias), expected)


@pytest.mark.parametrize("act", ["relu", "relu6"])
def test_closed_gate_passes_no_gradient(act, device):
    """A gate at 0 makes z = 0, where the derivative of relu and relu6 is 0."""
    problem = make(Case((3, 4, 5, 5)), torch.float32, device)
    with torch.no_grad():
        problem.gate[1] = 0
    got = run(ops.bn_gate_act, problem, act=act)
    assert got["y"][:, 1].abs().max() == 0
    assert got["grad_x"][:, 1].abs().max() == 0
    assert got["grad_gate"][1] == 0 and got["grad_bias"][1] == 0


@pytest.mark.parametrize("name", ["x", "gate", "weight", "bias", "residual"])
def test_single_gradients_agree_with_twin(name, device):
    problem = make(Case((3, 5, 4, 4)), torch.float64, device, residual=True)
    for other in ("x", "gate", "weight", "bias", "residual"):
        getattr(problem, other).requires_grad_(other == name)
    for act in ("relu", "silu"):
        check(problem, torch.float64, act=act)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("act", ACTS)
def test_gradcheck(act, training, device):
    for residual in (False, True):
        problem = make(Case((3, 2, 2, 2)), torch.float64, device, residual)

        def call(*inputs, problem=problem):
            return ops.bn_gate_act(
                *inputs, problem.running_mean, problem.running_var, training=training, act=act
            )

        assert torch.autograd.gradcheck(call, problem.inputs)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    sizes=st.tuples(st.integers(2, 5), st.integers(1, 70), st.integers(1, 9), st.integers(1, 9)),
    layout=st.sampled_from(["contiguous", "channels_last", "sliced", "permuted"]),
    act=st.sampled_from(ACTS),
    residual=st.booleans(),
    training=st.booleans(),
)
def test_random_shapes_agree_with_twin(sizes, layout, act, residual, training):
    problem = make(Case(sizes, layout, slack=100.0), torch.float64, "cpu", residual)
    check(problem, torch.float64, act=act, training=training)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_result_does_not_depend_on_number_of_threads(layout, dtype):
    problem = make(Case((32, 24, 15, 15), layout), dtype, residual=True)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(ops.bn_gate_act, problem, act="relu"))
    finally:
        torch.set_num_threads(before)
    for name, value in results[0].items():
        for other in results[1:]:
            assert torch.equal(value, other[name]), name


def test_nan_reaches_the_output(device):
    problem = make(Case((3, 4, 5, 5)), torch.float32, device)
    with torch.no_grad():
        problem.x[0, 2, 1, 1] = float("nan")
    y = ops.bn_gate_act(problem.x.detach())
    assert y[:, 2].isnan().all() and not y[:, [0, 1, 3]].isnan().any()
