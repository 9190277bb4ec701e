"""Optimisers in nnU-Net's training loop."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch.optim import SGD, Adam, AdamW, Optimizer

from nnunetv2_vf.settings import ScheduleSettings

_NNUNET_CLIP = 12.0  # nnU-Net's train_step clips the gradient to this norm, whatever the optimiser


def make_optimizer(parameters: Iterable[Any], settings: ScheduleSettings, fused: bool = False) -> Optimizer:
    """The optimiser that the settings name; ``sgd`` has nnU-Net's momentum.

    Args:
        parameters: or groups of them.
        fused: one kernel for the whole step. A state that is loaded may come from an optimiser that is not.
    """
    kind: Any = {"adam": Adam, "adamw": AdamW, "sgd": functools.partial(SGD, momentum=0.99, nesterov=True)}
    optimizer: Optimizer = kind[settings.optimizer](
        parameters, settings.initial_lr, weight_decay=settings.weight_decay, fused=fused or None
    )

    def stay_fused(_: Optimizer, state: dict[str, Any]) -> None:
        for group in state["param_groups"]:
            group["fused"] = fused or None

    optimizer.register_load_state_dict_pre_hook(stay_fused)
    if fused and settings.optimizer == "sgd":
        # torch's fused kernel leaves the momentum as it found it in memory where the very first step is left out
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def clip_gradients(optimizer: Optimizer, max_norm: float) -> None:
    """Clip the gradient before every step of the optimiser, behind nnU-Net's own clipping."""
    if max_norm >= _NNUNET_CLIP:
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def clip(*_: Any) -> None:
        torch.nn.utils.clip_grad_norm_(parameters, max_norm)

    optimizer.register_step_pre_hook(clip)
