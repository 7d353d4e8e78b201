"""What only a GPU can show: streams, graphs, packs and single values, huge tensors, no waiting for the host."""

from __future__ import annotations

import pytest
import torch
from cases import Case, Problem, assert_agree, make, run

from pfs_fast import _library, ops
from pfs_fast.ops import reference

GIB = 2**30


@pytest.fixture(autouse=True)
def needs_kernels():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if not _library.backends().cuda_compiled:
        pytest.skip(f"needs the CUDA operators: {_library.backends().cuda_reason}")


@pytest.fixture
def poisoned_memory():
    """Fresh memory holds NaN, so that an element which no kernel writes is seen."""
    torch.use_deterministic_algorithms(True)
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = before
    torch.use_deterministic_algorithms(False)


def shifted(x: torch.Tensor) -> torch.Tensor:
    """x at an address that is a multiple of its element size only."""
    buffer = x.new_empty(x.numel() + 1)
    moved = buffer[1:].as_strided(x.shape, x.stride())
    return moved.copy_(x.detach()).requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("act", ["relu", "silu"])
def test_packs_and_single_values_agree_with_twin(act, layout, dtype, poisoned_memory):
    for residual in (False, True):
        problem = make(Case((6, 24, 8, 4), layout), dtype, "cuda", residual)
        expected = run(reference.bn_gate_act, problem.double(), act=act)
        z_is_rounded = residual and act == "silu"
        assert_agree(run(ops.bn_gate_act, problem, act=act), expected, dtype, 1.0, z_is_rounded)
        single = Problem(**{**vars(problem), "x": shifted(problem.x)})
        assert_agree(run(ops.bn_gate_act, single, act=act), expected, dtype, 1.0, z_is_rounded)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(64, 40, 28, 28), (32, 37, 15, 15)], ids=str)
def test_repeated_runs_are_bitwise_equal(shape, layout):
    problem = make(Case(shape, layout), torch.float32, "cuda", residual=True)
    first = run(ops.bn_gate_act, problem)
    for _ in range(3):
        again = run(ops.bn_gate_act, problem)
        assert all(torch.equal(first[name], again[name]) for name in first)


class GateStep:
    """A fixed chain of all operators on fixed buffers, as a search step runs it."""

    def __init__(self, generator: torch.Generator) -> None:
        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, device="cuda")

        self.x = draw(16, 32, 8, 8).to(memory_format=torch.channels_last)
        self.weight = draw(32, 32, 3, 3) / 17
        self.grad_y = draw(16, 32, 8, 8)
        self.start = torch.rand(32, generator=generator, device="cuda")
        self.gates = self.start.clone()
        self.exp_avg, self.exp_avg_sq = torch.zeros_like(self.gates), torch.zeros_like(self.gates)
        self.step = torch.zeros(1, dtype=torch.int64, device="cuda")
        self.died_at = torch.full((32,), -1, dtype=torch.int32, device="cuda")

    def reset(self) -> None:
        self.gates.copy_(self.start)
        for state in (self.exp_avg, self.exp_avg_sq, self.step):
            state.zero_()
        self.died_at.fill_(-1)

    def run(self) -> None:
        gates = self.gates.detach().requires_grad_()
        y = ops.bn_gate_act(self.x, gates, act="relu")
        y = ops.bn_gate_act(ops.frozen_conv(y, self.weight, padding=1), gates, residual=y)
        (grad,) = torch.autograd.grad(y, gates, self.grad_y)
        state = (self.exp_avg, self.exp_avg_sq, self.step, self.died_at)
        ops.gate_step_(self.gates, grad, *state, gamma=0.5, target=0.3)


def test_whole_step_is_captured_in_a_cuda_graph():
    generator = torch.Generator("cuda").manual_seed(0)
    step = GateStep(generator)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step.run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step.run()
    # Values that the capture has not seen.
    step.x.normal_(generator=generator)
    step.reset()
    for _ in range(5):
        graph.replay()
    replayed = step.gates.clone()
    step.reset()
    for _ in range(5):
        step.run()
    assert step.step.item() == 5
    assert not torch.equal(replayed, step.start)
    # The convolution may choose another algorithm outside the graph.
    torch.testing.assert_close(replayed, step.gates, rtol=1e-3, atol=1e-4)


def test_operators_never_wait_for_the_device():
    step = GateStep(torch.Generator("cuda").manual_seed(0))
    step.run()
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        step.run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_work_goes_to_the_current_stream():
    x = torch.randn(64, 64, 32, 32, device="cuda")
    late = torch.full_like(x, float("nan"))
    expected = ops.bn_gate_act(x)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        # On any other stream the kernels would run now, and read NaN.
        torch.cuda._sleep(100_000_000)
        late.copy_(x)
        y = ops.bn_gate_act(late)
    stream.synchronize()
    assert torch.equal(y, expected)


@pytest.mark.parametrize("shape", [(2**28 + 1, 8), (1, 2, 2**30 + 8), (2**28 + 1, 9)], ids=str)
def test_offsets_beyond_32_bits(shape):
    if torch.cuda.mem_get_info()[0] < 40 * GIB:
        pytest.skip("needs 40 GiB of free GPU memory")
    x = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    gate = torch.rand(shape[1], device="cuda")
    y, mean, var, _ = torch.ops.pfs_fast.bn_gate_act(
        x, gate, None, None, None, None, None, True, 1e-5, "relu"
    )
    channel_var, channel_mean = torch.var_mean(x.select(1, 1).float(), correction=0)
    torch.testing.assert_close(mean[1], channel_mean, rtol=0, atol=1e-5)
    torch.testing.assert_close(var[1], channel_var, rtol=1e-4, atol=0)
    per_channel = [1, shape[1]] + [1] * (x.dim() - 2)
    rstd = (var + 1e-5).rsqrt().view(per_channel)
    for last in (slice(0, 64), slice(-64, None)):
        where = (last,) if x.dim() == 2 else (slice(None), slice(None), last)
        z = (x[where].float() - mean.view(per_channel)) * rstd * gate.view(per_channel)
        torch.testing.assert_close(y[where].float(), z.relu(), rtol=2**-8, atol=1e-5)
    grads = torch.ops.pfs_fast._bn_gate_act_backward(
        y, x, mean, var, gate, None, None, torch.empty(0, dtype=torch.uint8, device="cuda"),
        True, 1e-5, "relu", False, [True, True, False, False, False],
    )  # fmt: skip
    assert grads[0].isfinite().all()
    # With grad_y = y = gate * max(xhat, 0): S2 = sum of gate * xhat * max(xhat, 0), about gate * M / 2.
    count = x.numel() / shape[1]
    torch.testing.assert_close(grads[1] / count, gate / 2, rtol=1e-2, atol=1e-3)
