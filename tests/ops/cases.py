"""The shape table of bn_gate_act, and what its tests share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pfs_fast.ops import reference

ACTS = tuple(reference.ACTIVATIONS)
DTYPES = (torch.float32, torch.bfloat16, torch.float64)

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(
        memory_format=torch.channels_last_3d if x.dim() == 5 else torch.channels_last
    ),
    # Not dense: every second value of the last axis, as a slice of a larger tensor.
    "sliced": lambda x: torch.stack([x, torch.zeros_like(x)], dim=-1).flatten(-2)[..., ::2],
    # Dense, but neither contiguous nor channels_last.
    "permuted": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "sliced_channels_last": lambda x: torch.cat([x, x], dim=1).contiguous(
        memory_format=torch.channels_last
    )[:, : x.shape[1]],
    "expanded": lambda x: x[:1].expand(x.shape),
}


@dataclass(frozen=True)
class Case:
    """A shape and a layout of x, and a bound on what rounding may do there.

    Attributes:
        slack: Factor on the tolerances, for shapes whose batch statistics amplify rounding.
    """

    shape: tuple[int, ...]
    layout: str = "contiguous"
    slack: float = 1.0

    def __str__(self) -> str:
        return "x".join(map(str, self.shape)) + "-" + self.layout


CASES = (
    Case((4, 1, 5, 5)),
    Case((4, 1, 5, 5), "channels_last"),
    Case((3, 3, 7, 5)),
    Case((3, 3, 7, 5), "channels_last"),
    Case((2, 17, 3, 9)),
    Case((2, 17, 3, 9), "channels_last"),
    Case((2, 33, 5, 7), "channels_last"),
    Case((2, 64, 8, 8)),
    Case((2, 64, 8, 8), "channels_last"),
    Case((2, 130, 3, 3), "channels_last"),
    Case((16, 10)),
    Case((16, 33)),
    Case((4, 6, 11)),
    Case((3, 5, 4, 3, 2)),
    Case((3, 5, 4, 3, 2), "channels_last"),
    Case((3, 4, 6, 6), "sliced"),
    Case((3, 4, 6, 6), "permuted"),
    Case((3, 4, 6, 6), "sliced_channels_last"),
    Case((3, 4, 6, 6), "expanded"),
    Case((8, 7, 1, 1), slack=4.0),
    Case((8, 7, 1, 1), "channels_last", slack=4.0),
    Case((1, 9, 4, 4)),
    Case((40, 24, 16, 16), "channels_last"),
    Case((40, 24, 16, 16)),
)
EMPTY_CASES = (
    Case((0, 3, 4, 4)),
    Case((0, 3, 4, 4), "channels_last"),
    Case((4, 0, 4, 4)),
    Case((4, 3, 0, 4)),
    Case((0, 3)),
)

# Against float64. float32: sums of up to 10,240 values of size 1 and a division by the standard
# deviation leave a few units of 6e-8. bfloat16: the result is rounded once, half a unit of 2^-8;
# what is per channel stays float32. float64: as float32, in units of 1e-16.
TOLERANCES = {
    torch.float64: (1e-12, 1e-12),
    torch.float32: (2e-5, 2e-5),
    torch.bfloat16: (2e-5, 2**-8),
    torch.float16: (2e-5, 2**-10),
}


@dataclass(frozen=True)
class Problem:
    """All arguments of one call."""

    x: Tensor
    gate: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    residual: Tensor | None
    running_mean: Tensor
    running_var: Tensor
    grad_y: Tensor
    slack: float = 1.0

    @property
    def inputs(self) -> tuple[Tensor | None, ...]:
        return self.x, self.gate, self.weight, self.bias, self.residual

    def double(self) -> Problem:
        """The same numbers in float64."""

        def convert(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.detach().double().requires_grad_(t.requires_grad)

        names = (*INPUT_NAMES, "running_mean", "running_var", "grad_y")
        return replace(self, **{name: convert(getattr(self, name)) for name in names})


INPUT_NAMES = ("x", "gate", "weight", "bias", "residual")


def make(
    case: Case,
    dtype: torch.dtype,
    device: str = "cpu",
    residual: bool = False,
    parts: tuple[str, ...] = ("gate", "weight", "bias"),
    mean: float = 0.0,
) -> Problem:
    """Random arguments; x and the residual lie in memory as the case says."""
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    channels = case.shape[1]

    def image(offset: float) -> Tensor:
        values = (torch.randn(case.shape, dtype=torch.float64) + offset).to(device, dtype)
        return LAYOUTS[case.layout](values).detach()

    def per_channel(name: str) -> Tensor | None:
        values = torch.rand(channels, dtype=torch.float64).to(device, acc) + 0.25
        return values.requires_grad_() if name in parts else None

    return Problem(
        x=image(mean).requires_grad_(),
        gate=per_channel("gate"),
        weight=per_channel("weight"),
        bias=per_channel("bias"),
        residual=image(0.0).requires_grad_() if residual else None,
        running_mean=torch.randn(channels).to(device, acc),
        running_var=(torch.rand(channels) + 0.5).to(device, acc),
        grad_y=torch.randn(case.shape, dtype=torch.float64).to(device, dtype),
        slack=case.slack,
    )


def run(op: Callable[..., Tensor], problem: Problem, **options) -> dict[str, Tensor]:
    """Output and gradients of one call, by name."""
    y = op(*problem.inputs, problem.running_mean, problem.running_var, **options)
    wanted = {
        f"grad_{name}": value
        for name, value in zip(INPUT_NAMES, problem.inputs, strict=True)
        if value is not None and value.requires_grad
    }
    grads = torch.autograd.grad(y, list(wanted.values()), problem.grad_y)
    return {"y": y.detach(), **dict(zip(wanted, grads, strict=True))}


def assert_agree(
    got: dict[str, Tensor],
    expected: dict[str, Tensor],
    dtype: torch.dtype,
    slack: float = 1.0,
    z_is_rounded: bool = False,
) -> None:
    """Compares results of an operator with those of the twin in float64, in the scale of each.

    Args:
        z_is_rounded: The backward pass has z in x's dtype only (silu and hardswish with a
            residual): act'(z) is off by a rounding of z, and by a jump where hardswish has one.
            The gradients are then compared as a whole.
    """
    assert got.keys() == expected.keys()
    fine, coarse = TOLERANCES[dtype]
    for name, value in got.items():
        target = expected[name]
        assert value.shape == target.shape, name
        if target.numel() == 0:
            continue
        if z_is_rounded and name != "y":
            error = (value.double() - target).norm() / target.norm()
            assert error < 4 * TOLERANCES[dtype][1], f"{name}: relative error {error:.1e}"
            continue
        is_image = value.dtype == dtype and name in ("y", "grad_x", "grad_residual")
        rtol = coarse if is_image else fine
        # The sum of many terms of both signs is only as exact as its terms.
        atol = slack * fine * max(1.0, target.abs().max().item())
        torch.testing.assert_close(
            value.double(),
            target,
            rtol=slack * rtol,
            atol=atol,
            msg=lambda text, name=name: f"{name}: {text}",
        )
