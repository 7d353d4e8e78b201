"""The paper's CIFAR networks, trained on a CPU by the operators of a search: the same function and gradients in less time.

`fused` gives the blocks of a ``pfs_fast.models`` ResNet or VGG the forward below. Batch norm, residual sum and activation are one operator, and
3x3 convolutions run by Winograd's filtering forward and for the input's gradient; PyTorch computes the weights' gradient. A shortcut reads the
pixels that its stride would reach, and convolves them without one. Weights, buffers and names stay as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from pfs_fast import ops
from pfs_fast.gating import winograd
from pfs_fast.models._blocks import ConvBNAct
from pfs_fast.models.resnet_cifar import BasicBlock, CifarResNet

NO_DILATION = [1, 1]


class _Conv(torch.autograd.Function):
    """A convolution without bias; ``tile`` as in ``winograd.tile_for``."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        weight: Tensor,
        stride: tuple[int, ...],
        padding: tuple[int, ...],
        tile: int,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.options = (list(stride), list(padding), tile)
        if tile == winograd.DIRECT:
            return ops.frozen_conv(x, weight, None, stride, padding)
        return ops.winograd_conv(x, weight, None, padding, tile=tile)

    @staticmethod
    def backward(ctx: FunctionCtx, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        stride, padding, tile = ctx.options
        wanted = ctx.needs_input_grad[0]
        by_tiles = wanted and tile != winograd.DIRECT
        grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
            grad_y,
            x,
            weight,
            None,
            stride,
            padding,
            NO_DILATION,
            False,
            [0, 0],
            1,
            [wanted and not by_tiles, True, False],
        )
        if by_tiles:
            grad_x = torch.ops.pfs_fast._winograd_conv_backward(grad_y, weight, padding, tile)
        return grad_x, grad_weight, None, None, None


def _conv(conv: nn.Conv2d, x: Tensor) -> Tensor:
    tile = winograd.tile_of(conv, x) if winograd.can_use(conv) else winograd.DIRECT
    return _Conv.apply(x, conv.weight, conv.stride, conv.padding, tile)


def _norm(norm: nn.BatchNorm2d, x: Tensor, act: str, residual: Tensor | None = None) -> Tensor:
    if norm.training:
        norm.num_batches_tracked.add_(1)
    return ops.bn_gate_act(
        x,
        None,
        norm.weight,
        norm.bias,
        residual,
        norm.running_mean,
        norm.running_var,
        training=norm.training,
        momentum=norm.momentum,
        eps=norm.eps,
        act=act,
    )


class _FusedBlock(BasicBlock):
    def forward(self, x: Tensor) -> Tensor:
        out = _conv(self.conv2, _norm(self.bn1, _conv(self.conv1, x), "relu"))
        if isinstance(self.shortcut, nn.Identity):
            return _norm(self.bn2, out, "relu", x)
        conv, norm = self.shortcut
        rows, columns = self.conv1.stride
        pixels = x[:, :, ::rows, ::columns].contiguous(memory_format=torch.channels_last)
        return _norm(self.bn2, out, "relu", _norm(norm, _conv(conv, pixels), "identity"))


class _FusedResNet(CifarResNet):
    def forward(self, x: Tensor) -> Tensor:
        x = _norm(self.bn1, _conv(self.conv1, x), "relu")
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(torch.flatten(self.pool(x), 1))


class _FusedConvBNAct(ConvBNAct):
    def forward(self, x: Tensor) -> Tensor:
        return _norm(self.bn, _conv(self.conv, x), "relu")


class _FusedMaxPool(nn.MaxPool2d):
    def forward(self, x: Tensor) -> Tensor:
        return ops.max_pool(x, self.kernel_size, self.stride, self.padding)


_FUSED: dict[type[nn.Module], type[nn.Module]] = {
    BasicBlock: _FusedBlock,
    CifarResNet: _FusedResNet,
    ConvBNAct: _FusedConvBNAct,
    nn.MaxPool2d: _FusedMaxPool,
}


def fused(model: nn.Module) -> nn.Module:
    """A ``pfs_fast.models`` ResNet or VGG, slimmed or not, changed in place.

    Raises:
        ValueError: A layer that has no such form here.
    """
    for name, module in model.named_modules():
        if type(module) is ConvBNAct and (
            type(module.act) is not nn.ReLU or module.conv.groups > 1
        ):
            raise ValueError(
                f"fused: model must have ReLUs and ungrouped convolutions, got '{name}'"
            )
    for module in model.modules():
        if type(module) in _FUSED:
            module.__class__ = _FUSED[type(module)]
        if type(module) is _FusedBlock and not isinstance(module.shortcut, nn.Identity):
            # With a stride its weight gradient would hold the whole network in NCHW (`pfs_fast.training.onednn`),
            # where the steps of a narrow ResNet-20 take about twice as long.
            module.shortcut[0].stride = (1, 1)
    return model
