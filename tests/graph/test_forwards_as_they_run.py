"""The graph is that of the forward that runs: patched ones, own backwards, questions for the class, state kept on modules."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import types
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from small_nets import Frozen, Net, batches, cbr, conv, head
from torch import nn

import pfs_fast as pfs
from pfs_fast.errors import ModelError, TraceError
from pfs_fast.graph.analysis import analyse
from pfs_fast.graph.trace import trace

IMAGE = torch.zeros(1, 3, 6, 6)


def searched(model: nn.Module, **changes) -> pfs.SearchResult:
    options = {"epochs": 1, "backend": "reference", "precision": "fp32"} | changes
    return pfs.search(
        model, batches(1), 0.8, config=pfs.SearchConfig(**options), progress=False, device="cpu"
    )


def check_cut(model: nn.Module, **changes) -> None:
    """A search leaves the model alone, and its structure is proved on it."""
    frozen = Frozen(model)
    result = searched(model, **changes)
    frozen.check()
    assert pfs.verify(model, None, result.structure, torch.randn(2, 3, 6, 6)).passed


def prunable(model: nn.Module) -> dict[str, int]:
    return {group.name: group.size for group in analyse(model, IMAGE).groups}


def functions(model: nn.Module) -> list[str]:
    nodes = trace(model, IMAGE).train.graph.nodes
    return [getattr(n.target, "__name__", "") for n in nodes if n.op == "call_function"]


# -- forwards of an instance -----------------------------------------------------------------------------------------------


class TwoForwards(Net):
    def forward_short(self, x):
        return self.c(torch.tanh(self.a(x)))


def two_forwards() -> TwoForwards:
    return TwoForwards(lambda m, x: m.c(m.b(m.a(x))), a=cbr(3, 4), b=cbr(4, 4), c=head(4))


def test_forward_of_the_instance_is_the_one_that_is_traced():
    model = two_forwards()
    model.forward = model.forward_short
    assert functions(model) == ["tanh"]
    check_cut(model)


def test_forward_of_the_instance_may_take_other_inputs_than_that_of_the_class():
    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = cbr(3, 4), head(4)

        def forward(self, images, boxes, labels):
            raise AssertionError("not the forward that runs")

        def forward_features(self, x):
            return self.b(self.a(x))

    model = Detector()
    model.forward = model.forward_features
    assert prunable(model) == {"a.0": 4}


def test_forward_that_calls_another_copy_of_the_model_is_refused():
    model = two_forwards()
    model.forward = lambda x: model.c(model.a(x))  # the copies of a search would run this model
    with pytest.raises(TraceError, match="module is not installed as a submodule"):
        analyse(model, IMAGE)


def test_forward_of_a_layer_runs_once_and_as_it_was_set():
    model = two_forwards()
    layer = model.b[0]
    layer.forward = types.MethodType(
        lambda self, x: torch.sigmoid(F.conv2d(x, self.weight, padding=1)), layer
    )
    assert functions(model) == ["sigmoid"]
    check_cut(model)


# -- questions for the class -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ask",
    [
        lambda x: isinstance(x, torch.Tensor),
        lambda x: isinstance(x, (list, torch.Tensor)),
        torch.is_tensor,
        lambda x: torch.jit.isinstance(x, torch.Tensor),
        lambda x: isinstance(x.shape[1], int),
        lambda x: not isinstance(x, (list, tuple, int)),
    ],
    ids=["isinstance", "one of several", "is_tensor", "jit", "a size", "no list"],
)
def test_question_for_the_class_takes_the_branch_that_runs(ask):
    model = Net(
        lambda m, x: m.c(m.b(torch.sigmoid(m.a(x)) if ask(m.a(x)) else m.a(x))),
        a=cbr(3, 4),
        b=cbr(4, 4),
        c=head(4),
    )
    assert "sigmoid" in functions(model)
    check_cut(model)


def test_isinstance_is_itself_again_after_a_trace_that_fails():
    before = isinstance, torch.autograd.Function.apply
    with pytest.raises(TraceError):
        analyse(Net(lambda m, x: m.a(x) if x.sum() > 0 else x, a=cbr(3, 4)), IMAGE)
    import builtins

    assert builtins.isinstance is before[0]
    assert torch.autograd.Function.apply == before[1]


# -- functions with a backward of their own --------------------------------------------------------------------------------


class Reversed(torch.autograd.Function):
    """Its backward is not that of its forward."""

    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return -2 * grad


class Plain(Reversed):
    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


class Swish(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        s = torch.sigmoid(x)
        return grad * (s * (1 + x * (1 - s)))


class Both(torch.autograd.Function):
    """Two inputs, two outputs."""

    @staticmethod
    def forward(ctx, x, y):
        return x + y, x * 2

    @staticmethod
    def backward(ctx, first, second):
        return first + 2 * second, first


class Same(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x

    @staticmethod
    def backward(ctx, grad):
        return -grad


class Overwriting(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


def between(function: type[torch.autograd.Function]) -> Net:
    torch.manual_seed(0)
    return Net(lambda m, x: m.c(m.b(function.apply(m.a(x)))), a=cbr(3, 4), b=cbr(4, 4), c=head(4))


def first_moves(function: type[torch.autograd.Function], **changes) -> dict[str, torch.Tensor]:
    result = searched(between(function), gamma=0.0, gate_init=0.5, max_steps=1, **changes)
    return {name: torch.sign(gates - 0.5) for name, gates in result.gates.items()}


@pytest.mark.parametrize("backend", ["reference", "fused"])
def test_gates_before_a_function_get_the_gradient_of_its_own_backward(backend):
    plain, reverse = (first_moves(f, backend=backend) for f in (Plain, Reversed))
    assert plain["a.0"].abs().sum() == 4
    assert torch.equal(reverse["a.0"], -plain["a.0"])
    assert torch.equal(reverse["b.0"], plain["b.0"])


def test_function_that_returns_its_input_keeps_its_backward():
    moves = first_moves(Same)
    plain = searched(
        Net(lambda m, x: m.c(m.b(m.a(x))), **between(Same)._modules),
        gamma=0.0,
        gate_init=0.5,
        max_steps=1,
    )
    assert torch.equal(moves["a.0"], -torch.sign(plain.gates["a.0"] - 0.5))


@pytest.mark.parametrize("function", [Plain, Swish, Same])
def test_channels_go_through_a_function_as_through_its_forward(function):
    model = between(function)
    assert prunable(model) == {"a.0": 4, "b.0": 4}
    check_cut(model)


def test_function_whose_forward_is_not_traced_holds_its_channels():
    model = between(Overwriting)
    assert "not understood" in dict(analyse(model, IMAGE).fixed)["a.0"]
    check_cut(model)


def test_function_of_several_tensors_joins_their_channels():
    model = Net(
        lambda m, x: m.c(sum(Both.apply(m.a(x), m.b(x)))), a=cbr(3, 4), b=cbr(3, 4), c=head(4)
    )
    (group,) = analyse(model, IMAGE).groups
    assert group.producers == ("a.0", "b.0")
    check_cut(model, scope="all")


def test_function_that_calls_modules_is_one_node():
    class Calls(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, module):
            return module(x)

        @staticmethod
        def backward(ctx, grad):
            return grad, None

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = conv(4, 4)

        def forward(self, x):
            return Calls.apply(x, self.conv)

    model = nn.Sequential(cbr(3, 4), Block(), cbr(4, 4), head(4))
    groups = analyse(model, IMAGE)
    assert "module '1' (Block) cannot be traced" in dict(groups.fixed)["0.0"]
    check_cut(model)


# -- what a forward keeps on its modules -----------------------------------------------------------------------------------


class Mean(nn.Module):
    """As EDSR and SwinIR: a constant that follows the dtype of the images."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.a, self.b = cbr(3, 4), head(4)
        if kind == "buffer":
            self.register_buffer("mean", torch.full((1, 3, 1, 1), 0.5))
        else:
            self.mean = torch.full((1, 3, 1, 1), 0.5)

    def forward(self, x):
        self.mean = self.mean.type_as(x)
        if x.shape[2] == 6:
            x = x - self.mean
        return self.b(self.a(x))


HANGS = """
import torch
from torch import nn
from pfs_fast.graph.analysis import analyse


class Mean(nn.Module):
    def __init__(self):
        super().__init__()
        self.mean = torch.zeros(1, 3, 1, 1)
        self.a = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.b = nn.Conv2d(4, 4, 3)

    def forward(self, x):
        self.mean = self.mean.type_as(x)
        n, c, h, w = x.shape
        x = x - self.mean if h == 6 else x
        return self.b(self.a(x)).mean((2, 3))


print(len(analyse(Mean(), torch.zeros(1, 3, 6, 6)).groups))
"""


def test_constant_that_the_forward_casts_ends():
    # In a process of its own, which can be ended where it does not end by itself.
    code = textwrap.dedent(HANGS)
    root = Path(pfs.__file__).parents[1]
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=root
    )
    assert run.stdout.strip() == "1", run.stderr


@pytest.mark.parametrize("kind", ["buffer", "tensor"])
def test_constant_that_the_forward_casts_is_traced(kind):
    assert prunable(Mean(kind)) == {"a.0": 4}


class Keeps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = cbr(3, 4), head(4)
        self.kept, self.names = [], {}

    def forward(self, x):
        y = self.a(x)
        self.last = y
        self.kept.append(y)
        self.names["y"] = [y]
        return self.b(y)


def test_tensors_that_a_forward_only_keeps_are_no_hindrance():
    assert prunable(Keeps()) == {"a.0": 4}


class Previous(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.prev = cbr(3, 4), None

    def forward(self, x):
        y = self.a(x)
        if self.training:
            self.prev = y.mean()
        elif self.prev is not None:
            y = y - self.prev
        return y


class Cached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.grid = cbr(3, 4), None

    def forward(self, x):
        if self.grid is None:
            self.grid = torch.ones_like(x)
        return self.a(x * self.grid)


@pytest.mark.parametrize(("block", "name"), [(Previous, "prev"), (Cached, "grid")])
def test_tensor_that_a_later_forward_reads_back_is_refused_or_held(block, name):
    class Whole(block):
        def __init__(self) -> None:
            super().__init__()
            self.b = head(4)

        def forward(self, x):
            return self.b(super().forward(x))

    with pytest.raises(TraceError, match=f"reads '{name}', which it sets; keep no tensors"):
        analyse(Whole(), IMAGE)
    part = nn.Sequential(cbr(3, 3), block(), cbr(4, 4), head(4))
    assert prunable(part) == {"2.0": 4}
    searched(part)


# -- modes, outputs, arguments ---------------------------------------------------------------------------------------------


def test_module_that_eval_mode_alone_calls_is_analysed():
    model = Net(
        lambda m, x: m.b(m.a(x)) if m.training else m.soft(m.b(m.e(m.a(x)))),
        a=cbr(3, 4),
        e=cbr(4, 4),
        b=head(4),
        soft=nn.Softmax(1),
    )
    assert prunable(model)["a.0"] == 4
    check_cut(model)


@dataclass
class Outputs:
    logits: torch.Tensor
    features: torch.Tensor


def test_dataclass_of_outputs_is_held_and_searched():
    model = Net(lambda m, x: Outputs(m.c(m.b(m.a(x))), m.a(x)), a=cbr(3, 4), b=cbr(4, 5), c=head(5))
    assert prunable(model) == {"b.0": 5}
    check_cut(model)


def test_dataclass_between_two_modules_passes_channels_on():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = cbr(3, 4)

        def forward(self, x):
            return Outputs(self.a(x), x)

    model = Net(lambda m, x: m.c(m.b(m.a(x).logits)), a=Block(), b=cbr(4, 5), c=head(5))
    assert prunable(model) == {"a.a.0": 4, "b.0": 5}
    check_cut(model)


class ListTaker(nn.Module):
    """Not traceable, and called with a list."""

    def __init__(self) -> None:
        super().__init__()
        self.c = conv(4, 4)

    def forward(self, maps):
        return self.c(maps[0].contiguous() if maps[0].is_contiguous() else maps[0])


def test_untraceable_module_may_take_a_list():
    model = Net(lambda m, x: m.c(m.b(m.d([m.a(x)]))), a=cbr(3, 4), d=ListTaker(), b=cbr(4, 5), c=head(5))  # fmt: skip
    assert prunable(model) == {"b.0": 5}
    check_cut(model)


@pytest.mark.parametrize("call", ["search", "train"])
def test_outputs_without_a_gradient_are_an_error_that_says_so(call):
    model = Net(lambda m, x: m.b(m.a(x)).detach(), a=cbr(3, 4), b=head(4))
    with pytest.raises(
        ModelError, match=rf"{call}: model must return outputs that carry a gradient.*detach"
    ):
        if call == "search":
            searched(model)
        else:
            pfs.train(model, batches(1), config=pfs.TrainConfig(epochs=1), progress=False)
