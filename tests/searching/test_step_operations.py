"""What one fused step asks of PyTorch: the fused operators, and around them nothing that copies, casts or lays out again."""

from __future__ import annotations

import collections

import pytest
import torch
from small_nets import batches
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import pfs_fast as pfs
from pfs_fast import _library
from pfs_fast.gating import winograd
from pfs_fast.gating.widths import WidthRule
from pfs_fast.searching.config import PRECISIONS
from pfs_fast.searching.plan import prepare

pytestmark = pytest.mark.skipif(
    not _library.backends().cpu, reason=f"no compiled operators: {_library.backends().cpu_reason}"
)
SHORTCUTS = 2  # of ResNet-20 that convolve
LARGE = 4 * 16 * 8 * 8 // 4  # elements of the smallest activation of the network below, images 8x8


class Operations(TorchDispatchMode):
    """Counts operations by name, those with a large result also apart."""

    def __init__(self) -> None:
        super().__init__()
        self.all: collections.Counter[str] = collections.Counter()
        self.large: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        self.all[name] += 1
        if any(isinstance(t, Tensor) and t.numel() >= LARGE for t in tree_leaves(result)):
            self.large[name] += 1
        return result


def loop_and_batch(precision: str):
    images, labels = batches(1, images=(3, 8, 8))[0]
    config = pfs.SearchConfig(precision=precision, backend="fused", target=0.1, lr=0.1, gamma=5.0)
    model = pfs.models.resnet20(4)
    loop = prepare(model, images, pfs.Budget(macs=0.5), config, device=torch.device("cpu")).loop
    return loop, loop.place(images), labels


def operations(loop, images, labels) -> Operations:
    loop.step(images, labels)  # the first step makes what later ones reuse
    with Operations() as counted:
        loop.step(images, labels)
    return counted


def convolutions(counted: Operations, direction: str) -> int:
    prefix = "_" if direction else ""
    names = ("frozen_conv", "winograd_conv", "conv_bn_gate_act")
    return sum(counted.all[f"{prefix}{op}{direction}"] for op in names)


def check(counted: Operations, precision: str) -> None:
    # ResNet-20: 19 convolutions and 2 on shortcuts, a batch norm after each. Shortcuts convolve again in backward.
    norms = counted.all["bn_gate_act"] + counted.all["conv_bn_gate_act"]
    assert norms == 21
    assert convolutions(counted, "") == 21 + SHORTCUTS
    fused = winograd.serves(PRECISIONS[precision])
    assert (counted.all["conv_bn_gate_act"] > 0) == fused
    # The stem has no gate and its input no gradient; the shortcuts of the first gates start there.
    assert convolutions(counted, "_backward") <= 20
    assert counted.all["gate_step_"] == 1
    # Logits to float32 for the loss, and their gradient back; nothing else is cast.
    assert counted.all["_to_copy"] == (2 if precision == "bf16" else 0)
    # The pixels that shortcuts read are kept; nothing else is copied.
    assert counted.all["clone"] == SHORTCUTS and counted.all["contiguous"] == 0
    # Activations: the operators, and the gradients of shortcuts, added to the pixels that these read.
    convs, norms = (
        ("frozen_conv", "_frozen_conv_backward"),
        ("bn_gate_act", "_bn_gate_act_backward"),
    )
    expected = {*convs, *norms, "clone", "add_"}
    # The sum of the two gradients where a block's input branches is in the first convolution's, or apart.
    expected |= {"conv_bn_gate_act", "_conv_bn_gate_act_backward"} if fused else {"add"}
    assert set(counted.large) - {"detach", "expand", "div", "view", "slice"} == expected
    # A block whose first convolution passes its input on has the sum in that convolution's gradient.
    passed_on = counted.large["view"]
    assert passed_on == (6 if fused else 0)
    assert counted.large["add"] == 6 - passed_on
    # Besides, one accumulation into the flat gradient for each of 9 groups, a detached weight for each convolution, and the head.
    small = counted.all.total() - sum(counted.all[name] for name in expected)
    assert small <= 9 + 21 + 45, counted.all


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_step_copies_and_casts_nothing_before_and_after_compaction(precision):
    loop, images, labels = loop_and_batch(precision)
    check(operations(loop, images, labels), precision)
    for group in loop.compaction._groups.groups:  # most channels die
        span = slice(group.start, group.start + group.size // 2)
        loop.state.gates.values[span] = 0
        loop.state.gates.died_at[span] = loop.state.steps
    names = (group.name for group in loop.compaction._groups.groups)
    loop.compaction._widths = dict.fromkeys(names, WidthRule(1, 1))
    keep, saving = loop.compaction.candidates()
    loop.compaction.leave_out(keep)
    assert saving > 0.2
    check(operations(loop, images, labels), precision)
    for name, parameter in loop.network.root.named_parameters():
        if parameter.dim() == 4:
            assert parameter.is_contiguous(memory_format=torch.channels_last), name
            assert parameter.dtype == images.dtype


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_placed_images_are_not_copied_again(precision):
    loop, images, _ = loop_and_batch(precision)
    assert loop.place(images) is images
