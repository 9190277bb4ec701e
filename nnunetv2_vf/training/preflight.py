"""Checks before a training writes its first file: plans, preprocessed cases and, for pretraining, the fold."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from nnunetv2.paths import nnUNet_preprocessed, nnUNet_results
from nnunetv2.preprocessing.resampling.default_resampling import compute_new_shape
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.utilities.crossval_split import generate_crossval_split
from nnunetv2.utilities.dataset_name_id_conversion import convert_dataset_name_to_id
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from nnunetv2_vf.errors import UserError
from nnunetv2_vf.nnunet_folders import (
    FOLDS,
    describe_left_out_cases,
    legal_configurations,
    read_splits,
    require_configuration,
    require_variables,
    splits_file,
)
from nnunetv2_vf.settings import VFSettings
from nnunetv2_vf.settings.legal_values import format_value

_MIN_PATCH_SIDE = 8  # voxels: the shortest side of a fusion box
_MAX_COMPARED_CASES = 10  # tried until one can be read and has the shape that follows from the plans
# nnU-Net's own classes and functions that give a case the plans' spacing, so that its shape can be predicted.
_PREPROCESSOR = "DefaultPreprocessor"
_RESAMPLING = ("resample_data_or_seg_to_shape", "resample_torch_simple", "resample_torch_fornnunet")
_MIN_BLOCKS = 8  # of a patch, if the pretext hides some
_FEW_BLOCKS = 27  # fewer get a warning


def check_pretraining(
    plans: Mapping[str, Any], configuration_name: str, fold: int | str, settings: VFSettings
) -> list[str]:
    """Check everything that pretraining on this fold needs.

    Returns:
        warnings for the log of the training.

    Raises:
        UserError: the first thing that is missing or not legal.
    """
    require_variables(nnUNet_preprocessed, nnUNet_results)
    plans_manager = PlansManager(dict(plans))
    configuration = pretraining_configuration(plans_manager, configuration_name)
    cases = preprocessed_cases(plans_manager, configuration_name)
    training, validation = check_fold(plans_manager, cases, fold)
    if min(len(training), len(validation)) < settings.cases_per_sample:
        raise UserError(
            f"fold {fold} has {len(training)} training and {len(validation)} validation cases; pairing "
            f"{settings.pairing!r} needs at least {settings.cases_per_sample} of each; fold 'all' uses all cases for "
            "both"
        )
    left_out = _left_out_warning(plans_manager, cases, fold)
    return [*check_patch(configuration, settings), *([left_out] if left_out else [])]


def check_plans_name(plans: Mapping[str, Any], configuration_name: str) -> None:
    """Check that the plans are not those of a copy that still states the name of the original.

    nnU-Net reads the file that ``-p`` names, and writes into the results of the name that the plans state. So a copy
    would replace trainings of the original. A training that continues replaces none.

    Raises:
        UserError: the file of that name has another configuration, and a copy has this one.
    """
    require_variables(nnUNet_preprocessed)
    name, folder = plans["plans_name"], Path(nnUNet_preprocessed) / plans["dataset_name"]
    own, original = _find_configuration(plans, name, configuration_name), folder / f"{name}.json"
    is_continued = plans.get("continue_training", False)  # nnU-Net's entry
    if is_continued or own is None or _read_configuration(original, name, configuration_name) in (None, own):
        return
    for copy in sorted(folder.glob("*.json")):
        if _read_configuration(copy, name, configuration_name) == own:
            raise UserError(
                f"{copy} states the plans_name {name!r}, so nnU-Net would write into the results of {original}, which "
                f'has another configuration {configuration_name}; write into the copy: "plans_name": "{copy.stem}"'
            )


def _read_configuration(file: Path, plans_name: str, configuration_name: str) -> dict[str, Any] | None:
    """Return a configuration of a file that states this name of plans; None if there is none."""
    try:
        return _find_configuration(json.loads(file.read_text()), plans_name, configuration_name)
    except (OSError, ValueError):  # no JSON
        return None


def _find_configuration(content: Any, plans_name: str, configuration_name: str) -> dict[str, Any] | None:
    """Return a configuration, with what it inherits, of plans that state this name; None if there is none."""
    try:
        if content["plans_name"] != plans_name:
            return None
        configuration: dict[str, Any] = PlansManager(dict(content)).get_configuration(configuration_name).configuration
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError):  # other checks report this
        return None
    return configuration


def check_patch(configuration: ConfigurationManager, settings: VFSettings) -> list[str]:
    """Check that the settings suit the patch.

    Returns:
        warnings: of the patch, of the size of hidden blocks, of settings without effect.

    Raises:
        UserError: the patch has so few blocks that a share of them cannot be hidden, or a box or block of the fusion
            map always covers the whole patch.
    """
    _require_classes_in_patch(configuration, settings)
    checks = (
        patch_warning(configuration, settings),
        blocks_warning(configuration, settings),
        settings.without_effect_warning(),
    )
    return [warning for warning in checks if warning is not None]


def _require_classes_in_patch(configuration: ConfigurationManager, settings: VFSettings) -> None:
    """Raise UserError if the smallest box or block of the fusion map covers the patch: a map then has one class."""
    if not settings.has_fusion:
        return
    longest = max(configuration.patch_size)
    name, smallest = "box_min_side", settings.box_min_side
    if settings.fusion_map == "blocks":
        name, smallest = "block_side", settings.block_side[0]
    if smallest >= longest:
        value = format_value(getattr(settings, name))
        half = max(1, longest // 2)
        legal = half if name == "box_min_side" else f"{max(1, half // 2)},{half}"
        raise UserError(
            f"setting {name} = {value} is not legal for the patch {list(configuration.patch_size)}: each sample would "
            f"have one class only; legal: sides below {longest} (export {settings.prefix}{name}={legal})"
        )


def blocks_warning(configuration: ConfigurationManager, settings: VFSettings) -> str | None:
    """Return a warning if the pretext hides blocks, and the patch has few of them.

    Raises:
        UserError: it has so few that a share of them cannot be hidden.
    """
    side, patch = settings.mask_side, [int(side) for side in configuration.patch_size]
    blocks = _count_blocks(patch, side)
    if not settings.has_mask or blocks >= _FEW_BLOCKS:
        return None
    if blocks < _MIN_BLOCKS:
        raise UserError(
            f"setting mask_side = {side} is not legal for the patch {patch}: number of its blocks: {blocks}; legal: at "
            f"least {_MIN_BLOCKS} (export {settings.prefix}mask_side={max(1, min(patch) // 2)})"
        )
    smaller = side // 2
    while _count_blocks(patch, smaller) < _FEW_BLOCKS:
        smaller //= 2
    return (
        f"WARNING: with mask_side = {side}, the patch {patch} has only {blocks} blocks, which are hidden or visible as "
        f"a whole. Smaller blocks give more different samples: export {settings.prefix}mask_side={smaller}"
    )


def _count_blocks(patch: list[int], side: int) -> int:
    """Return the number of blocks of a patch; those that its border cuts off count too."""
    return math.prod(-(-length // side) for length in patch)


def check_fold(plans_manager: PlansManager, cases: list[str], fold: int | str) -> tuple[list[str], list[str]]:
    """Return the training and validation cases of a fold.

    For a fold that the split does not have, nnU-Net draws four fifths of the cases for training. Then the lists have
    the right lengths, but not all the right cases.

    Raises:
        UserError: the split cannot be read, a case of it is not preprocessed, or there are too few cases for a split.
    """
    training, validation = _cases_of_fold(plans_manager, cases, fold)
    missing = sorted({*training, *validation} - {*cases})
    if missing:
        file = splits_file(plans_manager.dataset_name)
        raise UserError(
            f"{len(missing)} cases of {file} are not preprocessed, for example {missing[0]}; run "
            f"nnUNetv2_preprocess again or delete {file}"
        )
    return training, validation


def require_gpu(device: torch.device) -> None:
    """Raise UserError if the device is a GPU (cuda, mps) and torch finds none."""
    is_there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not is_there.get(device.type, True):
        raise UserError("torch finds no GPU; train on the CPU with -device cpu, or find out why: nnUNetv2_vf doctor")


def pretraining_configuration(plans_manager: PlansManager, name: str) -> ConfigurationManager:
    """Return a configuration of the plans if it can be pretrained.

    Raises:
        UserError: the plans have no such configuration, or it cannot be read, is 2D, the second stage of a cascade, or
            has a patch shorter than 8 voxels on a side.
    """
    usable = legal_configurations(plans_manager)
    hint = f"use one of: {', '.join(usable) or 'none, these plans have no 3D configuration'}"
    configuration = require_configuration(plans_manager, name, usable)
    patch = tuple(configuration.patch_size)
    if len(patch) != 3:
        raise UserError(f"pretraining needs a 3D configuration; {name!r} has the patch {patch}; {hint}")
    if configuration.previous_stage_name is not None:
        raise UserError(f"configuration {name!r} needs the segmentations of another stage; {hint}")
    if min(patch) < _MIN_PATCH_SIDE:
        raise UserError(
            f"configuration {name!r} has the patch {patch}; pretraining needs at least {_MIN_PATCH_SIDE} voxels "
            "on each side; set a larger patch_size in the plans, or plan with another target spacing: "
            "nnUNetv2_plan_experiment -d ID -overwrite_target_spacing Z Y X"
        )
    return configuration


def patch_warning(configuration: ConfigurationManager, settings: VFSettings) -> str | None:
    """Return a warning if the patch is as large as the median image.

    Then sub-volumes are padded, and two sub-volumes of one case, as Volume Fusion uses, are often nearly the same.
    docs/explanation/trials.md says how often.
    """
    patch = configuration.patch_size
    median = configuration.configuration.get("median_image_size_in_voxels")  # not all plans have it
    if median is None or any(side > patch_side for side, patch_side in zip(median, patch, strict=True)):
        return None
    median_text, patch_text = ("x".join(f"{side:g}" for side in sides) for sides in (median, patch))
    fuses_one_case = settings.subvolumes_per_sample > settings.cases_per_sample
    alike = ", and two of one case are often nearly the same" if fuses_one_case else ""
    return (
        f"WARNING: the patch ({patch_text}) is as large as the median image ({median_text}): sub-volumes are "
        f"padded{alike}. Pretrain with a smaller patch_size in a copy of the plans, which needs a plans_name of its "
        "own; the weights fit both plans"
    )


def preprocessed_folder(plans_manager: PlansManager, configuration: ConfigurationManager) -> Path:
    """Return the folder with the preprocessed cases of a configuration."""
    return Path(nnUNet_preprocessed) / plans_manager.dataset_name / configuration.data_identifier


def preprocessed_cases(plans_manager: PlansManager, configuration_name: str) -> list[str]:
    """Return the names of the preprocessed cases of a configuration, sorted.

    Raises:
        UserError: there are none, none of the first 10 can be read, or those that can be read have other shapes than
            the plans give them.
    """
    require_variables(nnUNet_preprocessed)
    configuration = plans_manager.get_configuration(configuration_name)
    folder = preprocessed_folder(plans_manager, configuration)
    command = (
        f"nnUNetv2_preprocess -d {convert_dataset_name_to_id(plans_manager.dataset_name)} "
        f"-plans_name {plans_manager.plans_name} -c {configuration_name}"
    )
    if not folder.is_dir() or not any(folder.iterdir()):
        raise UserError(f"no preprocessed cases in {folder}; preprocess them: {command}")
    no_cases = (
        f"{folder} holds files that are not preprocessed cases, or links to files that are not there; delete them and "
        f"run: {command}"
    )
    try:
        dataset_class = infer_dataset_class(str(folder))
        cases = sorted(dataset_class.get_identifiers(str(folder)))
    except (AssertionError, RuntimeError) as error:
        raise UserError(no_cases) from error
    problem = None
    for case in cases[:_MAX_COMPARED_CASES]:
        try:
            image, *_, properties = dataset_class(str(folder), [case]).load_case(case)
            shape = expected = image.shape[1:]
            if _uses_nnunets_resampling(configuration):
                expected = _resampled_shape(properties, plans_manager, configuration)
        except Exception as error:  # a damaged case, which pretraining puts into quarantine; or a failing disk
            problem = problem or (
                f"none of the first cases in {folder} can be read, for example {case} ({error!r}); check the disk, or "
                f"preprocess again: {command}"
            )
            continue
        if shape == expected:
            return cases
        problem = (
            f"{folder} was preprocessed for other plans: case {case} has {shape} voxels, with "
            f"{plans_manager.plans_name} it would have {expected}; preprocess again: {command}"
        )
    raise UserError(problem or no_cases)


def _uses_nnunets_resampling(configuration: ConfigurationManager) -> bool:
    """True if the shape of a preprocessed case follows from the plans: other preprocessors may keep its spacing."""
    resampling = configuration.configuration["resampling_fn_data"]
    return configuration.preprocessor_name == _PREPROCESSOR and resampling in _RESAMPLING


def _resampled_shape(
    properties: Mapping[str, Any], plans_manager: PlansManager, configuration: ConfigurationManager
) -> tuple[int, ...]:
    """Return the shape that nnU-Net's preprocessing gives a case."""
    spacing = [properties["spacing"][axis] for axis in plans_manager.transpose_forward]
    # A 2D configuration does not resample across slices.
    target = [*spacing[: len(spacing) - len(configuration.spacing)], *configuration.spacing]
    cropped = properties["shape_after_cropping_and_before_resampling"]
    return tuple(map(int, compute_new_shape(cropped, spacing, target)))


def _left_out_warning(plans_manager: PlansManager, cases: list[str], fold: int | str) -> str | None:
    """Return a warning if pretraining leaves out cases that are in no fold; labels, which it ignores, are no reason."""
    dataset = plans_manager.dataset_name
    if fold == "all" or int(fold) >= len(read_splits(dataset)):  # nnU-Net splits all cases for a fold without an entry
        return None
    message = describe_left_out_cases(dataset, cases)
    return f"WARNING: {message}" if message else None


def _cases_of_fold(plans_manager: PlansManager, cases: list[str], fold: int | str) -> tuple[list[str], list[str]]:
    if fold == "all":
        return cases, cases
    splits = read_splits(plans_manager.dataset_name)
    if not splits and len(cases) < FOLDS:
        raise UserError(
            f"the dataset has {len(cases)} preprocessed cases; {FOLDS} folds need at least {FOLDS}; use fold 'all'"
        )
    splits = splits or generate_crossval_split(sorted(cases), n_splits=FOLDS)  # as nnU-Net will
    if int(fold) < len(splits):
        return splits[int(fold)]["train"], splits[int(fold)]["val"]
    num_training = len(cases) * 4 // 5
    return cases[:num_training], cases[num_training:]
