"""What must hold before a pretraining run may write its first file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from batchgenerators.utilities.file_and_folder_operations import load_json
from nnunetv2.paths import nnUNet_preprocessed, nnUNet_results
from nnunetv2.preprocessing.resampling.default_resampling import compute_new_shape
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.utilities.dataset_name_id_conversion import convert_dataset_name_to_id
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from nnunetv2_vf.errors import UserError
from nnunetv2_vf.nnunet_folders import require_variables
from nnunetv2_vf.settings import VFSettings

_SMALLEST_PATCH = 8  # voxels: the shortest side of a fusion box
_FOLDS = 5
_CASES_LOOKED_AT = 10  # for one that is as the plans make it
# nnU-Net's own, after which the shape of a case follows from its spacing
_PREPROCESSOR = "DefaultPreprocessor"
_RESAMPLING = ("resample_data_or_seg_to_shape", "resample_torch_simple", "resample_torch_fornnunet")


def pretraining_configuration(plans_manager: PlansManager, name: str) -> ConfigurationManager:
    """Return the plan's configuration if Volume Fusion can pretrain it.

    Raises:
        UserError: the plan has no such configuration, or it is 2D, the second stage of a cascade, or has a patch
            shorter than 8 voxels on a side.
    """
    usable = [n for n in plans_manager.available_configurations if n.startswith("3d") and "cascade" not in n]
    advice = f"use one of: {', '.join(usable) or 'none in these plans, which have no 3D configuration'}"
    if name not in plans_manager.available_configurations:
        raise UserError(f"the plans {plans_manager.plans_name} have no configuration {name!r}; {advice}")
    configuration = plans_manager.get_configuration(name)
    patch = tuple(configuration.patch_size)
    if len(patch) != 3:
        raise UserError(f"Volume Fusion needs a 3D configuration; {name!r} has the patch {patch}; {advice}")
    if configuration.previous_stage_name is not None:
        raise UserError(f"configuration {name!r} needs the segmentations of another stage; {advice}")
    if min(patch) < _SMALLEST_PATCH:
        raise UserError(
            f"configuration {name!r} has the patch {patch}; Volume Fusion needs at least {_SMALLEST_PATCH} voxels "
            "on each side; give it a larger patch_size in the plans, or plan with another target spacing: "
            "nnUNetv2_plan_experiment -d ID -overwrite_target_spacing Z Y X"
        )
    return configuration


def patch_warning(configuration: ConfigurationManager) -> str | None:
    """A line for the log if the patch holds the median image whole.

    Then sub-volumes are padded, and two of one case often are nearly the same: docs/label_efficiency.md has how often.
    """
    patch = configuration.patch_size
    median = configuration.configuration.get("median_image_size_in_voxels")  # not in everybody's plans
    if median is None or any(side > patch_side for side, patch_side in zip(median, patch, strict=True)):
        return None
    shape, patches = ("x".join(f"{side:g}" for side in sides) for sides in (median, patch))
    return (
        f"WARNING: the patch ({patches}) holds the median image ({shape}) whole, so that sub-volumes are padded, and "
        "those of one case often alike; pretrain with plans whose patch_size is smaller: the network and its weights "
        "are the same"
    )


def preprocessed_cases(plans_manager: PlansManager, configuration_name: str) -> list[str]:
    """Return the preprocessed cases of a configuration, sorted.

    Raises:
        UserError: there are none, or the first ones are damaged or not of the plans' spacing.
    """
    require_variables(nnUNet_preprocessed)
    configuration = plans_manager.get_configuration(configuration_name)
    folder = Path(nnUNet_preprocessed) / plans_manager.dataset_name / configuration.data_identifier
    command = (
        f"nnUNetv2_preprocess -d {convert_dataset_name_to_id(plans_manager.dataset_name)} "
        f"-plans_name {plans_manager.plans_name} -c {configuration_name}"
    )
    if not folder.is_dir() or not any(folder.iterdir()):
        raise UserError(f"no preprocessed cases in {folder}; make them: {command}")
    wrong = f"{folder} holds files that are no preprocessed cases; empty it and run: {command}"
    try:
        dataset_class = infer_dataset_class(str(folder))
        cases = sorted(dataset_class.get_identifiers(str(folder)))
    except (AssertionError, RuntimeError) as error:
        raise UserError(wrong) from error
    for case in cases[:_CASES_LOOKED_AT]:
        try:
            image, *_, properties = dataset_class(str(folder), [case]).load_case(case)
            found = expected = image.shape[1:]
            if _resamples(configuration):
                expected = _resampled_shape(properties, plans_manager, configuration)
        except Exception:  # damaged: training does without it
            continue
        if found == expected:
            return cases
        wrong = (
            f"{folder} was preprocessed for other plans: case {case} has {found} voxels, of which "
            f"{plans_manager.plans_name} make {expected}; preprocess again: {command}"
        )
    raise UserError(wrong)


def _resamples(configuration: ConfigurationManager) -> bool:
    """Whether a case gets the plans' spacing: nnU-Net also has plans that leave it, and takes others' preprocessors."""
    resampling = configuration.configuration["resampling_fn_data"]
    return configuration.preprocessor_name == _PREPROCESSOR and resampling in _RESAMPLING


def _resampled_shape(
    properties: Mapping[str, Any], plans_manager: PlansManager, configuration: ConfigurationManager
) -> tuple[int, ...]:
    """The shape that nnU-Net's preprocessing resamples a case to."""
    spacing = [properties["spacing"][axis] for axis in plans_manager.transpose_forward]
    target = [*spacing[: len(spacing) - len(configuration.spacing)], *configuration.spacing]  # 2d leaves the slices
    cropped = properties["shape_after_cropping_and_before_resampling"]
    return tuple(map(int, compute_new_shape(cropped, spacing, target)))


def check_pretraining(plans: Mapping[str, Any], configuration_name: str, fold: int | str, settings: VFSettings) -> None:
    """Check everything that pretraining on this fold needs.

    Raises:
        UserError: for the first thing that is missing or not legal.
    """
    require_variables(nnUNet_preprocessed, nnUNet_results)
    plans_manager = PlansManager(dict(plans))
    pretraining_configuration(plans_manager, configuration_name)
    cases = preprocessed_cases(plans_manager, configuration_name)
    splits_file = Path(nnUNet_preprocessed) / plans_manager.dataset_name / "splits_final.json"
    training, validation = _fold_cases(cases, fold, splits_file)

    missing = sorted({*training, *validation} - {*cases})
    if missing:
        raise UserError(
            f"{len(missing)} cases of {splits_file} are not preprocessed, {missing[0]} for one; run "
            f"nnUNetv2_preprocess again or delete {splits_file}"
        )
    needed = 2 if settings.pairing == "different" else 1
    if min(len(training), len(validation)) < needed:
        raise UserError(
            f"fold {fold} has {len(training)} training and {len(validation)} validation cases; pairing "
            f"{settings.pairing!r} needs at least {needed} of each; fold 'all' uses all cases for both"
        )


def _fold_cases(cases: list[str], fold: int | str, splits_file: Path) -> tuple[list[str], list[str]]:
    """The fold's training and validation cases, or as many of each as nnU-Net's split will give."""
    if fold == "all":
        return cases, cases
    splits = load_json(splits_file) if splits_file.is_file() else []
    if int(fold) < len(splits):
        return splits[int(fold)]["train"], splits[int(fold)]["val"]
    if len(cases) < _FOLDS:
        raise UserError(
            f"the dataset has {len(cases)} preprocessed cases; {_FOLDS} folds need at least {_FOLDS}; use fold 'all'"
        )
    held_out = len(cases) // _FOLDS
    return cases[held_out:], cases[:held_out]
