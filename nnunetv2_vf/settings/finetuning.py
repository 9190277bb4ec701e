"""Settings of fine-tuning (VFFinetuneTrainer) with their defaults, and the defaults for particular networks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from nnunetv2_vf.errors import UserError
from nnunetv2_vf.settings.legal_values import setting
from nnunetv2_vf.settings.shared import OPTIMIZER_DESCRIPTION, OPTIMIZERS, TrainingSettings

_ADAMW = {
    "optimizer": "adamw",
    "initial_lr": 1e-3,
    "weight_decay": 1e-2,
    "warmup_fraction": 0.05,
    "gradient_clip": 1.0,
}
# Defaults for networks, by class, that do not train well with nnU-Net's SGD at a learning rate of 0.01.
FINETUNE_RECIPES: Mapping[str, Mapping[str, Any]] = {
    "nnunetv2_vf.pct_net.PCTNet": _ADAMW,
    "nnunetv2_vf.fmunet.FMUNet": _ADAMW,
}

_MAX_WARMUP = 0.9  # largest fraction of the epochs before the learning rate decays
_SAWTOOTH_WARMUP = 0.1  # without a warm-up, the second phase of the sawtooth would start at the full learning rate

_SCHEDULE_DESCRIPTION = (
    "full: train everything; sawtooth: train decoder and heads first, then everything; encoder_only: decoder and heads "
    "start with new weights; frozen_encoder: do not train the encoder"
)
_KERNEL_NORMS_DESCRIPTION = (
    "fresh: scale pretrained kernels before an instance norm (U-Nets) to the norm of new ones, so that they learn as "
    "fast; the output of the network changes by rounding only; pretrained: leave them as they are"
)
_FRESH_STAGES_DESCRIPTION = (
    "number of decoder stages, counted from the output, that start with new weights, as the heads do"
)


@dataclass(frozen=True, kw_only=True)
class FinetuneSettings(TrainingSettings):
    """Settings of supervised training from pretrained weights.

    The defaults are nnU-Net's, except ``kernel_norms``; networks in :data:`FINETUNE_RECIPES` have other defaults.
    """

    prefix: ClassVar[str] = "nnUNet_vf_finetune_"
    section: ClassVar[str] = "volume_fusion_finetune"

    optimizer: str = setting("sgd", OPTIMIZER_DESCRIPTION, choices=OPTIMIZERS)
    initial_lr: float = setting(1e-2, "highest learning rate; it decays during the training", low=1e-12, high=10)
    weight_decay: float = setting(3e-5, "weight decay", low=0, high=1)
    seed: int = setting(
        0,
        "seed of the initial weights, dropout and, without worker processes, nnU-Net's augmentation",
        low=0,
        high=2**32 - 1,
    )
    schedule: str = setting(
        "full", _SCHEDULE_DESCRIPTION, choices=("full", "sawtooth", "encoder_only", "frozen_encoder")
    )
    decoder_fraction: float = setting(
        0.1, "sawtooth: share of the epochs in which only decoder and heads are trained", low=0, high=_MAX_WARMUP
    )
    warmup_fraction: float = setting(
        0.0,
        "share of the epochs in which the learning rate rises linearly, before it decays",
        low=0,
        high=_MAX_WARMUP,
    )
    decay: str = setting("poly", "how the learning rate decays; poly: as in nnU-Net", choices=("poly", "cosine"))
    layer_decay: float = setting(
        1.0, "factor on the learning rate from each stage of the network to the stage before it", low=0.1, high=1
    )
    kernel_norms: str = setting("fresh", _KERNEL_NORMS_DESCRIPTION, choices=("fresh", "pretrained"))
    fresh_decoder_stages: int = setting(0, _FRESH_STAGES_DESCRIPTION, low=0)
    gradient_clip: float = setting(12.0, "largest norm of the gradient; nnU-Net's own limit is 12", low=1e-6, high=12)
    mirroring: str = setting(
        "on",
        "mirror images in training and prediction; off where left and right are different classes",
        choices=("on", "off"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.schedule == "sawtooth" and round(self.decoder_fraction + self.warmup_fraction, 6) > _MAX_WARMUP:
            raise UserError(
                f"{self.prefix}decoder_fraction = {self.decoder_fraction:g} and {self.prefix}warmup_fraction = "
                f"{self.warmup_fraction:g} leave too few epochs for the decay; legal: a sum of at most {_MAX_WARMUP}"
            )

    @property
    def without_effect(self) -> list[str]:
        unused = {
            "decoder_fraction": self.schedule != "sawtooth",
            "fresh_decoder_stages": self.schedule == "encoder_only",  # all stages start with new weights
        }
        return [name for name, is_unused in unused.items() if is_unused]

    @property
    def deciding_settings(self) -> str:
        return f"schedule = {self.schedule}"

    @classmethod
    def _adapt_defaults(cls, defaults: dict[str, Any], chosen: Mapping[str, Any]) -> dict[str, Any]:
        defaults = super()._adapt_defaults(defaults, chosen)
        values = {**defaults, **chosen}
        if values["schedule"] != "sawtooth":
            return defaults
        longest = round(_MAX_WARMUP - values["decoder_fraction"], 6)
        return {**defaults, "warmup_fraction": min(_SAWTOOTH_WARMUP, longest)}
