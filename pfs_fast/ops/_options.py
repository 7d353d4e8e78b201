"""Options that are one number or one for each dimension."""

from __future__ import annotations

ConvOptions = tuple[list[int], list[int], list[int], int]  # stride, padding, dilation, groups


def per_dimension(value: int | tuple[int, ...], spatial_dims: int) -> list[int]:
    return [value] * spatial_dims if isinstance(value, int) else list(value)
