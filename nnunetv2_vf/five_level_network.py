"""What PCT-Net and FMUNet share: five levels, three resolution modes, encoder and decoder with nnU-Net's names.

A level is a resolution: level 0 has the input's, level 4 is the deepest. In resolution mode 0 every level halves all
axes of the level above. Mode 1 is for thick slices: level 1 keeps axis 0 of level 0. Mode 2 is for thicker ones: level
2 keeps it too. The modes are those of MIS-FM's ``net/pct_net.py`` and ``net/fmunet.py``.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from dynamic_network_architectures.architectures.abstract_arch import AbstractDynamicNetworkArchitectures
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

LEVELS = 5
Triple = tuple[int, int, int]  # along D, H, W
_ISOTROPIC: Triple = (2, 2, 2)
_IN_PLANE: Triple = (1, 2, 2)
# Strides of MIS-FM's three resolution modes. Those to levels 1 and 2 differ along the slice axis (axis 0).
MODES: tuple[tuple[Triple, ...], ...] = tuple(
    ((1, 1, 1), first, second, _ISOTROPIC, _ISOTROPIC)
    for first, second in ((_ISOTROPIC, _ISOTROPIC), (_IN_PLANE, _ISOTROPIC), (_IN_PLANE, _IN_PLANE))
)


class FiveLevelNetwork(AbstractDynamicNetworkArchitectures):
    """A U-shaped network with five levels, and the attributes that nnU-Net reads.

    Args:
        input_channels: number of image channels.
        strides: of each level, relative to the level above; one of :data:`MODES`.
        encoder, decoder: the halves of the network, for these strides.
        activation_checkpointing: recompute every block in the backward pass instead of keeping its activations.
        channels_last: store kernels, and therefore feature maps, channels-last in memory. Shapes and results do not
            change.
    """

    def __init__(
        self,
        input_channels: int,
        strides: tuple[Triple, ...],
        encoder: Encoder,
        decoder: Decoder,
        activation_checkpointing: bool,
        channels_last: bool,
    ):
        super().__init__()
        self.input_channels = input_channels
        self.strides = strides
        self.encoder = encoder
        self.decoder = decoder
        self.encoder.checkpointing = self.decoder.checkpointing = activation_checkpointing
        self._has_instance_norms = any(isinstance(module, nn.InstanceNorm3d) for module in self.modules())
        if channels_last:
            _store_channels_last(self)
        # read by nnU-Net's fine-tuning of nnssl weights
        self.key_to_encoder = "encoder"
        self.key_to_stem = "encoder.stem"
        self.keys_to_in_proj = ("encoder.stem",)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:  # (B, input_channels, D, H, W)
        """Return the output, (B, num_classes, D, H, W), or with deep supervision those at 1/1, 1/2, 1/4 and 1/8.

        Raises:
            ValueError: a side is not a multiple of the total stride, or an instance norm would see a single voxel.
        """
        size, total = tuple(x.shape[2:]), total_stride(self.strides)
        if any(side % stride for side, stride in zip(size, total, strict=True)):
            raise ValueError(
                f"the input has {size} voxels; for {type(self).__name__} each side must be a multiple of {total}"
            )
        if size == total and self._has_instance_norms:
            raise ValueError(
                f"the input has {size} voxels, which is one voxel in the deepest level; the instance norms of "
                f"{type(self).__name__} need more: make one side twice as long"
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
    """The downward half: a stem, a block for each level, and a step down between two levels."""

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
    """The upward half: a step up to each level, its block and its output layer, the deepest level first.

    nnU-Net transfers all pretrained weights except the output layers, ``seg_layers``.

    Args:
        ups: steps to the levels 3, 2, 1 and 0; called with the encoder's map of the level and the decoder's map of the
            deeper level.
        stages: blocks of these levels.
        seg_layers: output layers of these levels.
        deep_supervision: return the outputs of all levels, not only that of level 0.
        bottom: block of level 4; None: the decoder begins with the encoder's map.
    """

    def __init__(
        self,
        ups: list[nn.Module],
        stages: list[nn.Module],
        seg_layers: list[nn.Module],
        deep_supervision: bool,
        bottom: nn.Module | None = None,
    ):
        super().__init__()
        self.bottom = nn.Identity() if bottom is None else bottom
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

    def forward(self, maps: list[Tensor]) -> Tensor | list[Tensor]:  # the encoder's; level 0 first, in and out
        x = _run_or_checkpoint(self.checkpointing, self.bottom, maps[-1])
        outputs = []
        for up, stage, seg_layer, skip in zip(self.ups, self.stages, self.seg_layers, maps[-2::-1], strict=True):
            x = _run_or_checkpoint(self.checkpointing, stage, _run_or_checkpoint(self.checkpointing, up, skip, x))
            if self._deep_supervision:
                outputs.append(seg_layer(x))
        return outputs[::-1] if self._deep_supervision else self.seg_layers[-1](x)


def _store_channels_last(network: nn.Module) -> None:
    """Store kernels channels-last; feature maps then get that layout too. Module.to cannot do it on fake tensors."""
    for conv in network.modules():
        if isinstance(conv, nn.Conv3d | nn.ConvTranspose3d):
            stored = conv.weight.detach().contiguous(memory_format=torch.channels_last_3d)
            conv.weight = nn.Parameter(stored, conv.weight.requires_grad)


def total_stride(strides: Sequence[Triple]) -> Triple:
    """Return the number of input voxels per voxel of the deepest level, along each axis."""
    depth, height, width = (math.prod(axis) for axis in zip(*strides, strict=True))
    return depth, height, width


def level_kernels(strides: Sequence[Triple]) -> list[Triple]:
    """Return the kernel of each level: 1x3x3 if the next level does not halve the slice axis, else 3x3x3."""
    return [(3, 3, 3) if stride[0] == 2 else (1, 3, 3) for stride in strides[1:]] + [(3, 3, 3)]


# ------------------------------------------------------------------ arguments


def require_mode(strides: Sequence[int | Sequence[int]]) -> tuple[Triple, ...]:
    """Return the strides as triples, if they are those of a resolution mode; else raise ValueError."""
    triples = tuple((s,) * 3 if isinstance(s, int) else tuple(s) for s in strides)
    for mode in MODES:
        if triples == mode:
            return mode
    legal = "; ".join(f"{[list(s) for s in mode]} (mode {i})" for i, mode in enumerate(MODES))
    raise ValueError(f"no resolution mode has strides = {[list(s) for s in triples]}; legal: {legal}")


def check_lengths(length: int, **arguments: Sequence[Any]) -> None:
    """Raise ValueError unless each argument has this many values."""
    for name, values in arguments.items():
        if not isinstance(values, Sequence) or len(values) != length:
            raise ValueError(f"{name} = {_format(values)}; legal: {length} values")


def check_counts(**arguments: int | Sequence[int]) -> None:
    """Raise ValueError unless all values are positive."""
    for name, value in arguments.items():
        if any(each < 1 for each in _values(value)):
            raise ValueError(f"{name} = {_format(value)}; legal: 1 and more")


def check_probabilities(**arguments: float | Sequence[float]) -> None:
    """Raise ValueError unless all values are at least 0 and below 1."""
    for name, value in arguments.items():
        if not all(0 <= each < 1 for each in _values(value)):
            raise ValueError(f"{name} = {_format(value)}; legal: from 0 to below 1")


def _values(value: float | Sequence[float]) -> Sequence[float]:
    return [value] if isinstance(value, int | float) else value


def _format(value: Any) -> str:
    return str(list(value) if isinstance(value, Sequence) else value)


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
