"""A defect of the CPU convolutions under PyTorch that a slim network can meet, and how to keep clear of it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

ISSUE = "https://github.com/uxlfoundation/oneDNN/issues/6035"

_BLOCK = (
    16  # channels of a block of AVX-512; 8 of AVX2, but nothing is lost by keeping clear of more
)


def unsafe_weight_gradients(model: nn.Module) -> list[str]:
    """Convolutions whose weight gradient on the CPU, channels_last, writes past its memory.

    The weight gradient of a 1x1 convolution with a stride above 1 and fewer input channels than a block is wrong, or ends the
    process, if its input is channels_last (oneDNN issue 6035, seen with PyTorch 2.14.1). Networks that were cut to a few channels
    have such layers in their shortcuts; NCHW is sound.

    Returns:
        list[str]: Qualified names, in the model's order.
    """
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d)
        and module.weight.requires_grad
        and set(module.kernel_size) == {1}
        and max(module.stride) > 1
        and module.in_channels // module.groups < _BLOCK
    ]


def in_layout(tensor: Tensor, layout: torch.memory_format) -> Tensor:
    """A 4-d tensor in a layout, NCHW also by its strides.

    The strides of a 1x1 kernel, or of one channel, can mean either layout, and PyTorch takes them for channels_last where they
    came about so.
    """
    tensor = tensor.contiguous(memory_format=layout)
    return tensor.flatten().view(tensor.shape) if layout == torch.contiguous_format else tensor
