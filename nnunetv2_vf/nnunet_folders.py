"""Find a dataset, its plans and its split into folds in nnU-Net's folders."""

from __future__ import annotations

import json
import re
import shlex
import time
import warnings
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnunetv2.paths import nnUNet_preprocessed
from nnunetv2.utilities.dataset_name_id_conversion import (
    convert_dataset_name_to_id,
    find_candidate_datasets,
    maybe_convert_to_dataset_name,
)

from nnunetv2_vf.errors import UserError

if TYPE_CHECKING:  # it imports torch, which an import of volumes does not need
    from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

FOLDS = 5  # folds into which nnU-Net splits the cases of a dataset
_DATASET_NAME = re.compile(r"Dataset\d{3}_[^/]+")
_NO_DATASET = "{!r} is not a dataset; legal: an id such as 7, or a full name such as Dataset007_Liver"
# Errors of nnU-Net if entries of a configuration are missing, or if it inherits from itself or from an unknown one.
_UNREADABLE_CONFIGURATION = (RuntimeError, ValueError, LookupError, TypeError, AttributeError)
_PLAN_COMMANDS = {  # plans name -> the command that makes such plans
    "nnUNetPlans": "nnUNetv2_plan_and_preprocess -d {} -c 3d_fullres",
    "PCTNetPlans": "nnUNetv2_vf plan -d {}",
    "FMUNetPlans": "nnUNetv2_vf plan -d {} --network FMUNet",
    "VFPlans": "nnUNetv2_vf plan -d {} --like FILE",
}


def require_variables(*variables: Any) -> None:
    """Raise UserError unless all of these environment variables (objects of ``nnunetv2.paths``) are set."""
    for variable in variables:
        if not variable.get():  # unset or empty
            name = variable.env_var_name
            raise UserError(f"the environment variable {name} is not set; set it: export {name}=/path/to/{name}")


def dataset_name(dataset: str) -> str:
    """Return the full name of a dataset: ``7`` or ``Dataset007_Liver`` -> ``Dataset007_Liver``.

    Raises:
        UserError: no dataset or several have this id, or the name does not have the form ``DatasetXXX_NAME``. Whether
            a dataset with such a name exists is not checked.
    """
    try:
        name: str = maybe_convert_to_dataset_name(dataset)
    except ValueError as error:
        raise UserError(_NO_DATASET.format(dataset)) from error
    except RuntimeError as error:
        names = ", ".join(find_candidate_datasets(int(dataset)))
        if names:
            raise UserError(f"several datasets have the id {dataset}: {names}; rename all but one") from error
        raise UserError(
            f"no dataset {dataset} in nnUNet_raw, nnUNet_preprocessed and nnUNet_results; see which folders these are: "
            "nnUNetv2_vf doctor"
        ) from error
    if not _DATASET_NAME.fullmatch(name):
        raise UserError(_NO_DATASET.format(dataset))
    return name


def legal_configurations(plans_manager: PlansManager) -> list[str]:
    """Return the configurations that can be pretrained: 3D, and not the second stage of a cascade.

    That stage has additional input channels, which are segmentations. Users may give configurations any name, so the
    name says nothing.
    """
    return [name for name in plans_manager.available_configurations if _is_legal(plans_manager, name)]


def _is_legal(plans_manager: PlansManager, name: str) -> bool:
    try:
        with warnings.catch_warnings():
            # nnU-Net warns about the format of old plans, also in configurations that the user did not name.
            warnings.simplefilter("ignore")
            configuration = plans_manager.get_configuration(name)
        return len(configuration.patch_size) == 3 and configuration.previous_stage_name is None
    except _UNREADABLE_CONFIGURATION:
        return False


def require_configuration(
    plans_manager: PlansManager, name: str, legal: Sequence[str] | None = None
) -> ConfigurationManager:
    """Return a configuration of the plans.

    Args:
        legal: configurations that the message names; default: all configurations of the plans.

    Raises:
        UserError: the plans have no such configuration, or it cannot be read, for example because the configuration
            that it inherits from is missing.
    """
    available = plans_manager.available_configurations
    hint = f"legal: {', '.join(available if legal is None else legal) or 'none, these plans have no 3D configuration'}"
    if name not in available:
        raise UserError(f"the plans {plans_manager.plans_name} have no configuration {name!r}; {hint}")
    try:
        configuration = plans_manager.get_configuration(name)
        _ = configuration.patch_size, configuration.preprocessor_name
    except _UNREADABLE_CONFIGURATION as error:
        raise UserError(
            f"configuration {name!r} of the plans {plans_manager.plans_name} cannot be read: {error!r}; {hint}"
        ) from error
    return configuration


def plans_file(dataset: str, plans_name: str) -> Path:
    """Return the path of a plans file.

    Args:
        dataset: id or name.
        plans_name: file name without ``.json``.

    Raises:
        UserError: there is no such dataset or file, or the name is a path.
    """
    require_variables(nnUNet_preprocessed)
    if plans_name != Path(plans_name).name or plans_name.endswith(".json"):
        raise UserError(f"{plans_name!r} is no name of plans; legal: the file's name without folder and .json")
    name = dataset_name(dataset)
    path = Path(nnUNet_preprocessed) / name / f"{plans_name}.json"
    if not path.is_file():
        available = ", ".join(sorted(p.stem for p in path.parent.glob("*Plans*.json"))) or "none"
        command = _PLAN_COMMANDS.get(plans_name)
        if plans_name == "nnUNetPlans" and (path.parent / "dataset_fingerprint.json").is_file():
            command = "nnUNetv2_plan_experiment -d {}"
        hint = f"; make them: {command.format(convert_dataset_name_to_id(name))}" if command else ""
        raise UserError(f"no plans {path}; there are: {available}{hint}")
    return path


def read_splits(dataset: str) -> list[dict[str, list[str]]]:
    """Return the cases ``train`` and ``val`` of each fold, from nnU-Net's ``splits_final.json``; without it, no folds.

    Args:
        dataset: full name.

    Raises:
        UserError: the file cannot be read.
    """
    file = splits_file(dataset)
    if not file.is_file():
        return []
    try:
        folds = _read_json_patiently(file)
        return [{part: [*map(str, fold[part])] for part in ("train", "val")} for fold in folds]
    except (OSError, ValueError, LookupError, TypeError) as error:  # ValueError: no JSON
        raise UserError(
            f"{file} cannot be read: {error!r}; delete it, so that nnU-Net makes new folds: rm {shlex.quote(str(file))}"
        ) from error


def _read_json_patiently(file: Path) -> Any:
    """Return the content of a file of JSON. Wait while another training, which started just before, writes it.

    Raises:
        ValueError: the file still is no JSON after two seconds.
    """
    for _ in range(4):
        with suppress(ValueError):
            return json.loads(file.read_text())
        time.sleep(0.5)
    return json.loads(file.read_text())


def describe_left_out_cases(dataset: str, cases: Collection[str]) -> str | None:
    """Return a message if some cases of a dataset are in no fold; None if all are, or if there are no folds yet.

    nnU-Net makes the folds when it first trains one, and keeps them when the dataset grows.

    Args:
        dataset: full name.
        cases: all cases that the folds could have.

    Raises:
        UserError: the file with the folds cannot be read.
    """
    folds = read_splits(dataset)
    left_out = sorted({*cases} - {case for fold in folds for part in fold.values() for case in part})
    if not folds or not left_out:
        return None
    file = splits_file(dataset)
    leave_out = f"folds 0 to {len(folds) - 1} leave them out" if len(folds) > 1 else "fold 0 leaves them out"
    return (
        f"{len(left_out)} of {len(cases)} cases are in no fold of {file}, for example {left_out[0]}: {leave_out}; use "
        f"fold 'all', which has all cases, or let nnU-Net make new folds: rm {shlex.quote(str(file))} (models of the "
        "old folds then do not match the new ones)"
    )


def splits_file(dataset: str) -> Path:
    """Return the path of nnU-Net's file with the folds of a dataset, which has this full name."""
    return Path(nnUNet_preprocessed.get() or "") / dataset / "splits_final.json"
