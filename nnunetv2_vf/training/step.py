"""The arithmetic of a training step that never waits for its device.

nnU-Net's own step waits for the GPU twice: for the loss, and for GradScaler's test whether the gradient is finite. Here
both values stay on the GPU: the fused optimiser reads there whether to step, and the losses are read once an epoch.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.amp import GradScaler, autocast
from torch.optim import Optimizer

from nnunetv2_vf.errors import UserError
from nnunetv2_vf.settings.shared import NNUNET_GRADIENT_CLIP

_AUTOCAST_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Precision(NamedTuple):
    """The number format of convolutions and matrix products: bf16 or fp16 (by autocast), tf32, or fp32."""

    name: str
    device_type: str

    @classmethod
    def choose(cls, setting: str, device: torch.device) -> Precision:
        """Return the precision that a setting (``auto`` or a name) stands for on a device.

        Raises:
            UserError: the device does not support this precision. CPUs get fp32 only: with half precision, gradients of
                torch's convolutions are sometimes NaN there (torch 2.14, maps of a few voxels).
        """
        available = ["fp32"]
        if device.type == "cuda":
            available = ["bf16", "fp16", "tf32", "fp32"]
            if not torch.cuda.is_bf16_supported(including_emulation=False):
                available = ["fp16", "fp32"]
        name = available[0] if setting == "auto" else setting
        if name not in available:
            raise UserError(
                f"precision {name!r} is not available on {device.type}; legal: {', '.join(['auto', *available])} "
                "(nnUNet_vf_precision)"
            )
        return cls(name, device.type)

    def autocast(self) -> AbstractContextManager[object]:
        """Return the context for the forward pass and the loss."""
        if self.name in _AUTOCAST_TYPES:
            return autocast(self.device_type, dtype=_AUTOCAST_TYPES[self.name])
        return nullcontext()

    def scaler(self) -> GradScaler:
        """Return the scaler, which skips steps with a non-finite gradient and, with fp16, scales the loss."""
        return LossScaler(self.device_type) if self.name == "fp16" else UnitScaler(self.device_type)

    def set_float32_precision(self) -> None:
        """Allow TF32 for everything this process computes in single precision, unless the setting is fp32."""
        exact = self.name == "fp32"
        torch.set_float32_matmul_precision("highest" if exact else "high")
        torch.backends.cudnn.allow_tf32 = not exact


class LossScaler(GradScaler):
    """The GradScaler for fp16. It ignores a checkpoint's scale of 1: it comes from another precision."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict["scale"] != 1.0:
            super().load_state_dict(state_dict)


class UnitScaler(GradScaler):
    """A GradScaler whose scale is always 1: it only skips steps with a non-finite gradient."""

    def __init__(self, device_type: str):
        super().__init__(device_type, init_scale=1.0)

    def update(self, new_scale: float | Tensor | None = None) -> None:
        super().update(1.0)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Ignore the checkpoint: the scale stays 1."""


def take_step(loss: Tensor, network: nn.Module, optimizer: Optimizer, scaler: GradScaler) -> Tensor:
    """Backward pass, gradient clipping and a step of the optimiser, as in nnU-Net's training.

    Does not wait for the device if the optimiser is fused.

    Returns:
        True if the gradient was finite and the step was taken; a scalar on the device.
    """
    optimizer.zero_grad(set_to_none=True)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(network.parameters(), NNUNET_GRADIENT_CLIP)
    scaler.step(optimizer)
    scaler.update()
    return norm.isfinite()
