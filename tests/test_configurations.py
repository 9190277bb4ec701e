"""Configurations with names of the user's own: a configuration is judged by what it is, not by its name."""

from __future__ import annotations

import sys

import pytest
from conftest import DATASET_ID, edit_json
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from trainings import make_trainer

from nnunetv2_vf.cli import main
from nnunetv2_vf.doctor import FAIL, examine
from nnunetv2_vf.nnunet_folders import legal_configurations

OWN_CONFIGURATIONS = {
    "bs4": {"inherits_from": "3d_fullres", "batch_size": 4},
    "bs8": {"inherits_from": "bs4", "batch_size": 8},
    "3d_flat": {"inherits_from": "2d"},
    "second_stage": {"inherits_from": "3d_fullres", "previous_stage": "bs4"},
    "after_second_stage": {"inherits_from": "second_stage"},
    "orphan": {"inherits_from": "3d_gone"},
    "circle": {"inherits_from": "circle_too"},
    "circle_too": {"inherits_from": "circle"},
    "fragment": {"batch_size": 2},
}


@pytest.fixture
def own_configurations(copied_dataset):
    plans_file = copied_dataset / "nnUNetPlans.json"
    edit_json(plans_file, lambda plans: plans["configurations"].update(OWN_CONFIGURATIONS))
    return plans_file


def test_3d_configurations_that_need_no_other_stage_are_legal_under_any_name(own_configurations):
    assert legal_configurations(PlansManager(str(own_configurations))) == ["3d_fullres", "bs4", "bs8"]


@pytest.mark.parametrize("name", ["bs4", "bs8"])
def test_every_command_takes_a_configuration_with_a_name_of_the_users_own(
    own_configurations, artifacts, tmp_path, monkeypatch, capsys, name
):
    weights, out = str(artifacts["U-Net"]), tmp_path / "adapted.pth"
    findings = list(examine(str(DATASET_ID), "nnUNetPlans", name, artifacts["U-Net"]))
    assert not [finding for finding in findings if finding.state == FAIL and "nnUNet_results" not in finding.text]
    main(["adapt", weights, "-d", str(DATASET_ID), "-c", name, "-o", str(out)])
    assert f"nnUNetv2_train 7 {name} 0 -p nnUNetPlans -tr VFFinetuneTrainer" in capsys.readouterr().out
    main(["preview", "-d", str(DATASET_ID), "-c", name, "-o", str(tmp_path / "preview.png")])
    for trainer in ("VFPretrainTrainer", "VFFinetuneTrainer"):
        monkeypatch.setattr(sys, "argv", ["nnUNetv2_train", "-pretrained_weights", str(out)])
        assert make_trainer(trainer, configuration=name).configuration_name == name


@pytest.mark.filterwarnings("ignore:Detected old nnU-Net plans")  # how nnU-Net reads a fragment
@pytest.mark.parametrize("name", ["3d_flat", "second_stage", "after_second_stage", "orphan", "circle", "fragment"])
def test_other_configurations_are_refused_in_one_line_that_lists_the_legal_ones(
    own_configurations, artifacts, tmp_path, name
):
    arguments = ["-d", str(DATASET_ID), "-c", name, "-o", str(tmp_path / "out")]
    for command in (["adapt", str(artifacts["U-Net"])], ["preview"]):
        with pytest.raises(SystemExit, match=rf"^nnUNetv2_vf: error: .*'{name}'.*3d_fullres, bs4, bs8$"):
            main([*command, *arguments])
    with pytest.raises(SystemExit, match=rf"^nnUNetv2_vf: error: .*'{name}'.*3d_fullres, bs4, bs8$"):
        make_trainer(configuration=name)
    assert not (tmp_path / "results").exists()


@pytest.mark.filterwarnings("ignore:Detected old nnU-Net plans")
@pytest.mark.parametrize(("name", "reason"), [("orphan", "3d_gone"), ("circle", "Circular"), ("fragment", "KeyError")])
def test_a_configuration_that_cannot_be_read_is_refused_with_the_reason(own_configurations, tmp_path, name, reason):
    for trainer in ("VFPretrainTrainer", "VFFinetuneTrainer"):
        with pytest.raises(
            SystemExit, match=rf"^nnUNetv2_vf: error: configuration '{name}' .*cannot be read.*{reason}"
        ):
            make_trainer(trainer, configuration=name)
    assert not (tmp_path / "results").exists()
