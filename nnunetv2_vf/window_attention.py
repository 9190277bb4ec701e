"""Window attention in 3D: multi-head self-attention within windows that every second block shifts by half a window.

Tokens are maps of shape (B, D, H, W, C); windows are taken along D, H and W. Source: Liu et al., "Swin Transformer",
arXiv 2103.14030, section 3.2, in the 3D form of MIS-FM (arXiv 2306.16925), ``net/transformer.py``.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F  # noqa: N812
from dynamic_network_architectures.building_blocks.regularization import DropPath
from torch import Tensor, nn

_MLP_RATIO = 4
_OTHER_REGION = -100.0  # added to the logits of pairs that only the cyclic shift made neighbours
_Size = tuple[int, int, int]


class SwinBlock(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)), each branch with stochastic depth.

    Args:
        dim: C.
        num_heads: divides ``dim``.
        window_size: side of a window in tokens.
        shifted: whether the windows are shifted by half a window.
        dropout: of the attention weights, of the attention's result and within the MLP.
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

    B, the relative position bias, has one learnt value for each head and each offset between two tokens of a window.
    A map is zero-padded at the end of each axis to whole windows (padding tokens take part, as published). Along an
    axis no longer than a window there is one window of the map's length; it uses the inner part of the same bias
    table, so that one set of parameters serves all map sizes. (MIS-FM is built for one map size, with windows as long
    as its shortest axis along all three, and a table of their size.) As published, such a map is not shifted.

    Args:
        dim: C.
        num_heads: divides ``dim``.
        window_size: side of a window in tokens.
        shifted: whether the windows are shifted by half a window. Implemented as a cyclic shift; tokens that are
            no neighbours in the map are kept apart by a mask.
        dropout: of the attention weights and of the result.
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
        if any(shift):
            x = x.roll([-s for s in shift], dims=(1, 2, 3))
        x = self._attend(partition(x, window), padded, window, shift)
        x = merge(x, padded, window)
        if any(shift):
            x = x.roll(shift, dims=(1, 2, 3))
        x = x[:, : size[0], : size[1], : size[2]]
        return self.projection_dropout(self.projection(x))

    def _windows(self, size: torch.Size) -> tuple[_Size, _Size]:
        """Window and shift for a map of this size, in tokens along D, H, W."""
        depth, height, width = (min(self.window_size, side) for side in size)
        shift = self.window_size // 2 if self.shifted and min(size) > self.window_size else 0
        return (depth, height, width), (shift, shift, shift)

    def _attend(self, tokens: Tensor, padded: _Size, window: _Size, shift: _Size) -> Tensor:
        """Attention within the windows of a padded map, (B, windows, N, C)."""
        qkv = self.qkv(tokens).unflatten(-1, (3, self.num_heads, -1))
        qkv = qkv.permute(3, 0, 1, 4, 2, 5)  # 3, B, windows, heads, N, C / heads
        bias = self._bias(padded, window, shift, qkv)
        # The fused kernels take 4 axes. A bias common to all windows lets windows join the batch, which copies
        # nothing; a bias of each window's own makes them join the heads, so that it need not be repeated B times.
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

    def _bias(self, padded: _Size, window: _Size, shift: _Size, like: Tensor) -> Tensor:
        """The bias, (windows or 1, heads, N, N), in the precision and on the device of ``like``."""
        d, h, w = window
        index = self.index[:d, :h, :w, :d, :h, :w].reshape(d * h * w, -1)
        bias = self.position_bias[index].permute(2, 0, 1)[None].to(like.dtype)  # 1, heads, N, N
        if not any(shift):
            return bias
        # Made anew each time: one number per token, next to windows x heads x N x N for the bias they select.
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
    """The inverse of :func:`partition`, for a map of ``size`` (D, H, W)."""
    batch, channels = windows.shape[0], windows.shape[-1]
    counts = [side // w for side, w in zip(size, window, strict=True)]
    x = windows.reshape(batch, *counts, *window, channels)
    return x.permute(0, 1, 4, 2, 5, 3, 6, 7).reshape(batch, *size, channels)


def _pad(x: Tensor, size: _Size) -> Tensor:
    """Append zeros to a map (B, D, H, W, C) up to ``size``."""
    depth, height, width = (new - old for new, old in zip(size, x.shape[1:4], strict=True))
    return F.pad(x, (0, 0, 0, width, 0, height, 0, depth)) if depth or height or width else x


def window_side(rows: int) -> int:
    """The side of a window whose bias table has that many rows, (2 * side - 1)^3."""
    return (round(rows ** (1 / 3)) + 1) // 2


def relative_position_index(window_size: int) -> Tensor:
    """Row of the bias table for each pair of tokens of a window: (z, y, x, z', y', x'), each of ``window_size``.

    The table has a row for each of the (2 * window_size - 1)^3 offsets, z slowest and x fastest.
    """
    token = torch.arange(window_size)
    offset = token[:, None] - token + window_size - 1  # from 0
    span = 2 * window_size - 1
    z, y, x = offset[:, None, None, :, None, None], offset[:, None, None, :, None], offset[:, None, None, :]
    return (z * span + y) * span + x


def shifted_regions(size: _Size, window: _Size, shift: _Size, device: torch.device) -> Tensor:
    """Number the regions of a cyclically shifted map: (windows, N), one number for tokens that belong together.

    Along a shifted axis the last window holds two regions: what was at the map's end, and what the shift brought
    there from its beginning.
    """
    z, y, x = (torch.arange(side, device=device) >= side - s for side, s in zip(size, shift, strict=True))
    region = 4 * z[:, None, None] + 2 * y[:, None] + x
    return partition(region[None, ..., None], window)[0, ..., 0]
