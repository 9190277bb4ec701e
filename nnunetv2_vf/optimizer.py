"""The optimiser of arXiv 2306.16925, with nnU-Net's decay of the learning rate."""

from __future__ import annotations

from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from torch import nn
from torch.optim import Adam

from nnunetv2_vf.settings import ScheduleSettings


def adam_with_poly_decay(network: nn.Module, settings: ScheduleSettings) -> tuple[Adam, PolyLRScheduler]:
    """Adam over all parameters, and the scheduler that an nnUNetTrainer steps once per epoch."""
    optimizer = Adam(network.parameters(), settings.initial_lr, weight_decay=settings.weight_decay)
    return optimizer, PolyLRScheduler(optimizer, settings.initial_lr, settings.num_epochs)
