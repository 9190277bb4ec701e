"""Optimisers and learning rates in nnU-Net's training loop, which steps the schedule once per epoch."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from nnunetv2_vf.settings import ScheduleSettings

_NNUNET_CLIP = 12.0  # nnU-Net's train_step clips the gradient to this norm, whatever the optimiser


class WarmupPolyLRScheduler(PolyLRScheduler):
    """Linear rise over the first epochs, then nnU-Net's polynomial decay over the others.

    The learning rate is a function of the epoch alone, so that a continued training needs no recorded state.

    Args:
        warmup_epochs: epoch 0 has 1 / (warmup_epochs + 1) of ``initial_lr``, epoch ``warmup_epochs`` all of it.
    """

    def __init__(self, optimizer: Optimizer, initial_lr: float, max_epochs: int, warmup_epochs: int = 0):
        self.warmup_epochs = warmup_epochs
        super().__init__(optimizer, initial_lr, max_epochs - warmup_epochs)

    def step(self, current_step: int | None = None) -> None:
        if current_step is None or current_step == -1:
            current_step = self.ctr
            self.ctr += 1
        super().step(max(0, current_step - self.warmup_epochs))
        rise = min(1.0, (current_step + 1) / (self.warmup_epochs + 1))
        for group in self.optimizer.param_groups:
            group["lr"] *= rise
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]


def make_optimizer(network: nn.Module, settings: ScheduleSettings, fused: bool = False) -> Optimizer:
    """The optimiser that the settings name, over all parameters; ``sgd`` has nnU-Net's momentum.

    Args:
        fused: one kernel for the whole step. A state that is loaded may come from an optimiser that is not.
    """
    kind: Any = {"adam": Adam, "adamw": AdamW, "sgd": functools.partial(SGD, momentum=0.99, nesterov=True)}
    optimizer: Optimizer = kind[settings.optimizer](
        network.parameters(), settings.initial_lr, weight_decay=settings.weight_decay, fused=fused or None
    )

    def stay_fused(_: Optimizer, state: dict[str, Any]) -> None:
        for group in state["param_groups"]:
            group["fused"] = fused or None

    optimizer.register_load_state_dict_pre_hook(stay_fused)
    if fused and settings.optimizer == "sgd":
        # torch's fused kernel leaves the momentum as it found it in memory where the very first step is left out
        for parameter in network.parameters():
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def poly_decay(optimizer: Optimizer, settings: ScheduleSettings, warmup_fraction: float = 0.0) -> PolyLRScheduler:
    """The schedule of the learning rate: a warm-up over that part of the epochs, then polynomial decay."""
    warmup_epochs = min(math.ceil(warmup_fraction * settings.num_epochs), settings.num_epochs - 1)
    return WarmupPolyLRScheduler(optimizer, settings.initial_lr, settings.num_epochs, warmup_epochs)


def clip_gradients(optimizer: Optimizer, max_norm: float) -> None:
    """Clip the gradient before every step of the optimiser, behind nnU-Net's own clipping."""
    if max_norm >= _NNUNET_CLIP:
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def clip(*_: Any) -> None:
        torch.nn.utils.clip_grad_norm_(parameters, max_norm)

    optimizer.register_step_pre_hook(clip)
