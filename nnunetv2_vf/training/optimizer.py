"""The optimisers of both trainers."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch.optim import SGD, Adam, AdamW, Optimizer

from nnunetv2_vf.settings import TrainingSettings
from nnunetv2_vf.settings.shared import NNUNET_GRADIENT_CLIP


def make_optimizer(parameters: Iterable[Any], settings: TrainingSettings, fused: bool = False) -> Optimizer:
    """Return the optimiser that the settings name; ``sgd`` has nnU-Net's momentum.

    Args:
        parameters: parameters or parameter groups.
        fused: run a step as one kernel, also after loading the state of an optimiser that was not fused.
    """
    classes: Any = {"adam": Adam, "adamw": AdamW, "sgd": functools.partial(SGD, momentum=0.99, nesterov=True)}
    optimizer: Optimizer = classes[settings.optimizer](
        parameters, settings.initial_lr, weight_decay=settings.weight_decay, fused=fused or None
    )

    def keep_fused(_: Optimizer, state: dict[str, Any]) -> None:
        for group in state["param_groups"]:
            group["fused"] = fused or None

    optimizer.register_load_state_dict_pre_hook(keep_fused)
    if fused and settings.optimizer == "sgd":
        # If the very first step is skipped, torch's fused kernel leaves the momentum buffer uninitialised.
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def clip_gradients(optimizer: Optimizer, max_norm: float) -> None:
    """Clip the gradient to ``max_norm`` before every step of the optimiser, after nnU-Net's own clipping to 12."""
    if max_norm >= NNUNET_GRADIENT_CLIP:
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def clip(*_: Any) -> None:
        torch.nn.utils.clip_grad_norm_(parameters, max_norm)

    optimizer.register_step_pre_hook(clip)
