"""PCT-Net: a U-shaped network that combines convolution and window attention in parallel.

Source: Wang et al., "MIS-FM", arXiv 2306.16925, section "PCT-Net" and its figure; original in MIS-FM's
``net/pct_net.py``. Plans store the dotted path ``nnunetv2_vf.pct_net.PCTNet``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nnunetv2_vf.five_level_network import (
    LEVELS,
    Decoder,
    Encoder,
    FiveLevelNetwork,
    Triple,
    check_counts,
    check_lengths,
    check_probabilities,
    level_kernels,
    require_mode,
)
from nnunetv2_vf.five_level_network import (
    MODES as MODES,  # scripts written for version 0.1.0 import it from here
)
from nnunetv2_vf.window_attention import SwinBlock

EMBEDDING_LEVELS = 2  # levels 0 and 1 have convolution blocks, levels 2, 3 and 4 PCT blocks
PUBLISHED_FEATURES = (24, 48, 128, 256, 512)
PCT_NET_PATH = "nnunetv2_vf.pct_net.PCTNet"  # as in plans
_Norm = Callable[[int], nn.Module]  # number of features -> normalisation layer


class PCTNet(FiveLevelNetwork):
    """The network of the paper's PCT-Net figure, with the parameter names and attributes of nnU-Net's networks.

    For features C0..C4 and an input of D x H x W voxels in resolution mode 0 (isotropic)::

        encoder                                        decoder                                       output
        level 0  C0  D    H    W     conv block  ----> conv block                                --> 1/1
        level 1  C1  D/2  H/2  W/2   conv block  ----> conv block    multi-scale embedding and   --> 1/2
        level 2  C2  D/4  H/4  W/4   PCT block   ----> PCT block     prediction head: levels 0,1 --> 1/4
        level 3  C3  D/8  H/8  W/8   PCT block   ----> PCT block     pyramid of PCT blocks:      --> 1/8
        level 4  C4  D/16 H/16 W/16  PCT block   ----^               levels 2, 3, 4

    A PCT block is the sum of a convolution block and of window attention on the same input. In mode 1, the stride from
    level 0 to level 1 does not halve axis 0, and the kernels of level 0 are 1x3x3. In mode 2, the same also holds for
    the stride from level 1 to level 2 and the kernels of level 1.

    Args:
        input_channels: number of image channels.
        features_per_stage: C0..C4; the paper uses (24, 48, 128, 256, 512).
        strides: of each level, relative to the level above; the first is 1. One of
            :data:`~nnunetv2_vf.five_level_network.MODES`.
        num_classes: output channels.
        deep_supervision: return a list of outputs at 1/1, 1/2, 1/4 and 1/8 of the input size instead of only the first.
            ``decoder.deep_supervision`` changes it later.
        dropout_per_stage: dropout probability in the blocks of each level.
        depths: number of window attention blocks in the PCT blocks of levels 2, 3, 4; every second has shifted windows.
        num_heads: attention heads at levels 2, 3, 4.
        window_sizes: side of the windows at levels 2, 3, 4, in voxels of the level; smaller if the map is smaller.
        drop_path: stochastic depth of the window attention.
        norm_op: ``nn.BatchNorm3d`` (published) or ``nn.InstanceNorm3d``.
        norm_op_kwargs: arguments of ``norm_op``.
        activation_checkpointing: recompute every block in the backward pass instead of keeping its activations.
        channels_last: store kernels, and therefore feature maps, channels-last in memory. Shapes and results do not
            change. On 2 CPU cores it saves 20 % of the forward and backward pass (benchmarks/network_speed.py).

    Raises:
        ValueError: an argument is not legal; the message lists the legal values.
    """

    def __init__(
        self,
        input_channels: int,
        features_per_stage: Sequence[int],
        strides: Sequence[int | Sequence[int]],
        num_classes: int,
        deep_supervision: bool = False,
        dropout_per_stage: Sequence[float] = (0.0, 0.0, 0.2, 0.2, 0.2),
        depths: Sequence[int] = (2, 2, 2),
        num_heads: Sequence[int] = (4, 8, 16),
        window_sizes: Sequence[int] = (6, 6, 6),
        drop_path: float = 0.2,
        norm_op: type[nn.Module] = nn.BatchNorm3d,
        norm_op_kwargs: dict[str, Any] | None = None,
        activation_checkpointing: bool = False,
        channels_last: bool = True,
    ):
        triples = require_mode(strides)
        check_lengths(LEVELS, features_per_stage=features_per_stage, dropout_per_stage=dropout_per_stage)
        check_lengths(LEVELS - EMBEDDING_LEVELS, depths=depths, num_heads=num_heads, window_sizes=window_sizes)
        check_counts(
            input_channels=input_channels,
            num_classes=num_classes,
            features_per_stage=features_per_stage,
            depths=depths,
            num_heads=num_heads,
            window_sizes=window_sizes,
        )
        check_probabilities(dropout_per_stage=dropout_per_stage, drop_path=drop_path)
        _check_heads(features_per_stage, num_heads)
        if norm_op not in (nn.BatchNorm3d, nn.InstanceNorm3d):
            raise ValueError(f"norm_op = {norm_op}; legal: torch.nn.BatchNorm3d, torch.nn.InstanceNorm3d")
        if norm_op_kwargs is None:
            norm_op_kwargs = {"affine": True}

        norm: _Norm = functools.partial(norm_op, **norm_op_kwargs)
        kernels = level_kernels(triples)

        def block(level: int) -> nn.Module:
            features, dropout = features_per_stage[level], dropout_per_stage[level]
            if level < EMBEDDING_LEVELS:
                return conv_block(features, kernels[level], dropout, norm)
            i = level - EMBEDDING_LEVELS
            return PCTBlock(features, depths[i], num_heads[i], window_sizes[i], dropout, drop_path, norm)

        encoder = Encoder(
            nn.Conv3d(input_channels, features_per_stage[0], kernels[0], padding="same"),
            [
                Down(features_per_stage[i], features_per_stage[i + 1], triples[i + 1], kernels[i + 1], norm)
                for i in range(LEVELS - 1)
            ],
            [block(level) for level in range(LEVELS)],
        )
        upwards = range(LEVELS - 2, -1, -1)  # as in nnU-Net's decoders: the deepest first
        decoder = Decoder(
            [Up(features_per_stage[i + 1], features_per_stage[i], triples[i + 1], kernels[i], norm) for i in upwards],
            [block(level) for level in upwards],
            [norm_act_conv(features_per_stage[level], num_classes, (1, 1, 1), norm) for level in upwards],
            deep_supervision,
        )
        super().__init__(input_channels, triples, encoder, decoder, activation_checkpointing, channels_last)


class PReLU(nn.PReLU):
    """torch's PReLU with one slope, given to the compiler as a slope for each channel.

    The gradient of the slope is then summed over the same axes as the gradients of the norm before it. This is meant to
    let the compiler sum both in one pass: torch's sums over all axes took 10 of 58 ms of a compiled training step (one
    H100, torch 2.11, batch 2 of 64x128x128, bf16, channels-last). What it gains on a GPU has not been measured. On a
    CPU the compiled step moves 1.07 instead of 1.11 GB (batch 2 of 16x32x32, fp32).

    Compiled, the slope keeps its precision under autocast, and the output that of the input.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():  # torch's own operator keeps less in memory
            return super().forward(x)
        slope = self.weight.expand(x.shape[1]).reshape(1, -1, 1, 1, 1)
        return torch.where(x > 0, x, (slope * x).to(x.dtype))


class PCTBlock(nn.Module):
    """Parallel convolution and transformer: the sum of both branches for the same input, (B, C, D, H, W)."""

    def __init__(
        self,
        features: int,
        depth: int,
        num_heads: int,
        window_size: int,
        dropout: float,
        drop_path: float,
        norm: _Norm,
    ):
        super().__init__()
        self.convolution = conv_block(features, (3, 3, 3), dropout, norm)
        self.dropout = nn.Dropout(dropout)
        self.attention = nn.Sequential(
            *(SwinBlock(features, num_heads, window_size, i % 2 == 1, dropout, drop_path) for i in range(depth))
        )

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.dropout(x).movedim(1, -1)  # B, D, H, W, C
        return self.convolution(x) + self.attention(tokens).movedim(-1, 1)


class Down(nn.Module):
    """Max-pooling, then norm, PReLU and a convolution to the features of the next level."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        stride: Triple,
        kernel: Triple,
        norm: _Norm,
    ):
        super().__init__()
        self.pool = nn.MaxPool3d(stride)
        self.conv = norm_act_conv(in_features, out_features, kernel, norm)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.pool(x))


class Up(nn.Module):
    """Transposed convolution of the deeper level, concatenated after the skip; then norm, PReLU and convolution."""

    def __init__(
        self,
        in_features: int,
        skip_features: int,
        stride: Triple,
        kernel: Triple,
        norm: _Norm,
    ):
        super().__init__()
        self.up = nn.Sequential(
            norm(in_features),
            PReLU(),
            nn.ConvTranspose3d(in_features, skip_features, kernel_size=stride, stride=stride),
        )
        self.conv = norm_act_conv(2 * skip_features, skip_features, kernel, norm)

    def forward(self, skip: Tensor, x: Tensor) -> Tensor:
        return self.conv(torch.cat([skip, self.up(x)], dim=1))


def norm_act_conv(in_features: int, out_features: int, kernel: Triple, norm: _Norm) -> nn.Sequential:
    """Return norm, PReLU and convolution, in the paper's order."""
    return nn.Sequential(norm(in_features), PReLU(), nn.Conv3d(in_features, out_features, kernel, padding="same"))


def conv_block(features: int, kernel: Triple, dropout: float, norm: _Norm) -> nn.Sequential:
    """Return twice norm, PReLU and convolution, with dropout before the second convolution and no residual."""
    norm2, act2, conv2 = norm_act_conv(features, features, kernel, norm)
    return nn.Sequential(*norm_act_conv(features, features, kernel, norm), norm2, act2, nn.Dropout(dropout), conv2)


def _check_heads(features_per_stage: Sequence[int], num_heads: Sequence[int]) -> None:
    features = features_per_stage[EMBEDDING_LEVELS:]
    if any(f % h for f, h in zip(features, num_heads, strict=True)):
        raise ValueError(
            f"num_heads = {list(num_heads)} must divide the features of levels 2, 3 and 4, {list(features)}"
        )
