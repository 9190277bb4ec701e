"""Check the installation and, on request, a dataset, its plans and weights: ``nnUNetv2_vf doctor``."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import platform
import shlex
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

import torch
from nnunetv2.configuration import default_num_processes
from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw, nnUNet_results
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from packaging.requirements import Requirement

from nnunetv2_vf import __version__
from nnunetv2_vf.errors import UserError, printable
from nnunetv2_vf.nnunet_commands import TRAINER_VARIABLE
from nnunetv2_vf.nnunet_folders import describe_left_out_cases
from nnunetv2_vf.settings import FinetuneSettings, VFSettings
from nnunetv2_vf.training.preflight import check_patch, preprocessed_cases
from nnunetv2_vf.transfer.architectures import network_name
from nnunetv2_vf.transfer.artifact import read_pretrained
from nnunetv2_vf.transfer.differences import find_differences
from nnunetv2_vf.transfer.hub import local_file
from nnunetv2_vf.transfer.network_fit import require_fit, require_trainable
from nnunetv2_vf.transfer.safe_loading import malformed_file_errors
from nnunetv2_vf.transfer.safetensors_files import SAFETENSORS_ENDING
from nnunetv2_vf.transfer.suggested_commands import convert_command
from nnunetv2_vf.transfer.target_plans import TargetPlans, load_target

OK, NOTE, FAIL = "ok", "note", "FAIL"


@dataclass(frozen=True)
class Finding:
    """One line of the report. A note or a failure names the command that solves the problem."""

    state: str  # OK, NOTE or FAIL
    text: str

    def __str__(self) -> str:
        return f"{self.state:<5}{printable(self.text, limit=2000)}"


def examine(
    dataset: str | None = None,
    plans_name: str = "nnUNetPlans",
    configuration_name: str = "3d_fullres",
    weights: str | Path | None = None,
) -> Iterator[Finding]:
    """Check the installation and, if they are given, a dataset's plans and weights for them.

    Yields:
        each finding as soon as it is known.
    """
    yield from _check_versions()
    yield from _check_folders()
    yield from _check_trainers()
    yield from _errors_as_findings(_check_settings())
    yield from _check_devices()
    target = None
    if dataset is not None:
        try:
            target = load_target(dataset, plans_name, configuration_name)
        except UserError as error:
            yield Finding(FAIL, str(error))
        else:
            yield from _errors_as_findings(_check_dataset(target))
            yield from _errors_as_findings(_check_settings_in_plans(target.plans_manager.plans))
            if weights is None:
                yield from _errors_as_findings(_check_pretraining(target))
    if weights is not None:
        yield from _errors_as_findings(_check_weights(weights, target))


def _errors_as_findings(findings: Iterator[Finding]) -> Iterator[Finding]:
    try:
        yield from findings
    except UserError as error:
        yield Finding(FAIL, str(error))


def _check_versions() -> Iterator[Finding]:
    yield Finding(OK, f"nnunetv2-vf {__version__}, Python {platform.python_version()}")
    for package in ("nnunetv2", "torch"):
        required, installed = _combined_requirement(package), version(package)
        if required.specifier.contains(installed, prereleases=True):
            yield Finding(OK, f"{package} {installed}")
        else:
            yield Finding(
                FAIL, f"{package} {installed} is not supported; install a supported version: pip install '{required}'"
            )


def _combined_requirement(package: str) -> Requirement:
    """Return the requirement on a package that combines those of nnunetv2-vf and of nnU-Net."""
    combined = Requirement(package)
    for distribution in ("nnunetv2-vf", "nnunetv2"):
        with contextlib.suppress(PackageNotFoundError):
            for requirement in map(Requirement, requires(distribution) or ()):
                is_of_an_extra = requirement.marker is not None and not requirement.marker.evaluate({"extra": ""})
                if requirement.name == package and not is_of_an_extra:
                    combined.specifier &= requirement.specifier
    return combined


def _check_folders() -> Iterator[Finding]:
    for variable in (nnUNet_raw, nnUNet_preprocessed, nnUNet_results):
        name, folder = variable.env_var_name, variable.get()
        if not folder:
            yield Finding(FAIL, f"{name} is not set; set it: export {name}=/path/to/{name}")
        elif not Path(folder).is_dir():
            yield Finding(FAIL, f"{name} = {folder}, which does not exist; make it: mkdir -p {shlex.quote(folder)}")
        elif not os.access(folder, os.W_OK | os.X_OK):
            yield Finding(
                FAIL, f"{name} = {folder}, which is not writable; change that: chmod u+rwx {shlex.quote(folder)}"
            )
        else:
            yield Finding(OK, f"{name} = {folder}")


def _check_trainers() -> Iterator[Finding]:
    for name in ("VFPretrainTrainer", "VFFinetuneTrainer"):
        try:
            with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():  # nnU-Net prints its search path
                warnings.simplefilter("ignore")  # nnU-Net imports all modules of these folders, and some may warn
                recursive_find_trainer_class_by_name(name)
        except Exception as error:  # nnU-Net imports every module of the folder, which may raise anything
            value = os.environ.get(TRAINER_VARIABLE)
            reason = (
                f"{TRAINER_VARIABLE} = {value}: {type(error).__name__}" if value else f"{TRAINER_VARIABLE} is not set"
            )
            yield Finding(FAIL, f'nnU-Net does not find {name} ({reason}); in every shell: eval "$(nnUNetv2_vf env)"')
        else:
            yield Finding(OK, f"nnU-Net finds {name}")


def _check_settings() -> Iterator[Finding]:
    VFSettings.resolve({}, os.environ)
    FinetuneSettings.resolve({}, os.environ)
    names = sorted(name for name in os.environ if name.lower().startswith(VFSettings.prefix.lower()))
    yield Finding(OK, f"settings from the environment: {', '.join(names) or 'none'}")


def _check_settings_in_plans(plans: Mapping[str, Any]) -> Iterator[Finding]:
    for settings in (VFSettings, FinetuneSettings):
        settings.resolve(plans, {})
        if settings.section in plans:
            yield Finding(OK, f"settings in the plans: {settings.section}: {', '.join(plans[settings.section])}")


def _check_pretraining(target: TargetPlans) -> Iterator[Finding]:
    settings = VFSettings.resolve(target.plans_manager.plans, os.environ)
    for warning in check_patch(target.configuration, settings):
        yield Finding(NOTE, f"for a pretraining with these plans: {warning.removeprefix('WARNING: ')}")


def _check_devices() -> Iterator[Finding]:
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(index)
            yield Finding(OK, f"GPU {index}: {device.name}, {device.total_memory / 2**30:.0f} GB")
        if importlib.util.find_spec("triton") is None:
            yield Finding(NOTE, "torch.compile will fail without triton; switch it off: export nnUNet_compile=f")
        else:
            yield Finding(OK, "torch.compile can work: triton is installed")
    elif torch.backends.mps.is_available():
        yield Finding(OK, "Apple GPU: train with -device mps")
    else:
        cores = os.cpu_count()
        yield Finding(NOTE, f"torch {torch.__version__} finds no GPU; train on {cores} CPU cores: -device cpu")
    if default_num_processes > (os.cpu_count() or 1):
        yield Finding(
            NOTE,
            f"nnU-Net starts {default_num_processes} processes to preprocess and to validate, but there are "
            f"{os.cpu_count()} CPU cores; start fewer: export nnUNet_def_n_proc={os.cpu_count()}",
        )


def _check_dataset(target: TargetPlans) -> Iterator[Finding]:
    dataset_id, plans = target.dataset_id, target.plans_manager.plans_name
    raw = Path(nnUNet_raw.get() or "nnUNet_raw") / target.plans_manager.dataset_name / "dataset.json"
    if raw.is_file():
        yield Finding(OK, f"dataset {raw.parent}")
    else:
        yield Finding(NOTE, f"{raw} does not exist: the dataset can be trained on, but not preprocessed again")
    with malformed_file_errors(str(target)):
        patch = " x ".join(map(str, target.configuration.patch_size))
        network = network_name(target.architecture)
        yield Finding(OK, f"{target}: {network}, patch {patch}, batch {target.configuration.batch_size}")
    require_trainable(target)
    cases = preprocessed_cases(target.plans_manager, target.configuration_name)
    preprocessed = len(cases)
    expected = target.dataset_json.get("numTraining", preprocessed)
    text = f"{preprocessed} of {expected} cases preprocessed"
    if preprocessed == expected:
        yield Finding(OK, text)
    else:
        command = f"nnUNetv2_preprocess -d {dataset_id} -plans_name {plans} -c {target.configuration_name}"
        yield Finding(NOTE, f"{text}; preprocess again: {command}")
    left_out = describe_left_out_cases(target.plans_manager.dataset_name, cases)
    if left_out:
        yield Finding(NOTE, left_out)


def _check_weights(weights: str | Path, target: TargetPlans | None) -> Iterator[Finding]:
    file = local_file(weights)
    pretrained = read_pretrained(file)
    yield Finding(OK, f"{file} can be read")
    if file.suffix == SAFETENSORS_ENDING:
        yield Finding(NOTE, f"nnU-Net reads no safetensors; convert the file first: {convert_command(file)}")
    if target is None:
        yield Finding(NOTE, "no plans to compare the weights with; name them: -d ID -p PLANS")
        return
    with malformed_file_errors(file):
        require_fit(file, pretrained, target)
        yield Finding(OK, f"{file} fits {target}")
        yield from [Finding(NOTE, str(difference)) for difference in find_differences(pretrained["vf"], target)]
