"""Settings: defaults, plans, environment, validation, and comparison with a checkpoint."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

from nnunetv2_vf.errors import UserError
from nnunetv2_vf.settings import FINETUNE_RECIPES, FinetuneSettings, VFSettings
from nnunetv2_vf.settings.legal_values import format_value

DOCS = Path(__file__).parent.parent / "docs"


def pretraining(**values: str) -> VFSettings:
    """Return the settings of pretraining with these values in the environment."""
    return VFSettings.resolve({}, {f"nnUNet_vf_{name}": value for name, value in values.items()})


def finetuning(**values: str) -> FinetuneSettings:
    """Return the settings of fine-tuning with these values in the environment."""
    return FinetuneSettings.resolve({}, {f"nnUNet_vf_finetune_{name}": value for name, value in values.items()})


# ---------------------------------------------------------------- precedence of the sources


def test_environment_takes_precedence_over_plans_and_plans_over_defaults():
    plans = {"volume_fusion": {"num_epochs": 7, "gamma": [0.9, 1.1], "seed": 3}}
    settings = VFSettings.resolve(plans, {"nnUNet_vf_num_epochs": "9", "nnUNet_vf_box_count": "3,5"})
    assert (settings.num_epochs, settings.gamma, settings.seed) == (9, (0.9, 1.1), 3)
    assert settings.box_count == (3, 5)
    assert settings.pairing == VFSettings().pairing


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"optimizer": "sgd"}, (1e-2, 3e-5)),
        ({"optimizer": "adamw"}, (1e-3, 1e-2)),
        ({"optimizer": "sgd", "initial_lr": "0.1"}, (0.1, 3e-5)),
        ({"optimizer": "adam"}, (1e-3, 1e-5)),
        ({}, (1e-3, 1e-5)),
    ],
)
def test_a_chosen_optimizer_sets_the_default_learning_rate_and_weight_decay(values, expected):
    settings = pretraining(**values)
    assert (settings.initial_lr, settings.weight_decay) == expected


def test_plans_and_environment_take_precedence_over_a_recipe():
    recipe = {"optimizer": "adamw", "initial_lr": 0.5, "gradient_clip": 2.0}
    plans = {"volume_fusion_finetune": {"gradient_clip": 3.0}}
    settings = FinetuneSettings.resolve(plans, {"nnUNet_vf_finetune_warmup_fraction": "0.1"}, recipe)
    assert (settings.optimizer, settings.initial_lr) == ("adamw", 0.5)
    assert (settings.gradient_clip, settings.warmup_fraction) == (3.0, 0.1)


def test_an_optimizer_other_than_the_recipes_has_its_own_learning_rate():
    recipe = {"optimizer": "adamw", "initial_lr": 0.5, "gradient_clip": 2.0}
    settings = FinetuneSettings.resolve({}, {"nnUNet_vf_finetune_optimizer": "adam"}, recipe)
    assert (settings.initial_lr, settings.weight_decay, settings.gradient_clip) == (1e-3, 1e-5, 2.0)


@pytest.mark.parametrize("recipe", FINETUNE_RECIPES.values())
def test_every_recipe_is_legal(recipe):
    assert FinetuneSettings.resolve({}, {}, recipe) == FinetuneSettings(**recipe)


def test_settings_recorded_in_plans_are_read_back_unchanged():
    settings = VFSettings(num_epochs=3, crop_scale=(1, 1), fusion_map="blocks")
    assert VFSettings.resolve({"volume_fusion": settings.as_dict()}, {}) == settings


@pytest.mark.parametrize("spelling", [str, str.upper], ids=["exact", "capitals, as on Windows"])
def test_each_training_reads_its_own_variables_only(spelling):
    environment = {spelling("nnUNet_vf_num_epochs"): "5", spelling("nnUNet_vf_finetune_num_epochs"): "6"}
    assert VFSettings.resolve({}, environment).num_epochs == 5
    assert FinetuneSettings.resolve({}, environment).num_epochs == 6


# ---------------------------------------------------------------- validation


@pytest.mark.parametrize(
    ("name", "value", "legal"),
    [
        ("num_epochs", "0", "at least 1"),
        ("num_epochs", "many", "whole number"),
        ("num_epochs", "1.5", "whole number"),
        ("num_epochs", "", "whole number"),
        ("initial_lr", "nan", "number"),
        ("initial_lr", "-1", "from"),
        ("fusion_map", "circles", "boxes or blocks"),
        ("pairing", "none", "same or different"),
        ("gamma", "1.5,0.7", "low,high"),
        ("gamma", "1", "low,high"),
        ("gamma", "1,2,3", "low,high"),
        ("flip_probability", "1.01", "from 0 to 1"),
        ("coefficient_steps", "0", "from 1 to"),
    ],
)
def test_the_error_for_an_illegal_value_names_variable_value_and_legal_values(name, value, legal):
    with pytest.raises(UserError) as error:
        pretraining(**{name: value})
    message = str(error.value)
    assert f"nnUNet_vf_{name}" in message
    assert repr(value) in message
    assert legal in message


@pytest.mark.parametrize("value", [True, 2.5, None, "x", [1, 2], float("inf")])
def test_an_illegal_value_in_the_plans_is_an_error(value):
    with pytest.raises(UserError, match="num_epochs in the plans"):
        VFSettings.resolve({"volume_fusion": {"num_epochs": value}}, {})


@pytest.mark.parametrize("section", [None, [1], "num_epochs=3"])
def test_a_section_of_the_plans_that_is_not_a_mapping_is_an_error(section):
    with pytest.raises(UserError, match="'volume_fusion' in the plans"):
        VFSettings.resolve({"volume_fusion": section}, {})


def test_the_error_for_an_unknown_name_lists_the_legal_names():
    with pytest.raises(UserError, match=r"'num_epoch' from nnUNet_vf_num_epoch; did you mean num_epochs\?"):
        pretraining(num_epoch="3")
    with pytest.raises(UserError, match=r"'epochs' in the plans.*num_epochs"):
        VFSettings.resolve({"volume_fusion": {"epochs": 3}}, {})


@pytest.mark.parametrize(
    ("settings", "variable", "correct"),
    [
        (VFSettings, "nnUNet_vf_warmup_fraction", "nnUNet_vf_finetune_warmup_fraction"),
        (FinetuneSettings, "nnUNet_vf_finetune_gamma", "nnUNet_vf_gamma"),
    ],
)
def test_the_error_for_a_setting_of_the_other_training_names_the_correct_variable(settings, variable, correct):
    with pytest.raises(UserError, match=f"^{variable} is not a setting of this training; set {correct} instead$"):
        settings.resolve({}, {variable: "0"})


def test_the_constructor_validates_values():
    with pytest.raises(UserError, match="seed"):
        VFSettings(seed=-1)


# ---------------------------------------------------------------- the sawtooth schedule


def test_sawtooth_has_a_warmup_by_default():
    assert finetuning().warmup_fraction == 0
    assert finetuning(schedule="sawtooth").warmup_fraction == 0.1
    assert finetuning(schedule="sawtooth", warmup_fraction="0").warmup_fraction == 0


@pytest.mark.parametrize(("decoder_fraction", "warmup"), [("0.1", 0.1), ("0.85", 0.05), ("0.9", 0.0)])
def test_the_default_warmup_of_sawtooth_leaves_epochs_for_the_decay(decoder_fraction, warmup):
    assert finetuning(schedule="sawtooth", decoder_fraction=decoder_fraction).warmup_fraction == warmup


def test_sawtooth_phases_may_take_exactly_the_largest_legal_fraction():
    assert FinetuneSettings(schedule="sawtooth", decoder_fraction=0.56, warmup_fraction=0.34)


def test_sawtooth_phases_that_leave_no_epochs_for_the_decay_are_an_error():
    fractions = {"decoder_fraction": "0.5", "warmup_fraction": "0.5"}
    with pytest.raises(UserError, match=r"decoder_fraction = 0.5 and .*warmup_fraction = 0.5 leave.*at most 0.9"):
        finetuning(schedule="sawtooth", **fractions)
    assert finetuning(**fractions).warmup_fraction == 0.5  # other schedules do not use decoder_fraction


# ---------------------------------------------------------------- comparison with a checkpoint


def test_equal_settings_are_accepted():
    VFSettings(seed=5).require_same(VFSettings(seed=5).as_dict(), "checkpoint.pth")


def test_settings_that_can_change_on_resume_are_not_compared():
    changed = VFSettings(
        save_every=3, save_every_minutes=1, precision="fp32", fused_optimizer="off", quarantine_limit=1
    )
    changed.require_same(VFSettings().as_dict(), "checkpoint.pth")


def test_a_setting_that_the_checkpoint_lacks_must_have_its_default():
    recorded = VFSettings().as_dict()
    del recorded["gamma"]
    VFSettings().require_same(recorded, "checkpoint.pth")
    with pytest.raises(UserError, match=r"gamma = \[0.9, 1.1\] \(recorded: \[0.7, 1.5\]\)"):
        VFSettings(gamma=(0.9, 1.1)).require_same(recorded, "checkpoint.pth")


def test_the_error_for_changed_settings_names_both_values():
    recorded = {**VFSettings().as_dict(), "removed_setting": 1}
    with pytest.raises(UserError) as error:
        VFSettings(seed=5).require_same(recorded, "checkpoint.pth")
    differences = "removed_setting = None (recorded: 1); seed = 5 (recorded: 0)."
    assert str(error.value).startswith(f"the settings differ from those of checkpoint.pth: {differences}")


def test_the_error_for_changed_settings_shows_how_to_restore_them():
    recorded = VFSettings(gamma=(0.9, 1.1), fusion_map="blocks").as_dict()
    with pytest.raises(UserError) as error:
        VFSettings().require_same(recorded, "checkpoint.pth")
    (variables,) = re.findall(r"Restore them \(export (.*?)\)", str(error.value))
    restored = VFSettings.resolve({}, dict(variable.split("=") for variable in variables.split()))
    assert restored.as_dict() == recorded


# ---------------------------------------------------------------- documentation


@pytest.mark.parametrize("settings", [VFSettings, FinetuneSettings])
def test_the_documentation_lists_every_setting_with_its_default_and_description(settings):
    sections = (DOCS / "reference" / "settings.md").read_text().split("\n## ")
    (section,) = [section for section in sections if f"`{settings.prefix}<setting>`" in section]
    for f in fields(settings):
        (row,) = [
            line for line in section.splitlines() if line.startswith(f"| `{f.name}` | {format_value(f.default)} |")
        ]
        assert f"| {f.metadata['description']}" in row
