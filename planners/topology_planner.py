"""nnU-Net's experiment planning with a given network in the 3D configurations."""

from __future__ import annotations

import functools
import json
import math
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from batchgenerators.utilities.file_and_folder_operations import load_json, save_json
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.experiment_planning.plan_and_preprocess_api import plan_experiment_dataset
from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw, nnUNet_results
from nnunetv2.utilities.dataset_name_id_conversion import convert_dataset_name_to_id
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_vf.errors import UserError
from nnunetv2_vf.nnunet_folders import dataset_name, require_variables
from nnunetv2_vf.planners.memory_fitting import Patch, candidate_patches, fit_batch_size, fit_patch, patch_divisor
from nnunetv2_vf.planners.step_memory import GIB, StepMemory, measure_architecture
from nnunetv2_vf.transfer.architectures import canonical_architecture, complete_arguments
from nnunetv2_vf.transfer.metadata import format_spacing, read_channel_names
from nnunetv2_vf.transfer.safe_loading import malformed_file_errors

# Arguments of networks that change no weights.
_WITHOUT_WEIGHTS = {"channels_last", "activation_checkpointing", "dropout_per_stage", "drop_path"}
# Entries of a configuration that change its preprocessed cases, and that our planners can change.
_PREPROCESSING = ("preprocessor_name", "spacing", "normalization_schemes", "use_mask_for_norm")
_INTENSITIES = "foreground_intensity_properties_per_channel"
_OPTIONAL = ("3d_lowres", "3d_cascade_fullres")  # configurations that nnU-Net plans for large images only
_MALFORMED = (LookupError, TypeError, ValueError, AttributeError)  # of a file without JSON, or with other entries
_PRETEXT_CLASSES = 5  # of Volume Fusion's default settings; pretraining with these plans must fit as well


class TopologyPlanner(ExperimentPlanner):
    """nnU-Net's planner, except for the network of the 3D configurations and the patch and batch size that fit it.

    Spacings, normalisation, resampling, the decision about 3d_lowres and the configuration 2d are nnU-Net's.
    """

    def choose_architecture(self, spacing: Sequence[float]) -> dict[str, Any]:
        """Return the plan's entry ``architecture`` for a spacing (mm, axes as in the preprocessed cases)."""
        raise NotImplementedError

    def get_plans_for_configuration(
        self,
        spacing: Sequence[float],
        median_shape: Sequence[float],
        data_identifier: str,
        approximate_n_voxels_dataset: float,
        _cache: dict[Any, Any],
    ) -> dict[str, Any]:
        """Return nnU-Net's plan of a configuration; a 3D one gets the network of :meth:`choose_architecture`.

        Raises:
            UserError: not even the smallest patch fits into the memory.
        """
        plan: dict[str, Any] = super().get_plans_for_configuration(
            spacing, median_shape, data_identifier, approximate_n_voxels_dataset, _cache
        )
        if len(spacing) == 2:
            return plan
        architecture = self.choose_architecture(spacing)
        measure = functools.partial(self._measure, _cache, architecture)
        divisor = patch_divisor(architecture)
        target_gb = self.UNet_vram_target_GB
        patch = fit_patch(candidate_patches(spacing, median_shape, divisor), divisor, measure, target_gb)
        # nnU-Net's limit: a batch covers at most 5 % of the dataset's voxels
        limit = round(approximate_n_voxels_dataset * self.max_dataset_covered / np.prod(patch, dtype=np.float64))
        batch_size = fit_batch_size(patch, measure, target_gb, limit)
        return {
            **plan,
            "patch_size": patch,
            "batch_size": batch_size,
            "architecture": architecture,
            "estimated_training_memory_gb": round(measure(patch, batch_size).total / GIB, 1),
        }

    def _measure(
        self, cache: dict[Any, Any], architecture: Mapping[str, Any], patch: Patch, batch_size: int
    ) -> StepMemory:
        """Return the memory of a training step; measure each step once, because nnU-Net plans 3d_lowres repeatedly."""
        key = (json.dumps(architecture), patch, batch_size)
        if key not in cache:
            classes = max(len(self.dataset_json["labels"]), _PRETEXT_CLASSES)
            cache[key] = measure_architecture(architecture, self.number_of_channels, classes, patch, batch_size)
        memory: StepMemory = cache[key]
        return memory

    def plan_experiment(self) -> dict[str, Any]:
        """Plan the dataset, write the plans, and return them.

        Raises:
            UserError: the old plans of this name are damaged; see also :meth:`save_plans`.
        """
        _ = self._old_plans  # read them before the work
        plans: dict[str, Any] = super().plan_experiment()
        return plans

    @property
    def _plans_file(self) -> Path:
        return Path(nnUNet_preprocessed) / self.dataset_name / f"{self.plans_identifier}.json"

    @functools.cached_property
    def _old_plans(self) -> dict[str, Any]:
        return _read_plans(self._plans_file) if self._plans_file.is_file() else {"configurations": {}}

    def save_plans(self, plans: dict[str, Any]) -> None:
        """Write the plans.

        Raises:
            UserError: folds are trained with plans of this name and another network. The next fold would write its
                plans into their results folder, and they could no longer predict.
        """
        old = self._old_plans
        # nnU-Net keeps what the old file has besides the new configurations. Those of the user's own may stay, but
        # not a 3d_lowres and a cascade with the network of the old plans.
        outdated = [name for name in _OPTIONAL if name in old["configurations"] and name not in plans["configurations"]]
        kept = {name: entry for name, entry in old["configurations"].items() if name not in outdated}
        self._require_same_network_as_trained({**plans, "configurations": {**kept, **plans["configurations"]}})
        for folder in self._folders_of_old_plans(old, plans):
            print(f"{folder} holds cases that were preprocessed with the old plans of this name: preprocess again")
        if outdated:
            save_json({**old, "configurations": kept}, str(self._plans_file), sort_keys=False)
        super().save_plans(plans)

    def _folders_of_old_plans(self, old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Path]:
        """Return the folders with preprocessed cases that new plans of the same name would preprocess otherwise."""
        folders = []
        for name, configuration in new["configurations"].items():
            before = old["configurations"].get(name)
            if before is None or _preprocessing_of(old, before) == _preprocessing_of(new, configuration):
                continue
            folder = Path(nnUNet_preprocessed) / self.dataset_name / configuration.get("data_identifier", name)
            if folder.is_dir() and any(folder.iterdir()):
                folders.append(folder)
        return folders

    def _require_same_network_as_trained(self, plans: Mapping[str, Any]) -> None:
        name, results = self.plans_identifier, nnUNet_results.get()
        if not results:
            return
        for trained in sorted((Path(results) / self.dataset_name).glob(f"*__{name}__*/plans.json")):
            configuration = trained.parent.name.rpartition("__")[2]
            with malformed_file_errors(trained):
                old, new = (_network_of(content, configuration) for content in (load_json(str(trained)), plans))
            if old and new and old != new:
                raise UserError(
                    f"{trained.parent} has folds of another network, which could not predict once another fold is "
                    f"trained with the new plans; give these another name: -overwrite_plans_name {name}2"
                )

    @property
    def number_of_channels(self) -> int:
        return len(read_channel_names(self.dataset_json))


def _read_plans(file: Path) -> dict[str, Any]:
    try:
        plans: dict[str, Any] = load_json(str(file))
        plans["configurations"].items()
    except _MALFORMED as error:  # nnU-Net was killed while it wrote the file
        raise UserError(f"{file} is damaged; remove it, then plan again: rm {shlex.quote(str(file))}") from error
    return plans


def _preprocessing_of(plans: Mapping[str, Any], configuration: Mapping[str, Any]) -> Any:
    """Return the entries that change preprocessed cases, as in a file: new plans hold arrays and tuples."""
    entries = [plans.get(_INTENSITIES), *(configuration.get(name) for name in _PREPROCESSING)]
    return json.loads(json.dumps(entries, default=lambda numbers: numbers.tolist()))


def _network_of(plans: Mapping[str, Any], configuration: str) -> dict[str, Any]:
    """Return the entry ``architecture`` of a configuration with the arguments that change weights; empty if none."""
    if configuration not in plans["configurations"]:
        return {}
    entry = PlansManager(dict(plans)).get_configuration(configuration).configuration["architecture"]
    architecture: dict[str, Any] = json.loads(json.dumps(canonical_architecture(entry)))
    architecture["arch_kwargs"] = {
        name: value for name, value in complete_arguments(architecture).items() if name not in _WITHOUT_WEIGHTS
    }
    return architecture


def plan_datasets(
    datasets: Sequence[str],
    planner: Callable[..., TopologyPlanner],
    gpu_memory_target: float | None = None,
    preprocessor_name: str = "DefaultPreprocessor",
    target_spacing: Sequence[float] | None = None,
    plans_name: str | None = None,
) -> Iterator[tuple[dict[str, Any], str]]:
    """Plan datasets and write their plans, one after the other.

    Args:
        datasets: ids or names; their fingerprints must exist.
        planner: called with the arguments of nnU-Net's planner classes.
        gpu_memory_target: GB; default 8.
        target_spacing: of 3d_fullres, mm, axes as in the images.
        plans_name: default: the planner's.

    Yields:
        the content and the name of each plans file, once it is written.

    Raises:
        UserError: before any file is written, if a dataset or its fingerprint is missing or an argument is not legal;
            or, without plans for this dataset, if its smallest patch does not fit into the memory.
    """
    check_options(gpu_memory_target, target_spacing, plans_name)
    names = [_find_dataset_with_fingerprint(dataset) for dataset in datasets]
    for name in names:
        yield plan_experiment_dataset(name, planner, gpu_memory_target, preprocessor_name, target_spacing, plans_name)


def check_options(
    gpu_memory_target: float | None, target_spacing: Sequence[float] | None, plans_name: str | None
) -> None:
    """Raise UserError unless memory (GB), spacing (mm) and name are legal and nnU-Net's variables allow planning."""
    require_variables(nnUNet_raw, nnUNet_preprocessed)
    if plans_name is not None:
        _require_plans_name(plans_name)
    if target_spacing is not None and not all(0 < mm < math.inf for mm in target_spacing):
        raise UserError(f"-overwrite_target_spacing {list(target_spacing)}; legal: three positive numbers, mm")
    if gpu_memory_target is not None and not 0 < gpu_memory_target < math.inf:
        raise UserError(f"-gpu_memory_target {gpu_memory_target:g}; legal: a positive number of GB")
    if get_allowed_n_proc_DA() < 1:
        raise UserError("nnUNet_n_proc_DA=0 is for training; nnU-Net's planning divides by it: unset nnUNet_n_proc_DA")


def _require_plans_name(name: str) -> None:
    """Raise UserError unless new plans can have a name: it becomes part of file names, commands and nnU-Net's folders.

    nnU-Net separates trainer, plans and configuration by two underscores.
    """
    if not re.fullmatch(r"\w[\w.+-]*", name) or name.endswith(".json") or "__" in name:
        raise UserError(f"-overwrite_plans_name {name!r}; legal: letters, digits, - + . and single _, without .json")


def _find_dataset_with_fingerprint(dataset: str) -> str:
    name = dataset_name(dataset)
    description = Path(nnUNet_raw) / name / "dataset.json"
    if not description.is_file():
        raise UserError(f"no dataset {dataset}: {description} does not exist")
    with malformed_file_errors(description):
        content = load_json(str(description))
        content["labels"], content["file_ending"], read_channel_names(content)
    fingerprint = Path(nnUNet_preprocessed) / name / "dataset_fingerprint.json"
    command = f"nnUNetv2_extract_fingerprint -d {convert_dataset_name_to_id(name)}"
    if not fingerprint.is_file():
        raise UserError(f"dataset {name} has no fingerprint; make it: {command}")
    try:
        load_json(str(fingerprint))["spacings"]
    except _MALFORMED as error:
        raise UserError(f"{fingerprint} is damaged; make it again: {command} --clean") from error
    return name


def describe_plans(plans: Mapping[str, Any], plans_name: str, remark: str, commands: Sequence[str]) -> str:
    """Describe the 3D configurations of new plans and the next commands, the first of which preprocesses.

    Args:
        remark: follows the name of the plans.
        commands: after preprocessing.
    """
    configurations = _describe_configurations(plans)
    if not configurations:
        return (
            f"{plans_name} of {plans['dataset_name']}: only the configuration 2d, with nnU-Net's U-Net, because the "
            "images are two-dimensional"
        )
    dataset_id = convert_dataset_name_to_id(plans["dataset_name"])
    lines = [
        f"{plans_name} of {plans['dataset_name']}{remark}:",
        *(f"  {name}: {line}" for name, line in configurations.items()),
        "Next:",
        f"  nnUNetv2_preprocess -d {dataset_id} -plans_name {plans_name} -c 3d_fullres",
        *(f"  {command}" for command in commands),
    ]
    return "\n".join(lines)


def _format_memory(gigabytes: float) -> str:
    return f"about {gigabytes:g} GB" if gigabytes else "less than 0.1 GB"


def _describe_configurations(plans: Mapping[str, Any]) -> dict[str, str]:
    """Return one line on patch, spacing, batch and memory for each 3D configuration of a :class:`TopologyPlanner`."""
    return {
        name: f"patch {' x '.join(map(str, plan['patch_size']))} voxels of "
        f"{format_spacing(plan['spacing'])}, batch {plan['batch_size']}, "
        f"{_format_memory(plan['estimated_training_memory_gb'])} in training on a GPU"
        for name, plan in plans["configurations"].items()
        if "estimated_training_memory_gb" in plan
    }
