"""Fit one pretrained tensor to another shape.

A network with fitted tensors computes the same as before if all input channels are equal, if the input is constant
along the axis of a shortened kernel, and for distances between tokens that occurred in pretraining. A change and its
reverse give the original tensor, unless the first change loses information.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from nnunetv2_vf.window_attention import window_side


def fit_tensor(
    source: Tensor, shape: torch.Size, module: nn.Module, parameter: str, is_input: bool
) -> tuple[Tensor | None, str]:
    """Fit a pretrained tensor to the shape of its counterpart in the target network.

    Args:
        module: of the target network; ``parameter`` is the tensor's name in it.
        is_input: True if the tensor is the weight of the convolution that reads the image.

    Returns:
        the tensor and a description of the changes ("" if there are none), or None and both shapes if no rule fits.
    """
    fitted, changes = source, []
    if is_input and source.shape[1] != shape[1]:
        fitted = fit_channels(fitted, shape[1])
        changes.append(f"input channels {source.shape[1]} -> {shape[1]}")
    is_convolution, is_upsampling = isinstance(module, nn.Conv3d), isinstance(module, nn.ConvTranspose3d)
    if (is_convolution or is_upsampling) and parameter == "weight" and source.shape[2:] != shape[2:]:
        kernel = shape[2:]
        fitted = fit_kernel(fitted, kernel) if is_convolution else fit_upsampling(fitted, kernel)
        kind = "kernel" if is_convolution else "upsampling"
        changes.append(f"{kind} {_format_shape(source.shape[2:])} -> {_format_shape(kernel)}")
    if parameter == "position_bias" and source.shape[0] != shape[0]:
        fitted = fit_position_bias(fitted, shape[0])
        changes.append(f"window {window_side(source.shape[0])} -> {window_side(shape[0])}")
    if fitted.shape != shape:
        return None, f"{_format_shape(source.shape)} in the file, {_format_shape(shape)} in the plans"
    return fitted, ", ".join(changes)


def fit_channels(weight: Tensor, channels: int) -> Tensor:
    """Change the number of input channels of a convolution; the output stays the same if all channels are equal.

    More channels: the old ones are repeated in turn and divided by the number of their copies. Fewer channels: new
    channel j is the sum of the old channels j, j + channels, j + 2 * channels, ...

    Args:
        weight: (features, old channels, D, H, W).
    """
    old_channels = weight.shape[1]
    if channels < old_channels:
        return torch.stack([weight[:, j::channels].sum(1) for j in range(channels)], dim=1)
    old_of_new = torch.arange(channels) % old_channels
    copies = torch.bincount(old_of_new, minlength=old_channels)[old_of_new]
    return weight[:, old_of_new] / copies.view(-1, 1, 1, 1).to(weight)


def fit_kernel(weight: Tensor, kernel: Sequence[int]) -> Tensor:
    """Change the kernel size of a convolution around the same centre.

    A longer kernel is padded with zeros and computes the same. For a shorter kernel the entries that are cut off are
    added to the outermost remaining ones; it computes the same for images that are constant along this axis.

    Args:
        weight: (features, channels, D, H, W).
        kernel: new D, H, W.

    Returns:
        the fitted weight. If the kernels have no common centre along an axis (one side odd, the other even), its shape
        is not ``kernel``.
    """
    for axis, size in enumerate(kernel, start=2):
        margin, remainder = divmod(weight.shape[axis] - size, 2)
        if remainder:
            return weight
        if margin < 0:
            padding = [0, 0] * (weight.ndim - 1 - axis) + [-margin, -margin]
            weight = F.pad(weight, padding)
        elif margin > 0:
            before, kept, after = weight.split([margin, size, margin], axis)
            kept = kept.clone()
            kept.narrow(axis, 0, 1).add_(before.sum(axis, keepdim=True))
            kept.narrow(axis, size - 1, 1).add_(after.sum(axis, keepdim=True))
            weight = kept
    return weight


def fit_upsampling(weight: Tensor, kernel: Sequence[int]) -> Tensor:
    """Change the kernel of a transposed convolution: repeat entries or average them, which keeps the output's scale.

    Args:
        weight: (channels, features, D, H, W).
        kernel: new D, H, W.
    """
    depth, height, width = kernel
    return F.adaptive_avg_pool3d(weight, (depth, height, width))


def fit_position_bias(table: Tensor, rows: int) -> Tensor:
    """Change the window of a table of relative position biases.

    Offsets that both windows have keep their bias; larger offsets get the bias of the nearest offset in the old window.

    Args:
        table: ((2 * window - 1)^3, heads), of :class:`nnunetv2_vf.window_attention.WindowAttention`.
        rows: number of rows of the new table.
    """
    old_window, window = window_side(table.shape[0]), window_side(rows)
    span = 2 * old_window - 1
    offset = torch.arange(1 - window, window).clamp(1 - old_window, old_window - 1) + old_window - 1
    old_rows = (offset[:, None, None] * span + offset[:, None]) * span + offset
    return table[old_rows.flatten()]


def _format_shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))
