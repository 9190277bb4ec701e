"""PCT-Net: a U-shaped network that combines convolution and window attention in parallel.

Source: Wang et al., "MIS-FM", arXiv 2306.16925, section "PCT-Net" and its figure; original in MIS-FM's
``net/pct_net.py``. Plans store the dotted path ``nnunetv2_vf.pct_net.PCTNet``.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from dynamic_network_architectures.architectures.abstract_arch import AbstractDynamicNetworkArchitectures
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nnunetv2_vf.window_attention import SwinBlock

LEVELS = 5
EMBEDDING_LEVELS = 2  # levels 0 and 1 have convolution blocks, levels 2, 3 and 4 PCT blocks
PUBLISHED_FEATURES = (24, 48, 128, 256, 512)
PCT_NET_PATH = "nnunetv2_vf.pct_net.PCTNet"  # as in plans
_Triple = tuple[int, int, int]  # along D, H, W
_Norm = Callable[[int], nn.Module]  # number of features -> normalisation layer
_ISOTROPIC: _Triple = (2, 2, 2)
_IN_PLANE: _Triple = (1, 2, 2)
# Strides of the paper's three resolution modes. Those to levels 1 and 2 differ along the slice axis (axis 0).
MODES: tuple[tuple[_Triple, ...], ...] = tuple(
    ((1, 1, 1), first, second, _ISOTROPIC, _ISOTROPIC)
    for first, second in ((_ISOTROPIC, _ISOTROPIC), (_IN_PLANE, _ISOTROPIC), (_IN_PLANE, _IN_PLANE))
)


class PCTNet(AbstractDynamicNetworkArchitectures):
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
        strides: of each level, relative to the level above; the first is 1. One of :data:`MODES`.
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
            change. On 2 CPU cores it saves 20 % of the forward and backward pass (benchmarks/pct_net.py).

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
        super().__init__()
        self.input_channels = input_channels
        self.strides = _require_mode(strides)
        _check_lengths(LEVELS, features_per_stage=features_per_stage, dropout_per_stage=dropout_per_stage)
        _check_lengths(LEVELS - EMBEDDING_LEVELS, depths=depths, num_heads=num_heads, window_sizes=window_sizes)
        _check_counts(
            input_channels=[input_channels],
            num_classes=[num_classes],
            features_per_stage=features_per_stage,
            depths=depths,
            num_heads=num_heads,
            window_sizes=window_sizes,
        )
        _check_probabilities(dropout_per_stage=dropout_per_stage, drop_path=[drop_path])
        _check_heads(features_per_stage, num_heads)
        if norm_op not in (nn.BatchNorm3d, nn.InstanceNorm3d):
            raise ValueError(f"norm_op = {norm_op}; legal: torch.nn.BatchNorm3d, torch.nn.InstanceNorm3d")
        if norm_op_kwargs is None:
            norm_op_kwargs = {"affine": True}

        norm: _Norm = functools.partial(norm_op, **norm_op_kwargs)
        kernels = [_kernel(self.strides[level + 1]) for level in range(LEVELS - 1)] + [(3, 3, 3)]

        def block(level: int) -> nn.Module:
            features, dropout = features_per_stage[level], dropout_per_stage[level]
            if level < EMBEDDING_LEVELS:
                return conv_block(features, kernels[level], dropout, norm)
            i = level - EMBEDDING_LEVELS
            return PCTBlock(features, depths[i], num_heads[i], window_sizes[i], dropout, drop_path, norm)

        self.encoder = Encoder(
            nn.Conv3d(input_channels, features_per_stage[0], kernels[0], padding="same"),
            [
                Down(features_per_stage[i], features_per_stage[i + 1], self.strides[i + 1], kernels[i + 1], norm)
                for i in range(LEVELS - 1)
            ],
            [block(level) for level in range(LEVELS)],
        )
        upwards = range(LEVELS - 2, -1, -1)  # as in nnU-Net's decoders: the deepest first
        self.decoder = Decoder(
            [
                Up(features_per_stage[i + 1], features_per_stage[i], self.strides[i + 1], kernels[i], norm)
                for i in upwards
            ],
            [block(level) for level in upwards],
            [norm_act_conv(features_per_stage[level], num_classes, (1, 1, 1), norm) for level in upwards],
            deep_supervision,
        )
        self.encoder.checkpointing = self.decoder.checkpointing = activation_checkpointing
        if channels_last:
            _store_channels_last(self)
        # read by nnU-Net's fine-tuning of nnssl weights
        self.key_to_encoder = "encoder"
        self.key_to_stem = "encoder.stem"
        self.keys_to_in_proj = ("encoder.stem",)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:  # (B, input_channels, D, H, W)
        total = total_stride(self.strides)
        if any(side % stride for side, stride in zip(x.shape[2:], total, strict=True)):
            raise ValueError(
                f"PCTNet got an input of {tuple(x.shape[2:])} voxels; each side must be a multiple of {total}"
            )
        return self.decoder(self.encoder(x))

    def compute_conv_feature_map_size(self, input_size: Sequence[int]) -> int:
        """Return the number of elements in all convolution outputs for one sample of ``input_size`` (D, H, W)."""
        elements = 0

        def count(module: nn.Module, inputs: Any, output: Tensor) -> None:
            nonlocal elements
            elements += output.numel()

        network = copy.deepcopy(self).to("meta").eval()
        for module in network.modules():
            if isinstance(module, nn.Conv3d | nn.ConvTranspose3d):
                module.register_forward_hook(count)
        with torch.no_grad():
            network(torch.empty((1, self.input_channels, *input_size), device="meta"))
        return elements


class Encoder(nn.Module):
    """The paper's multi-scale embedding (levels 0, 1) and the downward half of its pyramid (levels 2, 3, 4)."""

    def __init__(self, stem: nn.Module, downs: list[nn.Module], stages: list[nn.Module]):
        super().__init__()
        self.stem = stem
        self.downs = nn.ModuleList(downs)
        self.stages = nn.ModuleList(stages)
        self.checkpointing = False

    def forward(self, x: Tensor) -> list[Tensor]:  # (B, channels, D, H, W) -> one map per level
        maps = [_run_or_checkpoint(self.checkpointing, self.stages[0], self.stem(x))]
        for down, stage in zip(self.downs, self.stages[1:], strict=True):
            maps.append(
                _run_or_checkpoint(self.checkpointing, stage, _run_or_checkpoint(self.checkpointing, down, maps[-1]))
            )
        return maps


class Decoder(nn.Module):
    """The upward half of the paper's pyramid (levels 3, 2) and its prediction head (levels 1, 0).

    ``seg_layers`` holds the output layers of levels 3, 2, 1, 0. nnU-Net transfers all pretrained weights except these.
    """

    def __init__(
        self, ups: list[nn.Module], stages: list[nn.Module], seg_layers: list[nn.Module], deep_supervision: bool
    ):
        super().__init__()
        self.ups = nn.ModuleList(ups)
        self.stages = nn.ModuleList(stages)
        self.seg_layers = nn.ModuleList(seg_layers)
        self.checkpointing = False
        # Without deep supervision the auxiliary output layers exist, because nnU-Net's predictor loads strictly. They
        # need no gradient: DistributedDataParallel fails on parameters that expect a gradient and get none.
        self.seg_layers[:-1].requires_grad_(deep_supervision)
        self._deep_supervision = deep_supervision

    @property
    def deep_supervision(self) -> bool:
        """True if the output is a list. nnU-Net's trainer switches it off for validation and on again."""
        return self._deep_supervision

    @deep_supervision.setter
    def deep_supervision(self, enabled: bool) -> None:
        if enabled:  # never switched off again: nnU-Net turns deep supervision off for validation only
            self.seg_layers[:-1].requires_grad_(True)
        self._deep_supervision = enabled

    def forward(self, maps: list[Tensor]) -> Tensor | list[Tensor]:
        x = maps[-1]
        outputs = []
        for up, stage, seg_layer, skip in zip(self.ups, self.stages, self.seg_layers, maps[-2::-1], strict=True):
            x = _run_or_checkpoint(self.checkpointing, stage, _run_or_checkpoint(self.checkpointing, up, skip, x))
            if self._deep_supervision:
                outputs.append(seg_layer(x))
        return outputs[::-1] if self._deep_supervision else self.seg_layers[-1](x)


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
        stride: _Triple,
        kernel: _Triple,
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
        stride: _Triple,
        kernel: _Triple,
        norm: _Norm,
    ):
        super().__init__()
        self.up = nn.Sequential(
            norm(in_features),
            nn.PReLU(),
            nn.ConvTranspose3d(in_features, skip_features, kernel_size=stride, stride=stride),
        )
        self.conv = norm_act_conv(2 * skip_features, skip_features, kernel, norm)

    def forward(self, skip: Tensor, x: Tensor) -> Tensor:
        return self.conv(torch.cat([skip, self.up(x)], dim=1))


def norm_act_conv(in_features: int, out_features: int, kernel: _Triple, norm: _Norm) -> nn.Sequential:
    """Return norm, PReLU and convolution, in the paper's order."""
    return nn.Sequential(norm(in_features), nn.PReLU(), nn.Conv3d(in_features, out_features, kernel, padding="same"))


def conv_block(features: int, kernel: _Triple, dropout: float, norm: _Norm) -> nn.Sequential:
    """Return twice norm, PReLU and convolution, with dropout before the second convolution and no residual."""
    norm2, act2, conv2 = norm_act_conv(features, features, kernel, norm)
    return nn.Sequential(*norm_act_conv(features, features, kernel, norm), norm2, act2, nn.Dropout(dropout), conv2)


def _store_channels_last(network: nn.Module) -> None:
    """Store kernels channels-last; feature maps then get that layout too. Module.to cannot do it on fake tensors."""
    for conv in network.modules():
        if isinstance(conv, nn.Conv3d | nn.ConvTranspose3d):
            stored = conv.weight.detach().contiguous(memory_format=torch.channels_last_3d)
            conv.weight = nn.Parameter(stored, conv.weight.requires_grad)


def total_stride(strides: Sequence[_Triple]) -> _Triple:
    """Return the number of input voxels per voxel of the deepest level, along each axis."""
    depth, height, width = (math.prod(axis) for axis in zip(*strides, strict=True))
    return depth, height, width


def _kernel(next_stride: Sequence[int]) -> _Triple:
    """Return the kernel of a level: 1x3x3 if the next level does not halve the slice axis, else 3x3x3."""
    return (3, 3, 3) if next_stride[0] == 2 else (1, 3, 3)


def _require_mode(strides: Sequence[int | Sequence[int]]) -> tuple[_Triple, ...]:
    """Return the strides as triples, if they are those of a resolution mode; else raise ValueError."""
    triples = tuple((s,) * 3 if isinstance(s, int) else tuple(s) for s in strides)
    for mode in MODES:
        if triples == mode:
            return mode
    legal = "; ".join(f"{[list(s) for s in mode]} (mode {i})" for i, mode in enumerate(MODES))
    raise ValueError(f"PCTNet has no resolution mode with strides = {[list(s) for s in triples]}; legal: {legal}")


def _check_lengths(length: int, **arguments: Sequence[Any]) -> None:
    for name, values in arguments.items():
        if len(values) != length:
            raise ValueError(f"{name} = {list(values)}; PCTNet needs {length} values")


def _check_counts(**arguments: Sequence[int]) -> None:
    for name, values in arguments.items():
        if min(values) < 1:
            raise ValueError(f"{name}: PCTNet got {', '.join(map(str, values))}; legal: 1 and more")


def _check_probabilities(**arguments: Sequence[float]) -> None:
    for name, values in arguments.items():
        if min(values) < 0 or max(values) >= 1:
            raise ValueError(f"{name}: PCTNet got {', '.join(map(str, values))}; legal: from 0 to below 1")


def _check_heads(features_per_stage: Sequence[int], num_heads: Sequence[int]) -> None:
    features = features_per_stage[EMBEDDING_LEVELS:]
    if any(f % h for f, h in zip(features, num_heads, strict=True)):
        raise ValueError(
            f"num_heads = {list(num_heads)} must divide the features of levels 2, 3 and 4, {list(features)}"
        )


# ------------------------------------------------------------------ activation checkpointing


def _run_or_checkpoint(checkpointing: bool, module: nn.Module, *inputs: Tensor) -> Tensor:
    """Run a module; with checkpointing in training, recompute its activations in the backward pass."""
    if not checkpointing or not module.training or not torch.is_grad_enabled():
        return module(*inputs)
    if torch.compiler.is_compiling():  # the compiler accepts no contexts, and updates batch statistics once
        return checkpoint(module, *inputs, use_reentrant=False)
    return checkpoint(module, *inputs, use_reentrant=False, context_fn=lambda: _recomputation(module))


def _recomputation(module: nn.Module) -> tuple[AbstractContextManager, AbstractContextManager]:
    """Return the contexts of the forward pass and of its repetition, which must not update batch statistics again."""
    return nullcontext(), _frozen_statistics(module)


@contextmanager
def _frozen_statistics(module: nn.Module) -> Iterator[None]:
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm3d | nn.SyncBatchNorm)]
    before = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0  # keeps the running statistics
        norm.num_batches_tracked = None  # keeps their count
    try:
        yield
    finally:
        for norm, momentum, batches in before:
            norm.momentum = momentum
            norm.num_batches_tracked = batches
