"""Preprocessed cases are checked before a training of either trainer writes its first file."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from conftest import DATASET, edit_json
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from trainings import make_trainer

from nnunetv2_vf.errors import UserError
from nnunetv2_vf.training.preflight import preprocessed_cases


def change_configuration(dataset: Path, **changes) -> None:
    plans_file = dataset / "nnUNetPlans.json"
    edit_json(plans_file, lambda plans: plans["configurations"]["3d_fullres"].update(changes))


@pytest.mark.parametrize("name", ["VFFinetuneTrainer", "VFPretrainTrainer"])
def test_a_training_without_preprocessed_cases_writes_nothing(copied_dataset, tmp_path, monkeypatch, name):
    change_configuration(copied_dataset, data_identifier="nowhere")
    with pytest.raises(SystemExit, match=r"no preprocessed cases in .*: nnUNetv2_preprocess -d 7 -plans_name nnUNet"):
        make_trainer(name)
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("name", ["VFFinetuneTrainer", "VFPretrainTrainer"])
def test_cases_that_were_preprocessed_for_other_plans_are_rejected(copied_dataset, tmp_path, monkeypatch, name):
    change_configuration(copied_dataset, spacing=[20.0, 20.0, 20.0])
    with pytest.raises(SystemExit, match=r"preprocessed for other plans: .* preprocess again: nnUNetv2_preprocess"):
        make_trainer(name)
    assert not (tmp_path / "results").exists()


def test_cases_that_cannot_be_read_are_not_called_foreign_files(copied_dataset):
    for file in (copied_dataset / "nnUNetPlans_3d_fullres").iterdir():
        file.write_bytes(b"")
    plans = PlansManager((copied_dataset / "nnUNetPlans.json").as_posix())
    with pytest.raises(
        UserError, match=r"none of the first cases in .* can be read, for example .*; check the disk, or"
    ):
        preprocessed_cases(plans, "3d_fullres")


@pytest.mark.parametrize(
    "changes", [{"resampling_fn_data": "no_resampling_hack"}, {"preprocessor_name": "SomeonesPreprocessor"}]
)
def test_the_shape_of_cases_is_not_checked_if_nnunet_does_not_resample_them(copied_dataset, changes):
    change_configuration(copied_dataset, spacing=[4.0, 4.0, 4.0], **changes)
    plans = PlansManager((copied_dataset / "nnUNetPlans.json").as_posix())
    assert len(preprocessed_cases(plans, "3d_fullres")) == 10


def test_2d_plans_can_be_fine_tuned_without_weights(two_epochs, copied_dataset, monkeypatch):
    plans = PlansManager((copied_dataset / "nnUNetPlans.json").as_posix())
    configuration = plans.get_configuration("2d")
    folder = copied_dataset / configuration.data_identifier
    folder.mkdir()
    raw = two_epochs / "raw" / DATASET
    labels = min((raw / "labelsTr").iterdir())
    case = labels.name.removesuffix(".nii.gz")
    image = raw / "imagesTr" / f"{case}_0000.nii.gz"
    dataset_json = {"channel_names": {"0": "CT"}, "labels": {"background": 0}, "file_ending": ".nii.gz"}
    DefaultPreprocessor(verbose=False).run_case_save(
        str(folder / case), [str(image)], str(labels), plans, configuration, dataset_json
    )
    assert preprocessed_cases(plans, "2d") == [case]
    monkeypatch.setattr(sys, "argv", ["nnUNetv2_train"])
    assert make_trainer("VFFinetuneTrainer", fold="all", configuration="2d").pretrained_weights is None
