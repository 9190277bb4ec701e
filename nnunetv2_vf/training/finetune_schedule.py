"""The fine-tuning schedule: the learning rate of every part of the network in every epoch.

Parts are encoder, decoder and heads. Heads are always new; encoder and decoder may be pretrained. A schedule depends on
the epoch only, so a resumed training needs only the number of the epoch.

Sources: ``sawtooth`` is a fine-tuning schedule of nnssl (MIC-DKFZ/nnssl; arXiv 2412.17041): first the
new parts learn to read the features, then the whole network warms up. Layer-wise decay: BEiT (arXiv 2106.08254).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from nnunetv2_vf.errors import UserError
from nnunetv2_vf.network_parts import ENCODER_PREFIX, part_of, stages_to_output
from nnunetv2_vf.settings import FinetuneSettings

_POLY_EXPONENT = 0.9  # nnU-Net's


def relative_learning_rate(settings: FinetuneSettings, part: str, epoch: int) -> float:
    """Return the learning rate of a part (``heads``, ``decoder`` or ``encoder``), relative to the highest one.

    The rate rises linearly for ``warmup_fraction`` of all epochs, then it decays. With ``sawtooth`` another phase comes
    first: for ``decoder_fraction`` of all epochs, the rate of decoder and heads rises linearly and that of the encoder
    is 0.
    """
    decoder_only = decoder_only_epochs(settings)
    if part == "encoder" and (settings.schedule == "frozen_encoder" or epoch < decoder_only):
        return 0.0
    if epoch < decoder_only:
        return (epoch + 1) / decoder_only
    warmup = _warmup_epochs(settings)
    epoch -= decoder_only
    if epoch < warmup:
        return (epoch + 1) / (warmup + 1)
    progress = (epoch - warmup) / (settings.num_epochs - decoder_only - warmup)
    if settings.decay == "cosine":
        return (1 + math.cos(math.pi * progress)) / 2
    return (1 - progress) ** _POLY_EXPONENT


def decoder_only_epochs(settings: FinetuneSettings) -> int:
    """Return how many epochs train decoder and heads only."""
    if settings.schedule != "sawtooth":
        return 0
    return min(_to_epochs(settings.decoder_fraction, settings), settings.num_epochs - 1)


def _warmup_epochs(settings: FinetuneSettings) -> int:
    """Return how many epochs warm up; at least one epoch comes after them."""
    remaining = settings.num_epochs - decoder_only_epochs(settings)
    return min(_to_epochs(settings.warmup_fraction, settings), remaining - 1)


def _to_epochs(fraction: float, settings: FinetuneSettings) -> int:
    """Return a fraction of all epochs, rounded up, without float errors: 0.07 of 100 is 7, not 7.000000000000001."""
    return math.ceil(round(fraction * settings.num_epochs, 6))


def parameter_groups(network: nn.Module, settings: FinetuneSettings) -> list[dict[str, Any]]:
    """Return parameter groups for torch's optimisers: one per part, with layer-wise decay one per stage of a part.

    The heads come first, because nnU-Net logs the learning rate of the first group.

    Raises:
        UserError: the settings treat encoder and decoder differently, and the network has no ``encoder``; or its
            decoder has fewer stages than ``fresh_decoder_stages``.
    """
    named = list(network.named_parameters())  # a parameter that encoder and decoder share has the encoder's name
    distances = stages_to_output([name for name, _ in named])
    _check_parts(type(network).__name__, distances, settings)
    groups: dict[tuple[int, str], dict[str, Any]] = {}
    for name, parameter in named:
        if not parameter.requires_grad:  # the network itself froze it
            continue
        part = part_of(name)
        order = distances[name] if settings.layer_decay < 1 else ("heads", "decoder", "encoder").index(part)
        group = groups.setdefault((order, part), {"part": part, "share": settings.layer_decay ** distances[name]})
        group.setdefault("params", []).append(parameter)
    return [groups[key] for key in sorted(groups)]


def _check_parts(network: str, distances: Mapping[str, int], settings: FinetuneSettings) -> None:
    fresh = settings.fresh_decoder_stages
    differs_by_part = settings.schedule != "full" or fresh > 0 or settings.layer_decay < 1
    if differs_by_part and not any(name.startswith(ENCODER_PREFIX) for name in distances):
        raise UserError(
            f"schedule {settings.schedule!r}, fresh_decoder_stages={fresh} and layer_decay={settings.layer_decay:g} "
            f"need a network with an attribute 'encoder', which {network} does not have; legal for it: full, 0 and 1 "
            "(nnUNet_vf_finetune_schedule, nnUNet_vf_finetune_fresh_decoder_stages, nnUNet_vf_finetune_layer_decay)"
        )
    stages = max((distance for name, distance in distances.items() if part_of(name) == "decoder"), default=0)
    if fresh > stages:
        raise UserError(
            f"nnUNet_vf_finetune_fresh_decoder_stages={fresh}, but the decoder has {stages} stages; legal: 0 to "
            f"{stages}"
        )


def reinitialized_parameters(names: Iterable[str], settings: FinetuneSettings) -> set[str]:
    """Return the names of pretrained weights that training replaces with new ones, besides the heads.

    Args:
        names: the keys of a network's state, in which the decoder may list the encoder's weights again.
    """
    own = [name for name in names if name.startswith(ENCODER_PREFIX) or ENCODER_PREFIX not in name]
    distances = stages_to_output(own)
    whole_decoder = settings.schedule == "encoder_only"
    return {
        name
        for name in own
        if part_of(name) == "decoder" and (whole_decoder or distances[name] <= settings.fresh_decoder_stages)
    }


class FinetuneLRScheduler(PolyLRScheduler):
    """Sets the learning rate of every part at the start of an epoch, when nnU-Net calls :meth:`step`.

    Args:
        optimizer: has the groups of :func:`parameter_groups`.
    """

    def __init__(self, optimizer: Optimizer, settings: FinetuneSettings):
        self.settings = settings
        super().__init__(optimizer, settings.initial_lr, settings.num_epochs)

    def step(self, current_step: int | None = None) -> None:
        if current_step is None or current_step == -1:
            current_step = self.ctr
            self.ctr += 1
        for group in self.optimizer.param_groups:
            relative = relative_learning_rate(self.settings, group["part"], current_step)
            group["lr"] = self.initial_lr * group["share"] * relative
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]

    def freeze_parts_without_rate(self, network: nn.Module, with_statistics: bool) -> None:
        """Compute gradients only for parts whose learning rate in this epoch is not 0.

        Call it after ``network.train()``, which lets all batch norms change their statistics, and only after DDP has
        wrapped the network: DDP ignores permanently each parameter that needs no gradient at that moment.

        Args:
            with_statistics: the batch norms of the other parts use their statistics and do not change them.
        """
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                parameter.requires_grad_(group["lr"] > 0)
        frozen = {group["part"] for group in self.optimizer.param_groups if group["lr"] == 0}
        for name, module in network.named_modules():
            if with_statistics and isinstance(module, _BatchNorm) and part_of(name) in frozen:
                module.eval()


def describe_schedule(settings: FinetuneSettings) -> str:
    """Describe the schedule in one line for the log."""
    decoder_only = decoder_only_epochs(settings)
    trained = {
        "full": "the whole network is trained from the first epoch on",
        "sawtooth": f"{_count_epochs(decoder_only)} of decoder and heads only, then the whole network"
        if decoder_only
        else "the whole network is trained from the first epoch on (decoder_fraction is 0)",
        "encoder_only": "the whole network is trained; only the encoder is pretrained",
        "frozen_encoder": "decoder and heads are trained, the encoder does not change",
    }
    warmup = _warmup_epochs(settings)
    rate = f"{_count_epochs(warmup)} of warm-up, then {settings.decay} decay" if warmup else f"{settings.decay} decay"
    fresh = settings.fresh_decoder_stages
    reinitialized = f"; the last {fresh} decoder stages start from new weights (fresh_decoder_stages)" if fresh else ""
    return f"Schedule {settings.schedule}: {trained[settings.schedule]}{reinitialized}; {rate}"


def _count_epochs(number: int) -> str:
    return f"{number} epoch" if number == 1 else f"{number} epochs"
