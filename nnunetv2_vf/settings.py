"""Settings: frozen, validated once, printed, recorded in every checkpoint.

Precedence: defaults < the network's recipe (fine-tuning: :data:`FINETUNE_RECIPES`) < plans (section ``volume_fusion``
for pretraining, ``volume_fusion_finetune`` for fine-tuning) < environment (``nnUNet_vf_<field>``,
``nnUNet_vf_finetune_<field>``). A range is written ``low,high``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import Field, asdict, dataclass, field, fields
from difflib import get_close_matches
from typing import Any, ClassVar, TypeVar

from nnunetv2_vf.errors import UserError

# Learning rate and weight decay that an optimiser gets where it replaces the default one.
_OWN_DEFAULTS = {
    "adam": {"initial_lr": 1e-3, "weight_decay": 1e-5},
    "adamw": {"initial_lr": 1e-3, "weight_decay": 1e-2},
    "sgd": {"initial_lr": 1e-2, "weight_decay": 3e-5},
}
_LARGEST_RISE = 0.9  # part of the epochs in which the learning rate rises
_SAWTOOTH_WARMUP = 0.1  # without a warm-up the second tooth has no edge
_S = TypeVar("_S", bound="ScheduleSettings")
_FINETUNE_PREFIX = "nnUNet_vf_finetune_"
_OPTIMIZERS = ("adam", "adamw", "sgd")
_ABOUT_PRECISION = "of products and convolutions; auto: bf16 on GPUs that have it, fp16 on others, fp32 on CPUs"
_ABOUT_SCHEDULES = (
    "full: all is trained; sawtooth: first decoder and heads alone; encoder_only: decoder and heads begin anew; "
    "frozen_encoder: the encoder stays as it is"
)
_ABOUT_KERNEL_NORMS = (
    "of pretrained kernels of U-Nets before an instance norm; fresh: as if they were new, so that they learn as fast; "
    "what the network computes is the same but for rounding"
)
_ABOUT_FRESH_STAGES = (
    "last stages of the decoder, counted from the output, that begin anew with the heads, whatever was pretrained"
)
_ABOUT_OPTIMIZERS = "adam: the paper's; adamw: its weight decay apart; sgd: nnU-Net's, Nesterov momentum 0.99"


def _setting(
    default: Any,
    about: str,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    choices: tuple[str, ...] = (),
    free: bool = False,  # may be another one when a training is continued
) -> Any:
    metadata = {"about": about, "low": low, "high": high, "choices": choices, "free": free}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class ScheduleSettings:
    """The settings that pretraining and fine-tuning share; their names and defaults are nnU-Net's."""

    prefix: ClassVar[str] = ""  # of the environment variables
    section: ClassVar[str] = ""  # of the plans, where the settings are looked for and recorded

    num_epochs: int = _setting(1000, "epochs", low=1)
    iterations_per_epoch: int = _setting(250, "training steps per epoch", low=1)
    val_iterations_per_epoch: int = _setting(50, "validation steps per epoch", low=1)
    optimizer: str = _setting("sgd", _ABOUT_OPTIMIZERS, choices=_OPTIMIZERS)
    initial_lr: float = _setting(1e-2, "highest learning rate, before it decays", low=1e-12, high=10)
    weight_decay: float = _setting(3e-5, "weight decay", low=0, high=1)
    seed: int = _setting(0, "seed of first weights, dropout and, without workers, of nnU-Net's augmentation", low=0)
    save_every: int = _setting(50, "epochs between two checkpoint_latest.pth", low=1, free=True)
    save_every_minutes: float = _setting(
        30.0, "minutes between two checkpoints, whichever comes first", low=0, high=1e6, free=True
    )

    def __post_init__(self) -> None:
        for f in fields(self):
            object.__setattr__(self, f.name, _legal_value(f, getattr(self, f.name), f.name))

    @classmethod
    def resolve(
        cls: type[_S], plans: Mapping[str, Any], environment: Mapping[str, str], recipe: Mapping[str, Any] | None = None
    ) -> _S:
        """Combine the defaults, the plans' :attr:`section` (ranges as lists of two numbers) and the environment.

        Args:
            plans: the content of a plans file.
            environment: usually ``os.environ``; only names that start with :attr:`prefix` are looked at.
            recipe: what replaces the defaults for a network.

        Raises:
            UserError: a name or a value is not legal.
        """
        known = {f.name: f for f in fields(cls)}
        values: dict[str, Any] = {}
        section = plans.get(cls.section, {})
        if not isinstance(section, Mapping):
            raise UserError(f'{cls.section!r} in the plans is {section!r}; legal: settings as {{"name": value}}')
        for name, value in section.items():
            values[name] = _legal_value(_known_field(known, name, "in the plans"), value, f"{name} in the plans")
        for variable, text in environment.items():
            name = cls._field_name(variable)
            if name is not None:
                cls._refuse_other_prefix(name, variable)
                values[name] = _legal_value(_known_field(known, name, "from " + variable), text, variable)
        defaults = {f.name: f.default for f in fields(cls)} | dict(recipe or {})
        if values.get("optimizer", defaults["optimizer"]) != defaults["optimizer"]:
            defaults |= _OWN_DEFAULTS[values["optimizer"]]
        if values.get("schedule", defaults.get("schedule")) == "sawtooth":
            alone = values.get("decoder_fraction", defaults["decoder_fraction"])
            defaults |= {"warmup_fraction": min(_SAWTOOTH_WARMUP, round(_LARGEST_RISE - alone, 6))}
        return cls(**{**defaults, **values})

    @classmethod
    def _refuse_other_prefix(cls, name: str, variable: str) -> None:
        other = FinetuneSettings if cls is VFSettings else VFSettings
        if name in {f.name for f in fields(other)} - {f.name for f in fields(cls)}:
            raise UserError(f"{variable} is not a setting of this training; legal there: {other.prefix}{name}")

    @classmethod
    def _field_name(cls, variable: str) -> str | None:
        lowered = variable.lower()  # Windows shows every name in capitals
        if not lowered.startswith(cls.prefix.lower()):
            return None
        if cls.prefix != _FINETUNE_PREFIX and lowered.startswith(_FINETUNE_PREFIX.lower()):
            return None
        return lowered[len(cls.prefix) :]

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON types, for plans files and checkpoints."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}

    def apply_schedule(self, trainer: Any) -> None:
        """Set the attributes of an nnUNetTrainer that hold its schedule."""
        trainer.num_epochs = self.num_epochs
        trainer.num_iterations_per_epoch = self.iterations_per_epoch
        trainer.num_val_iterations_per_epoch = self.val_iterations_per_epoch
        trainer.initial_lr = self.initial_lr
        trainer.weight_decay = self.weight_decay
        trainer.save_every = self.save_every

    def differences(self, recorded: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
        """Every setting whose value is not the recorded one: (this one, the recorded one); the free ones may differ."""
        current = self.as_dict()
        free = {f.name for f in fields(self) if f.metadata["free"]}
        return {
            name: (current.get(name), recorded.get(name))
            for name in sorted({*current, *recorded} - free)
            if current.get(name) != recorded.get(name)
        }

    def require_same(self, recorded: Mapping[str, Any], file: object) -> None:
        """Raise UserError unless the settings are those of a checkpoint that training is to go on from."""
        different = self.differences(recorded)
        if different:
            told = "; ".join(f"{name} = {mine!r} (recorded: {theirs!r})" for name, (mine, theirs) in different.items())
            known = [f.name for f in fields(self) if f.name in different and f.name in recorded]
            back = " ".join(f"{self.prefix}{name}={_as_text(different[name][1])}" for name in known)
            raise UserError(
                f"the settings differ from those of {file}: {told}. Set them back (export {back}), or train anew "
                "without --c"
            )

    def __str__(self) -> str:
        return "\n".join(f"  {name}: {value}" for name, value in self.as_dict().items())


@dataclass(frozen=True)
class VFSettings(ScheduleSettings):
    """Pretraining with Volume Fusion. Defaults: pretext task and optimiser of arXiv 2306.16925, nnU-Net's schedule."""

    prefix: ClassVar[str] = "nnUNet_vf_"
    section: ClassVar[str] = "volume_fusion"

    optimizer: str = _setting("adam", _ABOUT_OPTIMIZERS, choices=_OPTIMIZERS)
    initial_lr: float = _setting(1e-3, "highest learning rate, before it decays", low=1e-12, high=10)
    weight_decay: float = _setting(1e-5, "weight decay", low=0, high=1)
    precision: str = _setting("auto", _ABOUT_PRECISION, choices=("auto", "bf16", "fp16", "tf32", "fp32"), free=True)
    fused_optimizer: str = _setting(
        "on", "a step of the optimiser is one kernel, and waits for nothing", choices=("on", "off"), free=True
    )
    seed: int = _setting(
        0, "seed of first weights, training samples and dropout; the validation samples are always the same", low=0
    )
    batch_per_gpu: int = _setting(
        0,
        "samples of a batch on each rank, whatever the plans say; 0: the plans' batch, split among the ranks",
        low=0,
        high=4096,
    )
    quarantine_limit: float = _setting(
        0.05, "part of the cases that may turn out unusable before the training stops", low=0, high=1, free=True
    )
    coefficient_steps: int = _setting(4, "K: the coefficients are 0, 1/K, ..., 1, one class each", low=1, high=100)
    fusion_map: str = _setting("boxes", "how the coefficients are laid out", choices=("boxes", "blocks"))
    pairing: str = _setting("same", "both sub-volumes from one case, or from two", choices=("same", "different"))

    box_count: tuple[int, int] = _setting((10, 40), "boxes: how many", low=1, high=1000)
    box_min_side: int = _setting(8, "boxes: shortest side in voxels", low=1)
    box_max_fraction: float = _setting(0.625, "boxes: longest side, as a fraction of the patch", low=0.01, high=1)
    block_side: tuple[int, int] = _setting((8, 32), "blocks: side in voxels", low=1)
    block_foreground: float = _setting(0.7, "blocks: fraction with a non-zero class", low=0, high=1)

    crop_scale: tuple[float, float] = _setting(
        (0.7, 1.5), "size of a crop relative to the patch, per axis", low=0.1, high=10
    )
    flip_probability: float = _setting(0.5, "probability of a flip, per axis", low=0, high=1)
    contrast_probability: float = _setting(1.0, "probability of the percentile contrast", low=0, high=1)
    contrast_lower: tuple[float, float] = _setting((0.1, 2.0), "lower percentile", low=0, high=50)
    contrast_upper: tuple[float, float] = _setting((98.0, 99.9), "upper percentile", low=50, high=100)
    gamma: tuple[float, float] = _setting((0.7, 1.5), "exponent of the gamma correction", low=0.1, high=10)
    invert_probability: float = _setting(0.25, "probability that both sub-volumes are inverted", low=0, high=1)


@dataclass(frozen=True)
class FinetuneSettings(ScheduleSettings):
    """Fine-tuning; nnU-Net's defaults but for ``kernel_norms``, and :data:`FINETUNE_RECIPES` for other than U-Nets."""

    prefix: ClassVar[str] = _FINETUNE_PREFIX
    section: ClassVar[str] = "volume_fusion_finetune"

    schedule: str = _setting("full", _ABOUT_SCHEDULES, choices=("full", "sawtooth", "encoder_only", "frozen_encoder"))
    decoder_fraction: float = _setting(
        0.1, "sawtooth: part of the epochs in which decoder and heads are trained alone", low=0, high=_LARGEST_RISE
    )
    warmup_fraction: float = _setting(
        0.0, "part of the epochs in which the learning rate rises linearly, before it decays", low=0, high=_LARGEST_RISE
    )
    decay: str = _setting("poly", "how the learning rate decays; poly: nnU-Net's", choices=("poly", "cosine"))
    layer_decay: float = _setting(
        1.0, "factor of the learning rate from one stage of the network to the one before it", low=0.1, high=1
    )
    kernel_norms: str = _setting("fresh", _ABOUT_KERNEL_NORMS, choices=("fresh", "pretrained"))
    fresh_decoder_stages: int = _setting(0, _ABOUT_FRESH_STAGES, low=0)
    gradient_clip: float = _setting(12.0, "largest norm of the gradient; nnU-Net's own limit is 12", low=1e-6, high=12)
    mirroring: str = _setting(
        "on", "mirror images in training and prediction; off where left and right differ", choices=("on", "off")
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.schedule == "sawtooth" and round(self.decoder_fraction + self.warmup_fraction, 6) > _LARGEST_RISE:
            raise UserError(
                f"{self.prefix}decoder_fraction = {self.decoder_fraction:g} and {self.prefix}warmup_fraction = "
                f"{self.warmup_fraction:g} leave no epochs for what comes after them; legal: {_LARGEST_RISE} together"
            )


# By network class, where nnU-Net's Nesterov SGD at 1e-2 is not what the network is trained with.
FINETUNE_RECIPES: Mapping[str, Mapping[str, Any]] = {
    "nnunetv2_vf.pct_net.PCTNet": {
        "optimizer": "adamw",
        "initial_lr": 1e-3,
        "weight_decay": 1e-2,
        "warmup_fraction": 0.05,
        "gradient_clip": 1.0,
    },
}


def _known_field(known: Mapping[str, Field[Any]], name: str, where: str) -> Field[Any]:
    if name not in known:
        near = get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(f"unknown setting {name!r} {where}; {hint}legal are: {', '.join(known)}")
    return known[name]


def _legal_value(f: Field[Any], value: Any, where: str) -> Any:
    """Return ``value`` in the type of the field's default, or say what would have been legal."""
    try:
        return _parse(f, value)
    except (TypeError, ValueError, OverflowError):
        default = ",".join(map(str, f.default)) if isinstance(f.default, tuple) else f.default
        raise UserError(
            f"setting {where} = {value!r} is not legal; legal: {_describe(f)} (default {default})"
        ) from None


def _parse(f: Field[Any], value: Any) -> Any:
    if f.metadata["choices"]:
        if value not in f.metadata["choices"]:
            raise ValueError
        return value
    if not isinstance(f.default, tuple):
        return _number(f, value, type(f.default))
    low, high = value.split(",") if isinstance(value, str) else value
    kind = type(f.default[0])
    pair = (_number(f, low, kind), _number(f, high, kind))
    if pair[0] > pair[1]:
        raise ValueError
    return pair


def _number(f: Field[Any], value: Any, kind: type) -> float | int:
    number = kind(value)
    if isinstance(value, bool) or (kind is int and not isinstance(value, str) and number != value):
        raise ValueError
    if not math.isfinite(number) or not f.metadata["low"] <= number <= f.metadata["high"]:
        raise ValueError
    return number


def _as_text(value: Any) -> str:
    """As it is written in the environment."""
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _describe(f: Field[Any]) -> str:
    if f.metadata["choices"]:
        return " or ".join(f.metadata["choices"])
    default: Any = f.default
    is_range = isinstance(default, tuple)
    kind = type(default[0] if is_range else default)
    noun = "whole number" if kind is int else "number"
    low, high = f.metadata["low"], f.metadata["high"]
    bounds = f"of at least {low}" if math.isinf(high) else f"from {low} to {high}"
    return f"two {noun}s low,high {bounds}" if is_range else f"a {noun} {bounds}"
