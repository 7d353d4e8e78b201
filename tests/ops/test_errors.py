"""Wrong arguments are refused by the name of the operator and the argument."""

from __future__ import annotations

import pytest
import torch

from pfs_fast import _library, ops
from pfs_fast.errors import BackendError
from pfs_fast.ops import reference

X = (4, 3, 2, 2)


def image(device, *shape, dtype=torch.float32):
    return torch.ones(shape or X, device=device, dtype=dtype)


BN_ERRORS = {
    "one dimension": (
        lambda d: dict(x=image(d, 3)),
        ValueError,
        r"bn_gate_act: x must have 2 to 5 dimensions \[N, C, \*spatial\], got shape \[3\]",
    ),
    "six dimensions": (
        lambda d: dict(x=image(d, 1, 2, 1, 2, 1, 2)),
        ValueError,
        "x must have 2 to 5 dimensions",
    ),
    "integer x": (
        lambda d: dict(x=image(d, dtype=torch.int64)),
        TypeError,
        "x must be float32, .*bfloat16 or float64",
    ),
    "gate length": (
        lambda d: dict(x=image(d), gate=torch.ones(4, device=d)),
        ValueError,
        r"gate must have shape \[C\] with C = 3 \(x.size\(1\)\), got \[4\]; pass one value",
    ),
    "weight shape": (
        lambda d: dict(x=image(d), weight=torch.ones(1, 3, 1, 1, device=d)),
        ValueError,
        r"weight must have shape \[C\] with C = 3",
    ),
    "gate dtype": (
        lambda d: dict(x=image(d), gate=torch.ones(3, device=d, dtype=torch.float64)),
        TypeError,
        "gate must be Float for x of Float, got Double; convert it",
    ),
    "bias dtype": (
        lambda d: dict(x=image(d, dtype=torch.float64), bias=torch.ones(3, device=d)),
        TypeError,
        "bias must be Double for x of Double, got Float",
    ),
    "residual shape": (
        lambda d: dict(x=image(d), residual=image(d, 4, 3, 1, 1)),
        ValueError,
        r"residual must have the shape of x, \[4, 3, 2, 2\], got \[4, 3, 1, 1\]",
    ),
    "residual dtype": (
        lambda d: dict(x=image(d), residual=image(d, dtype=torch.bfloat16)),
        TypeError,
        "residual must have the dtype of x, Float, got BFloat16",
    ),
    "one value": (
        lambda d: dict(x=image(d, 1, 3, 1, 1)),
        ValueError,
        r"x must have more than 1 value per channel when training, got shape \[1, 3, 1, 1\]",
    ),
    "no running mean": (
        lambda d: dict(x=image(d), training=False, running_var=torch.ones(3, device=d)),
        ValueError,
        "running_mean must be given when training is False, got None",
    ),
    "no running var": (
        lambda d: dict(x=image(d), training=False, running_mean=torch.ones(3, device=d)),
        ValueError,
        "running_var must be given when training is False, got None",
    ),
    "activation": (
        lambda d: dict(x=image(d), act="gelu"),
        ValueError,
        'act must be one of identity, relu, relu6, silu, hardswish, got "gelu"',
    ),
    "negative eps": (lambda d: dict(x=image(d), eps=-1.0), ValueError, "eps must be finite"),
    "nan eps": (lambda d: dict(x=image(d), eps=float("nan")), ValueError, "eps must be finite"),
}


@pytest.mark.parametrize("name", BN_ERRORS)
def test_bn_gate_act_refuses(name, device):
    make, error, message = BN_ERRORS[name]
    with pytest.raises(error, match=message):
        ops.bn_gate_act(**make(device))


def test_bn_gate_act_refuses_another_device():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    with pytest.raises(ValueError, match="gate must be on the device of x"):
        ops.bn_gate_act(image("cuda"), torch.ones(3))


@pytest.mark.parametrize("name", ["one value", "no running mean", "no running var", "activation"])
def test_reference_refuses_alike(name):
    make, error, message = BN_ERRORS[name]
    with pytest.raises(error, match=message):
        reference.bn_gate_act(**make("cpu"))


def test_bn_gate_act_backward_refuses_a_foreign_mask(device):
    x, per_channel = image(device), torch.ones(3, device=device)
    mask = torch.zeros(1, dtype=torch.uint8, device=device)
    with pytest.raises(ValueError, match="aux must be the bitmask of the forward pass, uint8 of 6"):
        torch.ops.pfs_fast._bn_gate_act_backward(
            x,
            x,
            per_channel,
            per_channel,
            None,
            None,
            None,
            mask,
            True,
            1e-5,
            "relu",
            True,
            [True] * 5,
        )


CONV_ERRORS = {
    "dimensions": (dict(x=(3, 8, 8)), r"weight must have 3 dimensions"),
    "two dimensions": (dict(x=(3, 8)), r"x must have 3 to 5 dimensions"),
    "channels": (
        dict(x=(2, 5, 8, 8)),
        r"x must have 4 channels \(weight.size\(1\) \* groups\), got 5",
    ),
    "bias": (dict(bias=(7,)), r"bias must have shape \[C_out\] with C_out = 6"),
    "stride": (dict(stride=0), "stride must be at least 1"),
    "stride list": (
        dict(stride=(1, 1, 1)),
        r"stride must have one value per spatial dimension \(2\)",
    ),
    "padding": (dict(padding=-1), "padding must be at least 0"),
    "groups": (
        dict(groups=4),
        "groups must be at least 1 and divide the output channels, 6, got 4",
    ),
}


@pytest.mark.parametrize("name", CONV_ERRORS)
def test_frozen_conv_refuses(name, device):
    change, message = CONV_ERRORS[name]
    arguments = {"x": (2, 4, 8, 8), "weight": (6, 4, 3, 3), **change}
    arguments = {
        key: torch.ones(value, device=device) if key in ("x", "weight", "bias") else value
        for key, value in arguments.items()
    }
    with pytest.raises(ValueError, match=f"frozen_conv: {message}"):
        ops.frozen_conv(**arguments)


def test_frozen_conv_refuses_another_dtype(device):
    x = torch.ones(2, 4, 8, 8, device=device, dtype=torch.bfloat16)
    with pytest.raises(TypeError, match="weight must have the dtype of x, BFloat16, got Float"):
        ops.frozen_conv(x, torch.ones(6, 4, 3, 3, device=device))


def gate_arguments(device):
    return {
        "gates": torch.ones(3, device=device),
        "grad": torch.ones(3, device=device),
        "exp_avg": torch.zeros(3, device=device),
        "exp_avg_sq": torch.zeros(3, device=device),
        "step": torch.zeros(1, dtype=torch.int64, device=device),
        "died_at": torch.full((3,), -1, dtype=torch.int32, device=device),
        "gamma": 0.5,
        "target": 0.5,
    }


GATE_ERRORS = {
    "gates shape": (
        dict(gates=lambda d: torch.ones(3, 1, device=d)),
        ValueError,
        "gates must have",
    ),
    "gates dtype": (
        dict(gates=lambda d: torch.ones(3, device=d, dtype=torch.bfloat16)),
        TypeError,
        "gates must be float32 or float64, got BFloat16",
    ),
    "grad length": (
        dict(grad=lambda d: torch.ones(4, device=d)),
        ValueError,
        r"grad must have shape \[G\] with G = 3",
    ),
    "moment dtype": (
        dict(exp_avg=lambda d: torch.zeros(3, device=d, dtype=torch.float64)),
        TypeError,
        "exp_avg must be Float, got Double",
    ),
    "moment strides": (
        dict(exp_avg_sq=lambda d: torch.zeros(6, device=d)[::2]),
        ValueError,
        "exp_avg_sq must be contiguous",
    ),
    "step": (dict(step=lambda d: torch.zeros(1, device=d)), ValueError, "step must be one int64"),
    "died_at": (
        dict(died_at=lambda d: torch.zeros(3, device=d, dtype=torch.int64)),
        TypeError,
        "died_at must be Int, got Long",
    ),
    "lr": (dict(lr=float("nan")), ValueError, "lr must be finite"),
    "betas": (dict(betas=(0.9, 1.0)), ValueError, r"betas must lie in \[0, 1\)"),
    "eps": (dict(eps=-1.0), ValueError, "eps must be finite"),
    "gamma": (dict(gamma=float("inf")), ValueError, "gamma must be finite"),
    "target": (dict(target=float("nan")), ValueError, "target must be finite"),
    "num_gates": (dict(num_gates=2), ValueError, "num_gates must be at least the number of gates"),
}


@pytest.mark.parametrize("name", GATE_ERRORS)
def test_gate_step_refuses_and_changes_nothing(name, device):
    change, error, message = GATE_ERRORS[name]
    arguments = gate_arguments(device)
    for key, value in change.items():
        arguments[key] = value(device) if callable(value) else value
    before = arguments["gates"].clone()
    with pytest.raises(error, match=f"gate_step_: {message}"):
        ops.gate_step_(**arguments)
    assert torch.equal(arguments["gates"], before)


def test_missing_library_is_told_at_the_first_call(monkeypatch):
    cause = ModuleNotFoundError("No module named 'pfs_fast._C'", name="pfs_fast._C")
    monkeypatch.setattr(_library, "_C", None)
    monkeypatch.setattr(_library, "_load_error", cause)
    monkeypatch.setattr(_library, "_build_report", lambda: {"cpp_reason": "no compiler, say"})
    with pytest.raises(BackendError, match="no compiler, say") as caught:
        ops.bn_gate_act(image("cpu"))
    assert caught.value.__cause__ is cause
    assert str(_library.backends()).count("no: no compiler, say") == 2


def test_library_of_another_torch_is_told(monkeypatch):
    monkeypatch.setattr(_library, "_C", None)
    monkeypatch.setattr(_library, "_load_error", ImportError("undefined symbol: _ZN3c10"))
    monkeypatch.setattr(_library, "_build_report", lambda: {"torch": "2.0.0"})
    with pytest.raises(BackendError, match=r"undefined symbol.*built with torch 2.0.0.*rebuild"):
        ops.gate_step_(**gate_arguments("cpu"))
