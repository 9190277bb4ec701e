"""Tensors with several names: nnU-Net's networks list most parameters under two to four names."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def storage_key(tensor: Tensor) -> tuple[Any, ...]:
    """Return a key that is equal for two names of the same tensor."""
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype
