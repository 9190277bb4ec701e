"""Whether everything is in place, one line each: ``nnUNetv2_vf doctor [-d ID -p PLANS -w FILE]``."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import platform
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

import torch
from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw, nnUNet_results
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from packaging.requirements import Requirement

from nnunetv2_vf import __version__
from nnunetv2_vf.errors import UserError, printable
from nnunetv2_vf.nnunet_commands import TRAINER_VARIABLE
from nnunetv2_vf.nnunet_folders import dataset_name
from nnunetv2_vf.settings import FinetuneSettings, VFSettings
from nnunetv2_vf.training.preflight import preprocessed_cases
from nnunetv2_vf.transfer.artifact import read_pretrained
from nnunetv2_vf.transfer.differences import find_differences
from nnunetv2_vf.transfer.network_fit import require_fit
from nnunetv2_vf.transfer.safe_loading import malformed_file_errors
from nnunetv2_vf.transfer.target_plans import TargetPlans, load_target

OK, NOTE, FAIL = "ok", "note", "FAIL"
_TRAINERS = ("VFPretrainTrainer", "VFFinetuneTrainer")


@dataclass(frozen=True)
class Finding:
    """A line of the report: what was found and, unless all is well, the command that mends it."""

    state: str  # OK, NOTE or FAIL
    text: str

    def __str__(self) -> str:
        return f"{self.state:<5}{printable(self.text, limit=2000)}"


def examine(
    dataset: str | None = None,
    plans: str = "nnUNetPlans",
    configuration: str = "3d_fullres",
    weights: Path | None = None,
) -> Iterator[Finding]:
    """Look at the installation and, where given, at a dataset's plans and at weights for them.

    Yields:
        what was found, as soon as it is.
    """
    yield from _versions()
    yield from _variables()
    yield from _trainers()
    yield _settings()
    yield from _devices()
    target = None
    if dataset is not None:
        try:
            target = load_target(dataset, plans, configuration)
            yield from _dataset(target)
        except UserError as error:
            yield Finding(FAIL, str(error))
            if target is None:
                return  # there is nothing to compare weights with
    if weights is not None:
        yield from _weights(weights, target)


def _versions() -> Iterator[Finding]:
    yield Finding(OK, f"nnunetv2-vf {__version__}, Python {platform.python_version()}")
    for package in ("nnunetv2", "torch"):
        wanted = _requirement(package)
        try:
            installed = version(package)
        except PackageNotFoundError:
            yield Finding(FAIL, f"{package} is not installed; install it: pip install '{wanted}'")
            continue
        legal = wanted.specifier.contains(installed, prereleases=True)
        mend = f", which does not work: pip install '{wanted}'"
        yield Finding(OK if legal else FAIL, f"{package} {installed}{'' if legal else mend}")


def _requirement(package: str) -> Requirement:
    """What this package and nnU-Net ask of another."""
    wanted = Requirement(package)
    for who in ("nnunetv2-vf", "nnunetv2"):
        with contextlib.suppress(PackageNotFoundError):
            for requirement in map(Requirement, requires(who) or ()):
                of_an_extra = requirement.marker is not None and not requirement.marker.evaluate({"extra": ""})
                if requirement.name == package and not of_an_extra:
                    wanted.specifier &= requirement.specifier
    return wanted


def _variables() -> Iterator[Finding]:
    for variable in (nnUNet_raw, nnUNet_preprocessed, nnUNet_results):
        name, folder = variable.env_var_name, variable.get()
        if not folder:
            yield Finding(FAIL, f"{name} is not set; set it: export {name}=/path/to/{name}")
        elif not Path(folder).is_dir():
            yield Finding(FAIL, f"{name} = {folder}, which does not exist; make it: mkdir -p {folder}")
        elif not os.access(folder, os.W_OK | os.X_OK):
            yield Finding(FAIL, f"{name} = {folder}, which cannot be written to; mend it: chmod u+rwx {folder}")
        else:
            yield Finding(OK, f"{name} = {folder}")


def _trainers() -> Iterator[Finding]:
    for name in _TRAINERS:
        try:
            with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():  # nnU-Net tells where it looks
                warnings.simplefilter("ignore")  # of what it imports on the way
                recursive_find_trainer_class_by_name(name)
        except Exception as error:  # whatever importing a folder of trainers may raise
            value = os.environ.get(TRAINER_VARIABLE)
            why = f"{TRAINER_VARIABLE} = {value}: {type(error).__name__}" if value else f"{TRAINER_VARIABLE} is not set"
            yield Finding(FAIL, f'nnU-Net does not find {name} ({why}); in every shell: eval "$(nnUNetv2_vf env)"')
        else:
            yield Finding(OK, f"nnU-Net finds {name}")


def _settings() -> Finding:
    try:
        for kind in (VFSettings, FinetuneSettings):
            kind.resolve({}, os.environ)
    except UserError as error:
        return Finding(FAIL, str(error))
    changed = sorted(name for name in os.environ if name.lower().startswith(VFSettings.prefix.lower()))
    return Finding(OK, f"settings from the environment: {', '.join(changed) or 'none'}")


def _devices() -> Iterator[Finding]:
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(index)
            yield Finding(OK, f"GPU {index}: {device.name}, {device.total_memory / 2**30:.0f} GB")
        if importlib.util.find_spec("triton") is None:
            yield Finding(NOTE, "triton is missing, torch.compile will fail; switch it off: export nnUNet_compile=f")
        else:
            yield Finding(OK, "torch.compile: triton is there")
    elif torch.backends.mps.is_available():
        yield Finding(OK, "Apple GPU: train with -device mps")
    else:
        cores = os.cpu_count()
        yield Finding(NOTE, f"no GPU that torch {torch.__version__} can use; on {cores} CPU cores: -device cpu")


def _dataset(target: TargetPlans) -> Iterator[Finding]:
    number, plans = target.dataset_id, target.plans_manager.plans_name
    raw = Path(nnUNet_raw.get() or ".") / dataset_name(str(number)) / "dataset.json"
    if raw.is_file():
        yield Finding(OK, f"dataset {raw.parent}")
    else:
        yield Finding(NOTE, f"no {raw}: trains, but cannot be preprocessed again")
    patch = " x ".join(map(str, target.configuration.patch_size))
    network = target.architecture["network_class_name"].rpartition(".")[2]
    yield Finding(OK, f"{target}: {network}, patch {patch}, batch {target.configuration.batch_size}")
    cases = preprocessed_cases(target.plans_manager, target.configuration_name)
    planned = target.dataset_json.get("numTraining", len(cases))
    text = f"{len(cases)} of {planned} cases preprocessed"
    mend = f"; preprocess again: nnUNetv2_preprocess -d {number} -plans_name {plans} -c {target.configuration_name}"
    yield Finding(OK, text) if len(cases) == planned else Finding(NOTE, text + mend)


def _weights(file: Path, target: TargetPlans | None) -> Iterator[Finding]:
    try:
        pretrained: dict[str, Any] = read_pretrained(file)
    except UserError as error:
        yield Finding(FAIL, str(error))
        return
    yield Finding(OK, f"{file} can be read")
    if target is None:
        yield Finding(NOTE, "no dataset to compare the weights with; name one: -d ID -p PLANS")
        return
    try:
        with malformed_file_errors(file):
            require_fit(file, pretrained, target)
            yield Finding(OK, f"{file} fits {target}")
            yield from [Finding(NOTE, str(difference)) for difference in find_differences(pretrained["vf"], target)]
    except UserError as error:
        yield Finding(FAIL, str(error))
