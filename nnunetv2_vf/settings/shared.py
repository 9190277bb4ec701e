"""The settings that pretraining and fine-tuning share, and what both do with their settings."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import Field, asdict, dataclass, fields
from typing import Any, ClassVar, TypeVar

from nnunetv2_vf.errors import UserError
from nnunetv2_vf.settings.legal_values import format_value, parse_value, setting
from nnunetv2_vf.settings.sources import read_environment, read_plans

OPTIMIZERS = ("adam", "adamw", "sgd")
OPTIMIZER_DESCRIPTION = (
    "adam: as in the paper; adamw: Adam with decoupled weight decay; sgd: as in nnU-Net, with Nesterov momentum 0.99"
)

# If the user chooses another optimiser than the default one, these values become the defaults.
OPTIMIZER_DEFAULTS: Mapping[str, Mapping[str, float]] = {
    "adam": {"initial_lr": 1e-3, "weight_decay": 1e-5},
    "adamw": {"initial_lr": 1e-3, "weight_decay": 1e-2},
    "sgd": {"initial_lr": 1e-2, "weight_decay": 3e-5},
}

NNUNET_GRADIENT_CLIP = 12.0  # nnU-Net clips every gradient to this norm

_Settings = TypeVar("_Settings", bound="TrainingSettings")


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """Settings that both trainings have.

    The values are validated when an object is made, so every object holds legal values only. Settings without a
    default here get one from the subclass.
    """

    prefix: ClassVar[str]  # first part of the names of the environment variables
    section: ClassVar[str]  # section of the plans that is read, and in which the settings are recorded

    num_epochs: int = setting(1000, "number of epochs", low=1)
    iterations_per_epoch: int = setting(250, "training steps per epoch", low=1)
    val_iterations_per_epoch: int = setting(50, "validation steps per epoch", low=1)
    optimizer: str
    initial_lr: float
    weight_decay: float
    seed: int
    save_every: int = setting(50, "epochs between two checkpoints", low=1, can_change=True)
    save_every_minutes: float = setting(
        30.0,
        "minutes between two checkpoints; one is also written after save_every epochs",
        low=0,
        high=1e6,
        can_change=True,
    )
    loggers: str = setting(
        "none",
        "loggers beside nnU-Net's own; they need nnunetv2-vf[tensorboard] or nnunetv2-vf[mlflow]",
        choices=("none", "tensorboard", "mlflow", "tensorboard+mlflow"),
        can_change=True,
    )

    def __post_init__(self) -> None:
        for f in fields(self):
            object.__setattr__(self, f.name, parse_value(f, getattr(self, f.name), f.name))

    # ------------------------------------------------------------------ combining the sources

    @classmethod
    def resolve(
        cls: type[_Settings],
        plans: Mapping[str, Any],
        environment: Mapping[str, str],
        recipe: Mapping[str, Any] | None = None,
    ) -> _Settings:
        """Combine the defaults, the recipe, the section of the plans and the environment; later ones take precedence.

        Args:
            plans: content of a plans file.
            environment: usually ``os.environ``.
            recipe: defaults for the network in use, by the setting's name.

        Raises:
            UserError: a name or a value is not legal.
        """
        known = {f.name: _with_default(f, recipe or {}) for f in fields(cls)}
        chosen = {
            **read_plans(plans, cls.section, known),
            **read_environment(environment, cls.prefix, known, cls._variables_of_other_trainings()),
        }
        defaults = {name: f.default for name, f in known.items()}
        return cls(**{**cls._adapt_defaults(defaults, chosen), **chosen})

    @classmethod
    def _adapt_defaults(cls, defaults: dict[str, Any], chosen: Mapping[str, Any]) -> dict[str, Any]:
        """Return the defaults that fit the values that the user chose."""
        optimizer = chosen.get("optimizer", defaults["optimizer"])
        if optimizer == defaults["optimizer"]:
            return defaults
        return {**defaults, **OPTIMIZER_DEFAULTS[optimizer]}

    @classmethod
    def _variables_of_other_trainings(cls) -> dict[str, str]:
        """Return the environment variable of each setting that only another training has, by the setting's name."""
        own = {f.name for f in fields(cls)}
        return {
            f.name: f"{training.prefix}{f.name}"
            for training in TrainingSettings.__subclasses__()
            for f in fields(training)
            if f.name not in own
        }

    # ------------------------------------------------------------------ use in a training

    def apply_schedule(self, trainer: Any) -> None:
        """Set the attributes in which an nnUNetTrainer holds its schedule."""
        trainer.num_epochs = self.num_epochs
        trainer.num_iterations_per_epoch = self.iterations_per_epoch
        trainer.num_val_iterations_per_epoch = self.val_iterations_per_epoch
        trainer.initial_lr = self.initial_lr
        trainer.weight_decay = self.weight_decay
        trainer.save_every = self.save_every

    # ------------------------------------------------------------------ recording and comparing

    def as_dict(self) -> dict[str, Any]:
        """Return the settings as plain JSON types, for plans files and checkpoints."""
        return {name: _plain(value) for name, value in asdict(self).items()}

    def require_same(self, recorded: Mapping[str, Any], file: object) -> None:
        """Raise UserError unless the settings equal those of the checkpoint from which the training resumes.

        Settings that can change on resume are not compared. A setting that the checkpoint lacks is newer than it: older
        versions trained as with its default.

        Args:
            recorded: the settings in the checkpoint, as :meth:`as_dict` returns them.
            file: the checkpoint, for the message.
        """
        current = self.as_dict()
        recorded = {**{f.name: _plain(f.default) for f in fields(self)}, **recorded}
        can_change = {f.name for f in fields(self) if f.metadata["can_change"]}
        compared = sorted({*current, *recorded} - can_change)
        changed = [name for name in compared if current.get(name) != recorded.get(name)]
        if not changed:
            return
        differences = [f"{name} = {current.get(name)!r} (recorded: {recorded.get(name)!r})" for name in changed]
        restorable = [name for name in changed if name in current and name in recorded]
        variables = [f"{self.prefix}{name}={format_value(recorded[name])}" for name in restorable]
        remedy = f"Restore them (export {' '.join(variables)}), or start" if variables else "Start"
        raise UserError(
            f"the settings differ from those of {file}: {'; '.join(differences)}. {remedy} a new training without --c, "
            "best in another folder (export nnUNet_results=FOLDER)"
        )

    @property
    def without_effect(self) -> list[str]:
        """Names of the settings that :attr:`deciding_settings` make ineffective."""
        return []

    @property
    def deciding_settings(self) -> str:
        """The settings that decide which others have no effect: ``NAME = VALUE and NAME = VALUE``."""
        return ""

    def without_effect_warning(self) -> str | None:
        """Return a warning if settings without effect were changed."""
        defaults = {f.name: f.default for f in fields(self)}
        changed = [name for name in self.without_effect if getattr(self, name) != defaults[name]]
        if not changed:
            return None
        values = ", ".join(f"{name} = {format_value(getattr(self, name))}" for name in changed)
        return f"WARNING: {values}: without effect with {self.deciding_settings}"

    def __str__(self) -> str:
        """One line for each setting; those without effect share the last one."""
        unused = self.without_effect
        lines = [f"  {name}: {value}" for name, value in self.as_dict().items() if name not in unused]
        return "\n".join([*lines, *([f"  without effect: {', '.join(unused)}"] if unused else [])])


def _with_default(f: Field[Any], recipe: Mapping[str, Any]) -> Field[Any]:
    """Return a field with the default of a recipe, if the recipe has one."""
    changed = copy.copy(f)
    changed.default = recipe.get(f.name, f.default)
    return changed


def _plain(value: Any) -> Any:
    """Return a value as a JSON type: a list for a tuple."""
    return list(value) if isinstance(value, tuple) else value
