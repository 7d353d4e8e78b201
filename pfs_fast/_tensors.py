"""Which tensors can be computed with as they are: dense ones that hold numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import PfsError


def require_dense(error: type[PfsError], what: str, tensor: Tensor) -> None:
    """Refuse tensors of another layout, and those without values.

    Args:
        error: Class of the error.
        what: Function and argument, as ``"search: images"``.
        tensor: Of any kind.

    Raises:
        PfsError: Of that class; says how it becomes a dense one.
    """
    if tensor.is_meta:
        raise error(
            f"{what} must hold values, got a meta tensor; make it outside of torch.device('meta')"
        )
    if tensor.is_nested:
        kind, repair = "a nested tensor", "pad its parts to one size and use torch.stack"
    elif tensor.is_quantized:
        kind, repair = "a quantised tensor", "use dequantize()"
    elif tensor.layout != torch.strided:
        kind, repair = f"a tensor of layout {tensor.layout}", "use to_dense()"
    else:
        return
    raise error(f"{what} must be dense, got {kind}; {repair}")
