"""EfficientNet-Lite 0, 1 and 2: small convolutional image encoders that are fast without an accelerator.

EfficientNet (Tan and Le 2019, arXiv 1905.11946) in its Lite form: ReLU6 in place of swish, no squeeze-and-excitation,
stem and head of one width whatever the multiplier. Both make it cheap on a CPU.

B batch, H W image height and width, h w feature map height and width, N = h * w image features, D width.
"""

import math
from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opencoca.model.encoders.stages import ImageEncoder

_STEM_WIDTH = 32
_HEAD_WIDTH = 1280
_NORM_EPS = 1e-3


class _Group(NamedTuple):
    num_blocks: int
    kernel_size: int
    stride: int
    expansion: int
    width: int


# What the variants multiply widths and depths by.
_MULTIPLIERS = {0: (1.0, 1.0), 1: (1.0, 1.1), 2: (1.1, 1.2)}

_GROUPS = (
    _Group(num_blocks=1, kernel_size=3, stride=1, expansion=1, width=16),
    _Group(num_blocks=2, kernel_size=3, stride=2, expansion=6, width=24),
    _Group(num_blocks=2, kernel_size=5, stride=2, expansion=6, width=40),
    _Group(num_blocks=3, kernel_size=3, stride=2, expansion=6, width=80),
    _Group(num_blocks=3, kernel_size=5, stride=1, expansion=6, width=112),
    _Group(num_blocks=4, kernel_size=5, stride=2, expansion=6, width=192),
    _Group(num_blocks=1, kernel_size=3, stride=1, expansion=6, width=320),
)


class EfficientNetLite(ImageEncoder):
    """Images (B, 3, H, W) to image features (B, N, D), with N = ceil(H / 32) * ceil(W / 32) and D = 1280.

    Images of any size and shape. Its stages are the stem with the first group of blocks, the other six groups, and the
    last 1x1 convolution. Batch normalisation always uses its stored statistics, so train mode and eval mode compute the
    same numbers; its scale and bias are parameters and can be finetuned.

    variant: 0, 1 or 2: 3.4M, 4.1M or 4.8M parameters, designed for square images of 224, 240 or 260 pixels.
    """

    def __init__(self, variant: int):
        width_multiplier, depth_multiplier = _MULTIPLIERS[variant]
        width = _STEM_WIDTH
        stages = []
        for group in _GROUPS:
            is_outermost = group is _GROUPS[0] or group is _GROUPS[-1]
            num_blocks = group.num_blocks if is_outermost else math.ceil(group.num_blocks * depth_multiplier)
            group = group._replace(num_blocks=num_blocks, width=_round_width(group.width * width_multiplier))
            stages.append(_build_group(width, group))
            width = group.width
        stages[0].insert(0, ConvNorm(3, _STEM_WIDTH, kernel_size=3, stride=2))
        stages.append(nn.Sequential(ConvNorm(width, _HEAD_WIDTH, kernel_size=1), _FlattenMap()))
        super().__init__(stages, _HEAD_WIDTH)
        self.variant = variant

    def run_stages(self, x: Tensor, start: int, stop: int) -> Tensor:
        if start < stop:
            # Depthwise convolutions run several times faster on a CPU when the channels lie next to each other.
            x = x.contiguous(memory_format=torch.channels_last)
        return super().run_stages(x, start, stop)


class InvertedBottleneck(nn.Module):
    """Expand by a 1x1 convolution, filter each channel, project back, and add the input where the shape allows it.

    Shapes: (B, C_in, h, w) to (B, C_out, ceil(h / stride), ceil(w / stride)). MobileNetV2 (arXiv 1801.04381) section 3.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int, expansion: int):
        super().__init__()
        hidden = in_channels * expansion
        self.expand = ConvNorm(in_channels, hidden, kernel_size=1) if expansion > 1 else nn.Identity()
        self.depthwise = ConvNorm(hidden, hidden, kernel_size, stride, groups=hidden)
        self.project = ConvNorm(hidden, out_channels, kernel_size=1, activation=False)
        self.has_residual = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.has_residual else y


class ConvNorm(nn.Module):
    """Convolution with 'SAME' padding, batch normalisation with fixed statistics, and ReLU6 or nothing.

    A normalisation with fixed statistics is a scale and a shift per channel. They are applied to the convolution's
    weights rather than to its output, which is much larger; gradients reach both as usual.

    Shapes: (B, C_in, h, w) to (B, C_out, ceil(h / stride), ceil(w / stride)).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        groups: int = 1,
        activation: bool = True,
    ):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, groups=groups, bias=False)
        # Without batch statistics nothing else keeps the size of untrained activations through the depth.
        nn.init.kaiming_normal_(self.conv.weight, nonlinearity="relu" if activation else "linear")
        self.norm = FrozenBatchNorm(out_channels)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        conv, norm = self.conv, self.norm
        # The backward pass of a depthwise convolution is several times slower on a CPU in bfloat16 than in float32.
        is_cpu_training = x.device.type == "cpu" and torch.is_grad_enabled() and torch.is_autocast_enabled("cpu")
        in_float32 = is_cpu_training and conv.groups > 1
        x = x.to(conv.weight.dtype) if in_float32 else x
        with torch.autocast("cpu", enabled=False) if in_float32 else nullcontext():
            scale = norm.weight * torch.rsqrt(norm.running_var + _NORM_EPS)
            weight, bias = conv.weight * scale[:, None, None, None], norm.bias - norm.running_mean * scale
            pad_top, pad_bottom = _same_padding(x.shape[-2], conv.kernel_size[0], conv.stride[0])
            pad_left, pad_right = _same_padding(x.shape[-1], conv.kernel_size[1], conv.stride[1])
            padding = (pad_top, pad_left)
            if (pad_top, pad_left) != (pad_bottom, pad_right):
                x = F.pad(x, (pad_left, pad_right, pad_top, pad_bottom))
                padding = (0, 0)
            x = F.conv2d(x, weight, bias, conv.stride, padding, groups=conv.groups)
            return F.relu6(x, inplace=True) if self.activation else x


class FrozenBatchNorm(nn.Module):
    """What a batch normalisation that keeps to its stored statistics consists of, each (C,)."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, num_channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_channels))
        self.bias = nn.Parameter(torch.zeros(num_channels))
        self.register_buffer("running_mean", torch.zeros(num_channels))
        self.register_buffer("running_var", torch.ones(num_channels))


class _FlattenMap(nn.Module):
    """Feature map (B, D, h, w) to image features (B, h * w, D)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).transpose(1, 2)


def _build_group(in_channels: int, group: _Group) -> nn.Sequential:
    """Blocks of one group; its first block alone changes resolution and width."""
    blocks = nn.Sequential()
    for index in range(group.num_blocks):
        stride = group.stride if index == 0 else 1
        blocks.append(InvertedBottleneck(in_channels, group.width, group.kernel_size, stride, group.expansion))
        in_channels = group.width
    return blocks


def _round_width(width: float, divisor: int = 8) -> int:
    """The nearest multiple of divisor that is not more than a tenth below width."""
    rounded = max(divisor, math.floor(width / divisor + 0.5) * divisor)
    return rounded if rounded >= 0.9 * width else rounded + divisor


def _same_padding(size: int, kernel_size: int, stride: int) -> tuple[int, int]:
    """Zeros before and after, so that ceil(size / stride) positions come out; the odd one comes after."""
    total = max((math.ceil(size / stride) - 1) * stride + kernel_size - size, 0)
    return total // 2, total - total // 2
