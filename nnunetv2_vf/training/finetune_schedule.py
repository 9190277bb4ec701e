"""What fine-tuning trains when, and how fast: the learning rate of every part of the network, epoch by epoch.

A schedule is a function of the epoch alone: nothing of it has to be recorded for a training to be continued. Parts are
encoder, decoder and heads; heads are always new, the others may come from pretraining.

Sources: ``sawtooth`` is the schedule of that name of nnssl's fine-tuning (MIC-DKFZ/nnssl; arXiv 2412.17041): first what
is new learns to read the features, then the whole network is warmed up. Layer-wise decay: BEiT (arXiv 2106.08254).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from torch import nn
from torch.optim import Optimizer

from nnunetv2_vf.errors import UserError
from nnunetv2_vf.network_parts import ENCODER_PREFIX, part_of, stages_to_output
from nnunetv2_vf.settings import FinetuneSettings

_POLY_EXPONENT = 0.9  # nnU-Net's


def rate(settings: FinetuneSettings, part: str, epoch: int) -> float:
    """The learning rate of a part (``heads``, ``decoder`` or ``encoder``) as a share of the highest one.

    ``sawtooth``: linear rise over the first ``decoder_fraction`` of the epochs, without the encoder; then, as with the
    other schedules from the start, a linear rise over ``warmup_fraction`` of all epochs, and decay over those left.
    """
    epochs, alone = settings.num_epochs, decoder_epochs(settings)
    if part == "encoder" and (settings.schedule == "frozen_encoder" or epoch < alone):
        return 0.0
    if epoch < alone:
        return (epoch + 1) / alone
    warmup = _warmup_epochs(settings)
    since = epoch - alone
    if since < warmup:
        return (since + 1) / (warmup + 1)
    done = (since - warmup) / (epochs - alone - warmup)
    return (1 + math.cos(math.pi * done)) / 2 if settings.decay == "cosine" else (1 - done) ** _POLY_EXPONENT


def decoder_epochs(settings: FinetuneSettings) -> int:
    """How many epochs decoder and heads are trained alone."""
    if settings.schedule != "sawtooth":
        return 0
    return min(_epochs(settings.decoder_fraction, settings), settings.num_epochs - 1)


def _warmup_epochs(settings: FinetuneSettings) -> int:
    """At least one epoch is left after it."""
    return min(_epochs(settings.warmup_fraction, settings), settings.num_epochs - decoder_epochs(settings) - 1)


def _epochs(fraction: float, settings: FinetuneSettings) -> int:
    """Rounded up; 0.07 of 100 is 7.000000000000001 to a computer."""
    return math.ceil(round(fraction * settings.num_epochs, 6))


def parameter_groups(network: nn.Module, settings: FinetuneSettings) -> list[dict[str, Any]]:
    """What torch's optimisers take: the parameters of every part, or with layer-wise decay of every stage of one.

    The heads come first: nnU-Net logs the learning rate of the first group.

    Raises:
        UserError: the settings tell encoder and decoder apart, and the network has no ``encoder``; or its decoder has
            fewer stages than are to begin anew.
    """
    named = list(network.named_parameters())  # each once, those that a decoder lists too as the encoder's
    depth = stages_to_output([name for name, _ in named])
    _require_parts(type(network).__name__, depth, settings)
    groups: dict[tuple[int, str], dict[str, Any]] = {}
    for name, parameter in named:
        if not parameter.requires_grad:  # the network's own decision
            continue
        part = part_of(name)
        stages = depth[name] if settings.layer_decay < 1 else ("heads", "decoder", "encoder").index(part)
        group = groups.setdefault((stages, part), {"part": part, "share": settings.layer_decay ** depth[name]})
        group.setdefault("params", []).append(parameter)
    return [groups[key] for key in sorted(groups)]


def _require_parts(network: str, depth: Mapping[str, int], settings: FinetuneSettings) -> None:
    anew = settings.fresh_decoder_stages
    told_apart = settings.schedule != "full" or anew > 0 or settings.layer_decay < 1
    if told_apart and not any(name.startswith(ENCODER_PREFIX) for name in depth):
        raise UserError(
            f"schedule {settings.schedule!r} with fresh_decoder_stages={anew} and layer_decay={settings.layer_decay:g} "
            f"needs a network with an encoder, which {network} does not name so; legal for it: full, 0 and 1 "
            "(nnUNet_vf_finetune_schedule, nnUNet_vf_finetune_fresh_decoder_stages, nnUNet_vf_finetune_layer_decay)"
        )
    stages = max((stage for name, stage in depth.items() if part_of(name) == "decoder"), default=0)
    if anew > stages:
        raise UserError(
            f"nnUNet_vf_finetune_fresh_decoder_stages={anew}, and the decoder has {stages} stages; legal: 0 to {stages}"
        )


def reinitialized_parameters(names: Iterable[str], settings: FinetuneSettings) -> set[str]:
    """Which of a network's weights begin anew although pretrained ones are at hand; the heads do anyway.

    Args:
        names: of its state, in which a decoder may list the encoder too.
    """
    own = [name for name in names if name.startswith(ENCODER_PREFIX) or ENCODER_PREFIX not in name]
    distance = stages_to_output(own)
    whole = settings.schedule == "encoder_only"
    return {
        name
        for name in own
        if part_of(name) == "decoder" and (whole or distance[name] <= settings.fresh_decoder_stages)
    }


class FinetuneLRScheduler(PolyLRScheduler):
    """nnU-Net's, which it steps at the start of an epoch, with a learning rate for every part.

    Args:
        optimizer: over :func:`parameter_groups`.
    """

    def __init__(self, optimizer: Optimizer, settings: FinetuneSettings):
        self.settings = settings
        super().__init__(optimizer, settings.initial_lr, settings.num_epochs)

    def step(self, current_step: int | None = None) -> None:
        if current_step is None or current_step == -1:
            current_step = self.ctr
            self.ctr += 1
        for group in self.optimizer.param_groups:
            group["lr"] = self.initial_lr * group["share"] * rate(self.settings, group["part"], current_step)
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]

    def take_gradients(self) -> None:
        """Of what has a learning rate in this epoch; the others cost nothing then.

        Not before the first epoch: DDP leaves out for good what takes none when it is made.
        """
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                parameter.requires_grad_(group["lr"] > 0)


def _in_epochs(number: int) -> str:
    return f"{number} epoch" if number == 1 else f"{number} epochs"


def describe_schedule(settings: FinetuneSettings) -> str:
    """The schedule as a line for the log."""
    alone = decoder_epochs(settings)
    parts = {
        "full": "all of the network is trained from the first epoch on",
        "sawtooth": f"decoder and heads alone for {_in_epochs(alone)}, then all of the network"
        if alone
        else "all of the network is trained from the first epoch on (decoder_fraction 0)",
        "encoder_only": "all of the network is trained; of pretrained weights only the encoder's are taken",
        "frozen_encoder": "decoder and heads are trained, the encoder stays as it is",
    }
    warmup = _warmup_epochs(settings)
    rise = f"a warm-up over {_in_epochs(warmup)}, then {settings.decay} decay" if warmup else f"{settings.decay} decay"
    anew = settings.fresh_decoder_stages
    last = f"; of a pretrained decoder the last {anew} begin anew (fresh_decoder_stages)" if anew else ""
    return f"Schedule {settings.schedule}: {parts[settings.schedule]}{last}; {rise}"
