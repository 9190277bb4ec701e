"""The arithmetic of a training step, and a step that never waits for its device.

nnU-Net's own step asks the GPU for the loss, and GradScaler for whether to step, before the next step is prepared.
Here both stay on the device: a fused optimiser reads there whether to step, the loss is read once an epoch.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.amp import GradScaler, autocast
from torch.optim import Optimizer

from nnunetv2_vf.errors import UserError

_MAX_GRADIENT_NORM = 12  # nnU-Net's
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Precision(NamedTuple):
    """What convolutions and matrix products are computed in: bf16 and fp16 by autocast, tf32, or fp32 throughout."""

    name: str
    device_type: str

    @classmethod
    def choose(cls, setting: str, device: torch.device) -> Precision:
        """The precision that a setting (``auto`` or a name) means on a device.

        Raises:
            UserError: the device has not got it. Half precision on CPUs is not offered: gradients of torch's
                convolutions are now and then NaN there (2.14, maps of a few voxels).
        """
        offered = ["fp32"]
        if device.type == "cuda":
            offered = ["bf16", "fp16", "tf32", "fp32"]
            if not torch.cuda.is_bf16_supported(including_emulation=False):
                offered = ["fp16", "fp32"]
        name = offered[0] if setting == "auto" else setting
        if name not in offered:
            raise UserError(
                f"precision {name!r} is not to be had on {device.type}; legal there: {', '.join(['auto', *offered])} "
                "(nnUNet_vf_precision)"
            )
        return cls(name, device.type)

    def autocast(self) -> AbstractContextManager[object]:
        """The context of the forward pass and the loss."""
        if self.name in _AUTOCAST:
            return autocast(self.device_type, dtype=_AUTOCAST[self.name])
        return nullcontext()

    def scaler(self) -> GradScaler:
        """What scales the loss (fp16) and leaves out the steps whose gradient is not finite (always)."""
        return LossScaler(self.device_type) if self.name == "fp16" else UnitScaler(self.device_type)

    def apply_to_single_precision(self) -> None:
        """Whether this process computes what stays in single precision with TF32: yes, unless fp32 is asked for."""
        exact = self.name == "fp32"
        torch.set_float32_matmul_precision("highest" if exact else "high")
        torch.backends.cudnn.allow_tf32 = not exact


class LossScaler(GradScaler):
    """A GradScaler that takes no scale from a training that had none: one in another precision."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict["scale"] != 1.0:
            super().load_state_dict(state_dict)


class UnitScaler(GradScaler):
    """A GradScaler whose scale is and stays 1: all that it does is to leave out steps that are not finite."""

    def __init__(self, device_type: str):
        super().__init__(device_type, init_scale=1.0)

    def update(self, new_scale: float | Tensor | None = None) -> None:
        super().update(1.0)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """There is nothing to take over, least of all the scale of another precision."""


def training_step(
    network: nn.Module,
    optimizer: Optimizer,
    scaler: GradScaler,
    forward: Callable[[], Tensor],
) -> tuple[Tensor, Tensor]:
    """One step of nnU-Net's training, without waiting for the device if the optimiser is fused.

    Args:
        forward: the forward pass; returns the loss.

    Returns:
        The loss, and whether it counts: the gradient and its norm were finite; scalars on the device.
    """
    optimizer.zero_grad(set_to_none=True)
    loss = forward()
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(network.parameters(), _MAX_GRADIENT_NORM)
    scaler.step(optimizer)
    scaler.update()
    return loss.detach(), norm.isfinite()
