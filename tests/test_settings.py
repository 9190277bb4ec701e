from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

from nnunetv2_vf.errors import UserError
from nnunetv2_vf.settings import FinetuneSettings, VFSettings


def test_environment_beats_plans_beats_defaults():
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
def test_another_optimizer_comes_with_its_own_rate_and_decay(values, expected):
    settings = VFSettings.resolve({}, {f"nnUNet_vf_{name}": value for name, value in values.items()})
    assert (settings.initial_lr, settings.weight_decay) == expected


@pytest.mark.parametrize(
    ("kind", "variable", "mended"),
    [
        (VFSettings, "nnUNet_vf_warmup_fraction", "nnUNet_vf_finetune_warmup_fraction"),
        (FinetuneSettings, "nnUNet_vf_finetune_gamma", "nnUNet_vf_gamma"),
    ],
)
def test_a_setting_of_the_other_training_is_named(kind, variable, mended):
    with pytest.raises(UserError, match=f"^{variable} is not a setting of this training; .* {mended}$"):
        kind.resolve({}, {variable: "0"})


def test_a_recipe_is_less_than_plans_and_environment():
    recipe = {"optimizer": "adamw", "initial_lr": 0.5, "gradient_clip": 2.0}
    plans = {"volume_fusion_finetune": {"gradient_clip": 3.0}}
    settings = FinetuneSettings.resolve(plans, {"nnUNet_vf_finetune_warmup_fraction": "0.1"}, recipe)
    assert (settings.optimizer, settings.initial_lr) == ("adamw", 0.5)
    assert (settings.gradient_clip, settings.warmup_fraction) == (3.0, 0.1)
    other = FinetuneSettings.resolve({}, {"nnUNet_vf_finetune_optimizer": "adam"}, recipe)
    assert (other.initial_lr, other.weight_decay, other.gradient_clip) == (1e-3, 1e-5, 2.0)


def test_round_trip_through_plans():
    settings = VFSettings(num_epochs=3, crop_scale=(1, 1), fusion_map="blocks")
    assert VFSettings.resolve({"volume_fusion": settings.as_dict()}, {}) == settings


def test_pretraining_and_finetuning_do_not_read_each_others_variables():
    environment = {"nnUNet_vf_num_epochs": "5", "nnUNet_vf_finetune_num_epochs": "6"}
    assert VFSettings.resolve({}, environment).num_epochs == 5
    assert FinetuneSettings.resolve({}, environment).num_epochs == 6


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
def test_illegal_values_name_the_variable_the_value_and_the_legal_range(name, value, legal):
    with pytest.raises(UserError) as error:
        VFSettings.resolve({}, {f"nnUNet_vf_{name}": value})
    message = str(error.value)
    assert f"nnUNet_vf_{name}" in message
    assert repr(value) in message
    assert legal in message


@pytest.mark.parametrize("value", [True, 2.5, None, "x", [1, 2], float("inf")])
def test_illegal_values_in_plans(value):
    with pytest.raises(UserError, match="num_epochs in the plans"):
        VFSettings.resolve({"volume_fusion": {"num_epochs": value}}, {})


@pytest.mark.parametrize("section", [None, [1], "num_epochs=3"])
def test_a_section_that_is_no_mapping(section):
    with pytest.raises(UserError, match="'volume_fusion' in the plans"):
        VFSettings.resolve({"volume_fusion": section}, {})


def test_names_in_capitals_as_windows_shows_them():
    environment = {"NNUNET_VF_NUM_EPOCHS": "5", "NNUNET_VF_FINETUNE_NUM_EPOCHS": "6"}
    assert VFSettings.resolve({}, environment).num_epochs == 5
    assert FinetuneSettings.resolve({}, environment).num_epochs == 6


def test_unknown_names_are_refused_with_the_legal_ones():
    with pytest.raises(UserError, match=r"'num_epoch' from nnUNet_vf_num_epoch; did you mean num_epochs\?"):
        VFSettings.resolve({}, {"nnUNet_vf_num_epoch": "3"})
    with pytest.raises(UserError, match=r"'epochs' in the plans.*num_epochs"):
        VFSettings.resolve({"volume_fusion": {"epochs": 3}}, {})


def test_the_constructor_validates_too():
    with pytest.raises(UserError, match="seed"):
        VFSettings(seed=-1)


def test_differences_name_the_setting_and_both_values():
    recorded = VFSettings().as_dict()
    assert VFSettings().differences(recorded) == {}
    assert VFSettings(seed=5).differences(recorded) == {"seed": (5, 0)}
    assert VFSettings().differences({**recorded, "gone": 1}) == {"gone": (None, 1)}


def test_a_refusal_of_other_settings_says_how_to_set_them_back():
    recorded = VFSettings(gamma=(0.9, 1.1), fusion_map="blocks").as_dict()
    with pytest.raises(UserError) as refused:
        VFSettings().require_same(recorded, "checkpoint.pth")
    (back,) = re.findall(r"export (.*)\)", str(refused.value))
    assert VFSettings.resolve({}, dict(variable.split("=") for variable in back.split())).as_dict() == recorded


@pytest.mark.parametrize(("alone", "warmup"), [("0.1", 0.1), ("0.85", 0.05), ("0.9", 0.0)])
def test_the_warm_up_of_a_sawtooth_leaves_room_unless_it_is_set(alone, warmup):
    values = {"nnUNet_vf_finetune_schedule": "sawtooth", "nnUNet_vf_finetune_decoder_fraction": alone}
    assert FinetuneSettings.resolve({}, values).warmup_fraction == warmup
    assert FinetuneSettings(schedule="sawtooth", decoder_fraction=0.56, warmup_fraction=0.34)


def test_a_sawtooth_needs_epochs_after_its_teeth():
    values = {"nnUNet_vf_finetune_decoder_fraction": "0.5", "nnUNet_vf_finetune_warmup_fraction": "0.5"}
    with pytest.raises(UserError, match=r"decoder_fraction = 0.5 and .*warmup_fraction = 0.5 leave.*legal: 0.9"):
        FinetuneSettings.resolve({}, {**values, "nnUNet_vf_finetune_schedule": "sawtooth"})
    assert FinetuneSettings.resolve({}, values).warmup_fraction == 0.5  # of the other schedules the first means nothing


def test_sawtooth_comes_with_a_warmup_unless_one_is_set():
    sawtooth = {"nnUNet_vf_finetune_schedule": "sawtooth"}
    assert FinetuneSettings.resolve({}, sawtooth).warmup_fraction == 0.1
    assert FinetuneSettings.resolve({}, {**sawtooth, "nnUNet_vf_finetune_warmup_fraction": "0"}).warmup_fraction == 0
    assert FinetuneSettings.resolve({}, {}).warmup_fraction == 0


@pytest.mark.parametrize("settings", [VFSettings, FinetuneSettings])
def test_the_documentation_lists_every_setting_with_its_default(settings):
    pages = (Path(__file__).parent.parent / "docs" / "reference" / "settings.md").read_text().split("\n## ")
    (page,) = [page for page in pages if f"`{settings.prefix}<setting>`" in page]
    for f in fields(settings):
        default = ",".join(map(str, f.default)) if isinstance(f.default, tuple) else str(f.default)
        assert f"| `{f.name}` | {default} |" in page, f.name
