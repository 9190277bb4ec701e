"""Window attention in 3D: multi-head self-attention within windows; every second block shifts them by half a window.

Inputs are maps of tokens, (B, D, H, W, C), cut into windows along D, H and W. Source: Liu et al., "Swin Transformer",
arXiv 2103.14030, section 3.2, in the 3D form of MIS-FM (arXiv 2306.16925), ``net/transformer.py``.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F  # noqa: N812
from dynamic_network_architectures.building_blocks.regularization import DropPath
from torch import Tensor, nn

_MLP_RATIO = 4
_OTHER_REGION = -100.0  # added to the logits of two tokens that are in one window only because of the cyclic shift
_Size = tuple[int, int, int]


class SwinBlock(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)), each branch with stochastic depth.

    Args:
        dim: number of features C.
        num_heads: number of attention heads; must divide ``dim``.
        window_size: side of a window in tokens.
        shifted: shift the windows by half a window.
        dropout: probability for the attention weights, the attention's result and the MLP.
        drop_path: probability that a sample skips a branch in training.
    """

    def __init__(
        self, dim: int, num_heads: int, window_size: int, shifted: bool, dropout: float = 0.0, drop_path: float = 0.0
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = WindowAttention(dim, num_heads, window_size, shifted, dropout)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(
            nn.Linear(dim, _MLP_RATIO * dim),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(_MLP_RATIO * dim, dim),
            nn.Dropout(dropout),
        )
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:  # (B, D, H, W, C) -> the same
        x = x + self.drop_path(self.attention(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class WindowAttention(nn.Module):
    """softmax(q k^T / sqrt(d) + B) v within every window, for maps of any size.

    The relative position bias B has one learnt value per head and offset between two tokens of a window. Maps are
    zero-padded at the end of each axis to whole windows; as published, padding tokens take part in the attention.

    If an axis is no longer than a window, one window covers it and uses the inner part of the bias table. One set of
    parameters therefore serves all map sizes. (MIS-FM builds the network for one map size; its windows are as long as
    the shortest axis along all three, and its table has that size.) As published, such a map is not shifted.

    Args:
        dim: number of features C.
        num_heads: number of attention heads; must divide ``dim``.
        window_size: side of a window in tokens.
        shifted: shift the windows by half a window. The shift is cyclic; a mask separates tokens that are not
            neighbours in the map.
        dropout: probability for the attention weights and the result.
    """

    def __init__(self, dim: int, num_heads: int, window_size: int, shifted: bool, dropout: float = 0.0):
        super().__init__()
        self.num_heads = num_heads
        self.window_size = window_size
        self.shifted = shifted
        self.dropout = dropout
        self.index: Tensor
        self.qkv = nn.Linear(dim, 3 * dim)
        self.projection = nn.Linear(dim, dim)
        self.projection_dropout = nn.Dropout(dropout)
        # row: offset (z, y, x) between two tokens, each from -(window_size - 1) to window_size - 1
        self.position_bias = nn.Parameter(torch.empty((2 * window_size - 1) ** 3, num_heads))
        nn.init.normal_(self.position_bias, std=0.02)
        self.register_buffer("index", relative_position_index(window_size), persistent=False)

    def forward(self, x: Tensor) -> Tensor:  # (B, D, H, W, C) -> the same
        size = x.shape[1:4]
        window, shift = self._windows(size)
        depth, height, width = (math.ceil(side / w) * w for side, w in zip(size, window, strict=True))
        padded = (depth, height, width)

        x = _pad(x, padded)
        if shift:
            x = x.roll([-shift] * 3, dims=(1, 2, 3))
        x = self._attend(partition(x, window), padded, window, shift)
        x = merge(x, padded, window)
        if shift:
            x = x.roll([shift] * 3, dims=(1, 2, 3))
        x = x[:, : size[0], : size[1], : size[2]]
        return self.projection_dropout(self.projection(x))

    def _windows(self, size: torch.Size) -> tuple[_Size, int]:
        """Return the window along D, H, W, and the shift along each axis, for a map of this size, in tokens."""
        depth, height, width = (min(self.window_size, side) for side in size)
        shift = self.window_size // 2 if self.shifted and min(size) > self.window_size else 0
        return (depth, height, width), shift

    def _attend(self, tokens: Tensor, padded: _Size, window: _Size, shift: int) -> Tensor:
        """Return the attention within the windows of a padded map: (B, windows, N, C) -> the same."""
        qkv = self.qkv(tokens).unflatten(-1, (3, self.num_heads, -1))
        qkv = qkv.permute(3, 0, 1, 4, 2, 5)  # 3, B, windows, heads, N, C / heads
        bias = self._bias(padded, window, shift, qkv)
        # The fused kernels take 4 axes, so the windows are joined with another axis. If all windows share the bias,
        # they join the batch, which copies nothing. Else they join the heads, so that the bias of each window need not
        # be repeated for every sample.
        joined = 0 if bias.shape[0] == 1 else 1
        query, key, value = qkv.flatten(joined + 1, joined + 2)
        out = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=bias.reshape(1, -1, *bias.shape[2:]),
            dropout_p=self.dropout if self.training else 0.0,
        )
        out = out.unflatten(joined, tokens.shape[:2] if joined == 0 else (-1, self.num_heads))
        return out.transpose(2, 3).flatten(3)  # B, windows, N, C

    def _bias(self, padded: _Size, window: _Size, shift: int, like: Tensor) -> Tensor:
        """Return the bias, (windows or 1, heads, N, N), in the precision and on the device of ``like``."""
        d, h, w = window
        index = self.index[:d, :h, :w, :d, :h, :w].reshape(d * h * w, -1)
        bias = self.position_bias[index].permute(2, 0, 1)[None].to(like.dtype)  # 1, heads, N, N
        if not shift:
            return bias
        # Not cached: it is one number per token, while the bias has windows x heads x N x N numbers.
        region = shifted_regions(padded, window, shift, like.device)  # windows, N
        together = region[:, None, :, None] == region[:, None, None, :]
        return torch.where(together, bias, bias + _OTHER_REGION)  # windows, heads, N, N


def partition(x: Tensor, window: _Size) -> Tensor:
    """Cut a map (B, D, H, W, C), whole windows along each axis, into (B, windows, tokens of a window, C)."""
    batch, depth, height, width, channels = x.shape
    d, h, w = window
    x = x.reshape(batch, depth // d, d, height // h, h, width // w, w, channels)
    return x.permute(0, 1, 3, 5, 2, 4, 6, 7).reshape(batch, -1, d * h * w, channels)


def merge(windows: Tensor, size: _Size, window: _Size) -> Tensor:
    """Join the windows of :func:`partition` to a map of ``size`` (D, H, W)."""
    batch, channels = windows.shape[0], windows.shape[-1]
    counts = [side // w for side, w in zip(size, window, strict=True)]
    x = windows.reshape(batch, *counts, *window, channels)
    return x.permute(0, 1, 4, 2, 5, 3, 6, 7).reshape(batch, *size, channels)


def _pad(x: Tensor, size: _Size) -> Tensor:
    """Append zeros to a map (B, D, H, W, C) up to ``size``."""
    depth, height, width = (new - old for new, old in zip(size, x.shape[1:4], strict=True))
    return F.pad(x, (0, 0, 0, width, 0, height, 0, depth)) if depth or height or width else x


def window_side(rows: int) -> int:
    """Return the side of a window whose bias table has ``rows`` = (2 * side - 1)^3 rows."""
    return (round(rows ** (1 / 3)) + 1) // 2


def relative_position_index(window_size: int) -> Tensor:
    """Return the row of the bias table for each pair of tokens of a window: (z, y, x, z', y', x').

    All six axes have ``window_size`` entries. The table has one row per offset, (2 * window_size - 1)^3 in all; z
    varies slowest, x fastest.
    """
    token = torch.arange(window_size)
    offset = token[:, None] - token + window_size - 1  # from 0
    span = 2 * window_size - 1
    z, y, x = offset[:, None, None, :, None, None], offset[:, None, None, :, None], offset[:, None, None, :]
    return (z * span + y) * span + x


def shifted_regions(size: _Size, window: _Size, shift: int, device: torch.device) -> Tensor:
    """Return the region of each token of a cyclically shifted map, (windows, N): neighbours share a region.

    Along a shifted axis the last window holds two regions: tokens from the end of the map, and tokens that the shift
    moved there from its beginning.
    """
    z, y, x = (torch.arange(side, device=device) >= side - shift for side in size)
    region = 4 * z[:, None, None] + 2 * y[:, None] + x
    return partition(region[None, ..., None], window)[0, ..., 0]
