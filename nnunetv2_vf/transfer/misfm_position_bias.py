"""Undo a mistake in the relative position bias of MIS-FM's PCT-Net.

A window of w x w x w tokens has (2w - 1)^3 offsets between two tokens, and the bias table has a row for each. MIS-FM
computes the row of an offset with a wrong factor, so different offsets share rows and most rows are never used.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nnunetv2_vf.window_attention import window_side


def separate_offsets(table: Tensor, index: Tensor | None) -> Tensor | None:
    """Return a released bias table with one row for each offset; the bias of every pair of tokens stays the same.

    Args:
        table: ((2w - 1)^3, heads), as released.
        index: (w^3, w^3), as released: the row for each pair of tokens.

    Returns:
        a table of the same shape in the row order of :mod:`nnunetv2_vf.window_attention`; None if the two tensors are
        not a bias table and the index that MIS-FM computes.
    """
    if table.ndim != 2 or 0 in table.shape or index is None:
        return None
    window = window_side(table.shape[0])
    if table.shape[0] != (2 * window - 1) ** 3 or index.shape != (window**3, window**3):
        return None
    if not torch.equal(index.long(), _released_index(window)):
        return None
    offset = torch.arange(2 * window - 1)
    return table[_released_row(offset[:, None, None], offset[:, None], offset, window).flatten()]


def _released_index(window: int) -> Tensor:
    """Return MIS-FM's row for each pair of tokens of a window, (w^3, w^3)."""
    tokens = torch.cartesian_prod(*[torch.arange(window)] * 3)
    z, y, x = (tokens[:, None] - tokens + window - 1).unbind(-1)
    return _released_row(z, y, x, window)


def _released_row(z: Tensor, y: Tensor, x: Tensor, window: int) -> Tensor:
    """Return MIS-FM's row for offsets whose z, y, x are counted from 0 to 2w - 2.

    It counts 3w - 1 rows for a step in z, where (2w - 1)^2 would be right.
    """
    return z * (3 * window - 1) + y * (2 * window - 1) + x
