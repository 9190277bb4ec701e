"""``nnUNetv2_vf preprocess``: nnU-Net's preprocessing, in parts; cases that are done are skipped.

nnU-Net's preprocessor writes the files of a case to a scratch folder. They are renamed when all are there, the images
last, so that the dataset never has half a case. Then a line in the journal says how they were made; a case is skipped
if its line, its raw files and the sizes of its files agree.
"""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw
from nnunetv2.utilities.dataset_name_id_conversion import convert_dataset_name_to_id
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from tqdm import tqdm

from nnunetv2_vf.errors import UserError
from nnunetv2_vf.nnunet_folders import (
    legal_configurations,
    plans_file,
    require_configuration,
    require_variables,
)
from nnunetv2_vf.parts import PartJournals, check_parts, continuable_errors, part_name, scratch_folder
from nnunetv2_vf.preparation.raw_cases import Failure, RawCase, describe_failures, read_raw_dataset, work_on_cases

# Entries of a configuration that change its preprocessed cases. Others, such as the batch size, do not.
_CONFIGURATION_ENTRIES = (
    *("preprocessor_name", "spacing", "normalization_schemes", "use_mask_for_norm"),
    *("resampling_fn_data", "resampling_fn_data_kwargs", "resampling_fn_seg", "resampling_fn_seg_kwargs"),
)
_PLANS_ENTRIES = ("transpose_forward", "image_reader_writer")
_LABEL_ENTRIES = ("labels", "regions_class_order", "file_ending")
_PREPROCESSED_ENDINGS = (".b2nd", ".npz", ".npy", ".pkl")  # .npy: unpacked by older versions of nnU-Net


@dataclass(frozen=True)
class _Task:
    """What a process needs to preprocess a case. It reads the plans itself, once."""

    plans_file: Path
    configuration_name: str
    description: str  # dataset.json as text, without its list of cases
    digest: str
    can_be_pretrained: bool
    output: Path
    labels: Path
    scratch: Path

    def preprocess(self, case: RawCase) -> dict[str, Any]:
        """Write the files of a case; return a line of the journal."""
        stamp = case.stamp()
        plans_manager, configuration, description = _load(self)
        folder = self.scratch / case.name
        shutil.rmtree(folder, ignore_errors=True)  # of a killed run
        folder.mkdir(parents=True)
        preprocessor = configuration.preprocessor_class(verbose=False)
        preprocessor.run_case_save(
            str(folder / case.name), list(case.images), case.label, plans_manager, configuration, description
        )
        self._copy_label(case, folder, description["file_ending"])
        sizes = {}
        _remove_case(self.output, case.name)
        # Readers list the cases by their images: CASE.b2nd is renamed last.
        for file in sorted(folder.iterdir(), key=lambda file: (file.stem == case.name, file.suffix != ".pkl")):
            sizes[file.name] = file.stat().st_size
            file.replace(self.output / file.name)
        folder.rmdir()
        return {"case": case.name, "stamp": stamp, "digest": self.digest, "sizes": sizes}

    def _copy_label(self, case: RawCase, folder: Path, file_ending: str) -> None:
        """Copy the label, with which nnU-Net's validation compares, unless the copy is as new."""
        source, copy = Path(case.label), self.labels / f"{case.name}{file_ending}"
        if copy.is_file() and copy.stat().st_mtime >= source.stat().st_mtime:
            return
        shutil.copy2(source, folder / copy.name)
        (folder / copy.name).replace(copy)


@functools.lru_cache(maxsize=1)
def _load(task: _Task) -> tuple[PlansManager, ConfigurationManager, dict[str, Any]]:
    plans_manager = PlansManager(str(task.plans_file))
    return plans_manager, plans_manager.get_configuration(task.configuration_name), json.loads(task.description)


def preprocess_dataset(
    dataset: str, plans_name: str, configuration_names: Sequence[str], processes: int, num_parts: int, part_id: int
) -> None:
    """Preprocess the cases of some configurations. Continues where an earlier run has stopped.

    Args:
        dataset: id or name.
        processes: number of processes, each of which holds one case in memory.
        num_parts, part_id: preprocess only this part of the cases. The part that finishes last removes the files of
            cases that the raw dataset no longer has.

    Raises:
        UserError: a value is not legal, the dataset or its plans do not exist; or, at the end, cases have failed.
    """
    check_parts(num_parts, part_id, processes)
    require_variables(nnUNet_raw, nnUNet_preprocessed)
    file = plans_file(dataset, plans_name)
    plans_manager = PlansManager(str(file))
    description, cases = read_raw_dataset(file.parent.name)
    part = part_name(num_parts, part_id)
    tasks = [_make_task(file, plans_manager, name, description, part) for name in configuration_names]
    failures: list[Failure] = []
    for task in tasks:
        print(f"{file.parent.name}, {plans_name}, {task.configuration_name}: {len(cases)} cases in {task.output}")
        with continuable_errors(file.parent):
            failures += _preprocess_part(task, cases, processes, num_parts, part_id)
    if failures:
        raise UserError(f"{describe_failures(failures, len(cases))}; mend or remove them, then run the same command")


def _make_task(
    file: Path, plans_manager: PlansManager, configuration_name: str, description: Mapping[str, Any], part: str
) -> _Task:
    configuration = _require_preprocessable(plans_manager, configuration_name)
    relevant = [
        {entry: configuration.configuration.get(entry) for entry in _CONFIGURATION_ENTRIES},
        {entry: plans_manager.plans.get(entry) for entry in _PLANS_ENTRIES},
        {"intensities": plans_manager.foreground_intensity_properties_per_channel},
        {entry: description.get(entry) for entry in _LABEL_ENTRIES},
    ]
    digest = hashlib.sha256(json.dumps(relevant, sort_keys=True).encode()).hexdigest()[:16]
    output, labels = file.parent / configuration.data_identifier, file.parent / "gt_segmentations"
    scratch = scratch_folder(_journals_folder(output), part)
    can_be_pretrained = configuration_name in legal_configurations(plans_manager)
    return _Task(file, configuration_name, json.dumps(description), digest, can_be_pretrained, output, labels, scratch)


def _require_preprocessable(plans_manager: PlansManager, name: str) -> ConfigurationManager:
    """Return a configuration that can be preprocessed.

    Raises:
        UserError: the plans do not have it, it cannot be read, or nnU-Net does not have its preprocessor.
    """
    configuration = require_configuration(plans_manager, name)
    if configuration.preprocessor_class is None:
        raise UserError(
            f"nnU-Net has no preprocessor {configuration.preprocessor_name}, which the configuration {name} of the "
            f"plans {plans_manager.plans_name} names; legal: DefaultPreprocessor or another class in "
            "nnunetv2.preprocessing"
        )
    return configuration


def _journals_folder(output: Path) -> Path:
    return output.parent / "journals" / output.name


def _preprocess_part(
    task: _Task, cases: Mapping[str, RawCase], processes: int, num_parts: int, part_id: int
) -> list[Failure]:
    """Preprocess the cases of a part that are not done; return those that fail."""
    journals = PartJournals(_journals_folder(task.output), part_name(num_parts, part_id))
    task.output.mkdir(exist_ok=True)
    task.labels.mkdir(exist_ok=True)
    with journals.lock_part():
        failures = _preprocess_cases(task, list(cases.values())[part_id::num_parts], journals, processes)
        shutil.rmtree(task.scratch, ignore_errors=True)
        with journals.lock_merge():
            lines = _read_lines(journals, task.digest)
            unfinished = {name for name, case in cases.items() if not _is_finished(case, lines.get(name), task.output)}
            failed = {failure.case for failure in failures}
            pending = {name for name in unfinished - failed if "failure" not in lines.get(name, {})}
            if not pending:
                _remove_other_cases(task.output, cases)
                journals.remove_leftover_scratch_folders()
                _update_description(task, journals)
    if pending:
        print(f"part {part_id} of {num_parts} is finished; {len(pending)} cases of other parts are not")
    elif unfinished:
        print(f"{len(cases) - len(unfinished)} of {len(cases)} cases are preprocessed; {len(unfinished)} have failed")
    else:
        print(f"all {len(cases)} cases are preprocessed")
        if task.can_be_pretrained:
            print(_next_commands(task))
    return failures


def _next_commands(task: _Task) -> str:
    train = f"nnUNetv2_train {convert_dataset_name_to_id(task.output.parent.name)} {task.configuration_name}"
    plans = f"-p {task.plans_file.stem}"
    return (
        f"next, to pretrain: {train} all {plans} -tr VFPretrainTrainer\n"
        f"or, to fine-tune: {train} 0 {plans} -tr VFFinetuneTrainer -pretrained_weights FILE"
    )


def _preprocess_cases(task: _Task, cases: Sequence[RawCase], journals: PartJournals, processes: int) -> list[Failure]:
    lines = _read_lines(journals, task.digest)
    unfinished = [case for case in cases if not _is_finished(case, lines.get(case.name), task.output)]
    failures: list[Failure] = []
    for case, result in work_on_cases(task.preprocess, unfinished, len(cases), processes):
        if isinstance(result, Failure):
            failures.append(result)
            tqdm.write(f"{case.name} failed: {result.reason}")
            if case.is_readable():  # else its raw files may come back as they were, when a disk is mounted again
                _remove_case(task.output, case.name)
                journals.append_line({"case": case.name, "digest": task.digest, "failure": result.reason})
        else:
            journals.append_line(result)
    return failures


def _read_lines(journals: PartJournals, digest: str) -> dict[str, dict[str, Any]]:
    """Return the newest line of each case that was preprocessed in this way."""
    return {case: line for case, line in journals.read_newest("case").items() if line["digest"] == digest}


def _is_finished(case: RawCase, line: Mapping[str, Any] | None, output: Path) -> bool:
    """True if the case was preprocessed in this way, has not changed since, and its files are whole."""
    try:
        return (
            line is not None
            and "failure" not in line
            and line["stamp"] == case.stamp()
            and all((output / name).stat().st_size == size for name, size in line["sizes"].items())
        )
    except OSError:  # a file is missing
        return False


def _remove_case(output: Path, case: str) -> None:
    """Remove the files of an earlier preprocessing of a case, the images first."""
    for name in (f"{case}.b2nd", f"{case}_seg.b2nd", f"{case}.npz", f"{case}.pkl"):
        (output / name).unlink(missing_ok=True)


def _remove_other_cases(output: Path, cases: Collection[str]) -> None:
    """Remove the preprocessed files of cases that the dataset does not have."""
    kept = {f"{case}{ending}" for case in cases for ending in (*_PREPROCESSED_ENDINGS, "_seg.b2nd", "_seg.npy")}
    for file in output.iterdir():
        if file.suffix in _PREPROCESSED_ENDINGS and file.name not in kept:
            file.unlink()


def _update_description(task: _Task, journals: PartJournals) -> None:
    """Copy dataset.json as nnU-Net's planning does: cases may have been added since."""
    source = Path(nnUNet_raw) / task.output.parent.name / "dataset.json"
    copy = task.output.parent / "dataset.json"
    if not copy.is_file() or copy.read_bytes() != source.read_bytes():
        with journals.replacing(copy) as temporary:
            shutil.copyfile(source, temporary)
