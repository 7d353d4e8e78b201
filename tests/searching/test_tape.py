"""Recorded operator calls: replays do the same sums on new inputs, hold no memory, and are refused where they could be stale."""

from __future__ import annotations

import weakref

import pytest
import torch
from small_nets import Net, cbr, head, tiny
from torch import fx, nn

from pfs_fast import _library
from pfs_fast.searching.tape import NotRecordedError, Tape, foreign_code, record

needs_library = pytest.mark.skipif(
    not _library.backends().cpu, reason=f"no compiled library: {_library.backends().cpu_reason}"
)


def recorded(work, inputs, fixed=()) -> Tape:
    outputs, tape = record(work, inputs, fixed)
    assert isinstance(tape, Tape), tape
    for output, expected in zip(outputs, work(*inputs), strict=True):
        assert torch.equal(output, expected)
    return tape


def check(work, make_inputs, fixed=()) -> Tape:
    """Replays on new inputs against the work itself."""
    tape = recorded(work, make_inputs(), fixed)
    for _ in range(2):
        inputs = make_inputs()
        for found, expected in zip(tape.replay(*inputs), work(*inputs), strict=True):
            assert torch.equal(found, expected)
            assert found.stride() == expected.stride()
    return tape


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64)


def lists(x):
    a, b = torch.cat([x, 2 * x, torch.ones_like(x)], 1).split([4, 5], 1)
    return torch.stack([a.sum(), b.sum()]), a


def views(x):
    x = x + 1
    y = x.t()[1:]
    y.add_(1.0)  # shows in x
    return x * 2, y.contiguous()


def indices(x):
    order = torch.arange(2).flip(0)
    return x[:, order], x[None, order]


def arithmetic(x):
    return torch.addmm(x, x, x, alpha=0.5) / 3 + 1, (x > 0).to(torch.int64).sum(0)


def through_autograd(x):
    w = x.detach().clone().requires_grad_()
    (torch.sigmoid(w) * torch.log_softmax(w @ x, 1)).sum().backward()
    return (w.grad,)


# -- replays -------------------------------------------------------------------------------------------------------


@needs_library
@pytest.mark.parametrize("work", [lists, views, indices, arithmetic, through_autograd])
def test_replay_does_the_work_on_new_inputs(work):
    check(work, lambda: (numbers(3, 3),))


@needs_library
def test_replay_reads_and_writes_fixed_tensors_where_they_are():
    weight, total = numbers(3), torch.zeros(3, dtype=torch.float64)

    def work(x):
        total.add_(x * weight[:])
        return (total.clone(),)

    x = numbers(3)
    outputs, tape = record(work, (x,), [weight, total])
    assert torch.equal(outputs[0], x * weight)
    weight.mul_(2)
    total.zero_()
    assert torch.equal(tape.replay(x)[0], x * weight)
    assert torch.equal(tape.replay(x)[0], 2 * x * weight)
    assert torch.equal(total, 2 * x * weight)


@needs_library
def test_replay_draws_new_random_numbers():
    tape = record(lambda x: (torch.dropout(x, 0.5, train=True),), (torch.ones(64),), [])[1]
    torch.manual_seed(0)
    first, second = tape.replay(torch.ones(64))[0], tape.replay(torch.ones(64))[0]
    torch.manual_seed(0)
    assert torch.equal(first, torch.dropout(torch.ones(64), 0.5, train=True))
    assert not torch.equal(first, second)


@needs_library
def test_replay_casts_where_the_work_did_and_nowhere_else():
    weight = torch.randn(3, 3)

    def work(x):
        with torch.autocast("cpu", enabled=False):
            whole = x @ weight
        return x @ weight, whole

    with torch.autocast("cpu", dtype=torch.bfloat16):
        tape = recorded(work, (torch.randn(2, 3),), [weight])
        x = torch.randn(2, 3)
        expected, inside = work(x), tape.replay(x)
    for found in (inside, tape.replay(x)):
        assert [y.dtype for y in found] == [torch.bfloat16, torch.float32]
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@needs_library
def test_replay_gives_back_an_input():
    tape = recorded(lambda x: (x,), (numbers(2),))
    x = numbers(2)
    assert tape.replay(x)[0] is x
    assert tape.num_calls == 0


@needs_library
def test_neither_recording_nor_tape_keeps_what_the_work_has_let_go():
    made: list[weakref.ref] = []
    alive: list[int] = []

    def work(x):
        for _ in range(3):
            x = x * 2
            made.append(weakref.ref(x))
            alive.append(sum(ref() is not None for ref in made))
        return (x.sum(),)

    tape = record(work, (numbers(3),), [])[1]
    assert isinstance(tape, Tape)
    assert alive == [1, 1, 1]
    assert all(ref() is None for ref in made)
    x = numbers(3)
    given = weakref.ref(x)
    tape.replay(x)
    del x
    assert given() is None


@needs_library
def test_wrong_number_of_inputs_is_refused():
    tape = recorded(lambda x, y: (x + y,), (numbers(2), numbers(2)))
    with pytest.raises(ValueError, match=r"Tape\.replay: inputs must be 2 tensors, got 1"):
        tape.replay(numbers(2))


@needs_library
def test_error_of_an_operator_in_a_replay_is_that_operators():
    tape = recorded(lambda x: (x @ x,), (numbers(3, 3),))
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        tape.replay(numbers(2, 3))
    x = numbers(3, 3)
    assert torch.equal(tape.replay(x)[0], x @ x)


# -- what cannot be repeated ---------------------------------------------------------------------------------------

OUTSIDE = torch.ones(3, dtype=torch.float64)


@needs_library
@pytest.mark.parametrize(
    ("work", "reason"),
    [
        (lambda x: (x * float(x.sum()),), "_local_scalar_dense.default looks at the values"),
        (lambda x: (x[x > 0],), "index.Tensor looks at the values"),
        (lambda x: (x.nonzero(),), "nonzero.default looks at the values"),
        (lambda x: (x * OUTSIDE,), r"aten::mul.Tensor reads a tensor of shape \[3\] that no"),
        (lambda x: (torch.cat([x, OUTSIDE]),), r"aten::cat reads a tensor of shape \[3\] that no"),
        (lambda x: (x * torch.from_numpy(x.numpy().copy()),), "reads a tensor of shape"),
        (lambda x: (OUTSIDE,), r"an output of shape \[3\] is a tensor that no operator"),
    ],
)
def test_work_that_could_be_stale_is_done_but_not_recorded(work, reason):
    x = numbers(3)
    outputs, tape = record(work, (x,), [])
    assert torch.equal(outputs[0], work(x)[0])
    assert isinstance(tape, NotRecordedError)
    with pytest.raises(NotRecordedError, match=reason):
        raise tape


def doubled(x):
    return 2 * x


fx.wrap("doubled")


class Own(nn.Module):
    def forward(self, x):
        return x


def traced(model: nn.Module) -> fx.GraphModule:
    class Tracer(fx.Tracer):
        def is_leaf_module(self, m, name):
            return isinstance(m, Own) or super().is_leaf_module(m, name)

    return fx.GraphModule(model, Tracer().trace(model))


def test_python_that_a_tape_would_leave_out_is_named():
    assert foreign_code(traced(tiny())) is None
    wrapped = Net(lambda m, x: m.fc(doubled(m.a(x))), a=cbr(3, 4), fc=head(4))
    assert foreign_code(traced(wrapped)) == "the function 'doubled' at 'doubled'"
    own = nn.Sequential(cbr(3, 4), Own())
    assert foreign_code(traced(own)) == "the module '1', a Own"
    hooks = {
        "register_forward_hook": lambda m, x, y: None,
        "register_forward_pre_hook": lambda m, x: None,
        "register_full_backward_hook": lambda m, x, y: None,
        "register_full_backward_pre_hook": lambda m, y: None,
    }
    for register, hook in hooks.items():
        model = tiny()
        getattr(model[0][1], register)(hook)
        assert foreign_code(traced(model)) == "a hook of '0.1'"
