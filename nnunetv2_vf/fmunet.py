"""FMUNet: a U-Net with residual blocks, the convolutional network of MIS-FM.

Source: Wang et al., IEEE Transactions on Image Processing 34, 2025; original in MIS-FM's ``net/fmunet.py``. Plans store
the dotted path ``nnunetv2_vf.fmunet.FMUNet``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from dynamic_network_architectures.initialization.weight_init import InitWeights_He
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

PUBLISHED_FEATURES = (32, 64, 128, 256, 512)
LEAKY_SLOPE = 0.01  # of the leaky ReLUs, and of the initial weights, which are He's
FMUNET_PATH = "nnunetv2_vf.fmunet.FMUNet"  # as in plans


class FMUNet(FiveLevelNetwork):
    """The network of MIS-FM's ``net/fmunet.py``, with the parameter names and attributes of nnU-Net's networks.

    For features C0..C4 and an input of D x H x W voxels in resolution mode 0 (isotropic)::

        encoder                                            decoder                 output
        level 0  C0  D    H    W     residual block  ----> residual block  ------> 1/1
        level 1  C1  D/2  H/2  W/2   residual block  ----> residual block  ------> 1/2
        level 2  C2  D/4  H/4  W/4   residual block  ----> residual block  ------> 1/4
        level 3  C3  D/8  H/8  W/8   residual block  ----> residual block  ------> 1/8
        level 4  C4  D/16 H/16 W/16  residual block  ----> residual block

    Every convolution but the stem comes after an instance norm and a leaky ReLU. An instance norm needs more than one
    voxel, so the input must be larger than the total stride, (16, 16, 16) in mode 0. The initial weights are He's, as
    published. In mode 1, the stride from level 0 to level 1 does not halve axis 0, and the kernels of level 0 are
    1x3x3. In mode 2, the same also holds for the stride from level 1 to level 2 and the kernels of level 1.

    Args:
        input_channels: number of image channels.
        features_per_stage: C0..C4; published are (32, 64, 128, 256, 512).
        strides: of each level, relative to the level above; the first is 1. One of
            :data:`~nnunetv2_vf.five_level_network.MODES`.
        num_classes: output channels.
        deep_supervision: return a list of outputs at 1/1, 1/2, 1/4 and 1/8 of the input size instead of only the first.
            ``decoder.deep_supervision`` changes it later.
        dropout_per_stage: dropout probability in the blocks of each level.
        depth: number of convolutions in each residual block.
        activation_checkpointing: recompute every block in the backward pass instead of keeping its activations.
        channels_last: store kernels channels-last in memory, so that convolutions compute in this layout. Off, because
            instance norms return the ordinary layout, so that every layer would convert twice. Shapes and results do
            not change.

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
        depth: int = 2,
        activation_checkpointing: bool = False,
        channels_last: bool = False,
    ):
        triples = require_mode(strides)
        check_lengths(LEVELS, features_per_stage=features_per_stage, dropout_per_stage=dropout_per_stage)
        check_counts(
            input_channels=input_channels,
            num_classes=num_classes,
            features_per_stage=features_per_stage,
            depth=depth,
        )
        check_probabilities(dropout_per_stage=dropout_per_stage)
        features, kernels = features_per_stage, level_kernels(triples)

        def block(level: int) -> nn.Module:
            return ResidualBlock(features[level], kernels[level], depth, dropout_per_stage[level])

        encoder = Encoder(
            nn.Conv3d(input_channels, features[0], kernels[0], padding="same"),
            [
                norm_act_conv(features[level], features[level + 1], kernels[level], triples[level + 1])
                for level in range(LEVELS - 1)
            ],
            [block(level) for level in range(LEVELS)],
        )
        upwards = range(LEVELS - 2, -1, -1)  # as in nnU-Net's decoders: the deepest first
        decoder = Decoder(
            [Up(features[level + 1], features[level], triples[level + 1], kernels[level]) for level in upwards],
            [block(level) for level in upwards],
            [norm_act_conv(features[level], num_classes, kernels[level]) for level in upwards],
            deep_supervision,
            bottom=block(LEVELS - 1),
        )
        for half in (encoder, decoder):  # before the kernels are stored channels-last, which would change their order
            half.apply(InitWeights_He(LEAKY_SLOPE))
        super().__init__(input_channels, triples, encoder, decoder, activation_checkpointing, channels_last)


class ResidualBlock(nn.Module):
    """Residual convolutions, one after the other, each with norm, activation and dropout before it."""

    def __init__(self, features: int, kernel: Triple, depth: int, dropout: float):
        super().__init__()
        self.convs = nn.ModuleList(norm_act_conv(features, features, kernel, dropout=dropout) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:  # (B, features, D, H, W) -> the same
        for conv in self.convs:
            x = x + conv(x)
        return x


class Up(nn.Module):
    """Interpolation of the deeper level, concatenated after the skip; then norm, activation and convolution."""

    def __init__(self, in_features: int, skip_features: int, stride: Triple, kernel: Triple):
        super().__init__()
        self.up = nn.Sequential(
            norm_act_conv(in_features, skip_features, (1, 1, 1)),
            nn.Upsample(scale_factor=stride, mode="trilinear", align_corners=True),
        )
        self.conv = norm_act_conv(2 * skip_features, skip_features, kernel)

    def forward(self, skip: Tensor, x: Tensor) -> Tensor:  # (B, C, D, H, W) and the deeper level -> as the skip
        return self.conv(torch.cat([skip, self.up(x)], dim=1))


def norm_act_conv(
    in_features: int, out_features: int, kernel: Triple, stride: Triple = (1, 1, 1), dropout: float = 0.0
) -> nn.Sequential:
    """Return instance norm, leaky ReLU, dropout and convolution. The output has the size of the input / stride."""
    return nn.Sequential(
        nn.InstanceNorm3d(in_features, affine=True),
        # In place, because the norm's backward pass needs its input, not its output: saves a map per layer.
        nn.LeakyReLU(LEAKY_SLOPE, inplace=True),
        nn.Dropout(dropout),
        nn.Conv3d(in_features, out_features, kernel, stride, padding=(kernel[0] // 2, kernel[1] // 2, kernel[2] // 2)),
    )
