"""The cases of a raw dataset, and work on them in several processes."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import SimpleITK as sitk  # noqa: N813  the package's own convention
import torch
from nnunetv2.paths import nnUNet_raw
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets
from tqdm import tqdm

from nnunetv2_vf.errors import UserError, printable
from nnunetv2_vf.process_pool import run_in_processes

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class RawCase:
    """A case of a raw dataset: its image files, one per channel, and its label file."""

    name: str
    images: tuple[str, ...]
    label: str

    def stamp(self) -> str:
        """Return sizes and times of the files. Another stamp means that the case has changed.

        Raises:
            OSError: a file is missing.
        """
        stats = [os.stat(file) for file in (*self.images, self.label)]  # noqa: PTH116  a Path per file is slow
        return " ".join(f"{status.st_size} {status.st_mtime_ns}" for status in stats)

    def is_readable(self) -> bool:
        """Return False if a file is missing, for example because its disk is not mounted."""
        try:
            self.stamp()
        except OSError:
            return False
        return True


@dataclass(frozen=True)
class Failure:
    """A case that failed, and why."""

    case: str
    reason: str


def read_raw_dataset(dataset_name: str) -> tuple[dict[str, Any], dict[str, RawCase]]:
    """Return ``dataset.json`` without its list of cases, and the cases by name, in nnU-Net's order.

    Raises:
        UserError: the dataset has no ``dataset.json``, it cannot be read, or there are no cases.
    """
    folder = Path(nnUNet_raw) / dataset_name
    if not (folder / "dataset.json").is_file():
        hint = "; import writes it when all of its parts are finished" if folder.is_dir() else ""
        raise UserError(f"no raw dataset {dataset_name}: {folder / 'dataset.json'} does not exist{hint}")
    try:
        description = json.loads((folder / "dataset.json").read_text())
        if not isinstance(description, dict) or description.keys().isdisjoint(("channel_names", "modality")):
            raise ValueError("it has no channel_names")
        files = get_filenames_of_train_images_and_targets(str(folder), description)
    except (OSError, ValueError, LookupError, TypeError, AssertionError) as error:  # ValueError: no JSON
        raise UserError(f"{folder / 'dataset.json'} or its cases cannot be read: {error!r}") from error
    if not files:
        raise UserError(f"{folder} has no cases in imagesTr")
    description.pop("dataset", None)  # each process gets the description; the list of 110,000 cases takes 20 MB
    return description, {name: RawCase(name, tuple(entry["images"]), entry["label"]) for name, entry in files.items()}


def work_on_cases(
    function: Callable[[RawCase], _Result], cases: Sequence[RawCase], total: int, processes: int
) -> Iterator[tuple[RawCase, _Result | Failure]]:
    """Yield each case with its result or its failure, in the order in which they finish; show a progress bar.

    Args:
        function: must be picklable.
        total: number of cases, with those that an earlier run has finished.
    """
    guarded = functools.partial(_run_or_describe_failure, function)
    with tqdm(total=total, initial=total - len(cases), unit="case", smoothing=0.05) as progress:
        for case, result in run_in_processes(guarded, cases, processes, _start_worker, function.__module__):
            yield case, _killed(case) if result is None else result
            progress.update()


def _start_worker() -> None:
    """Use one thread in this process: there is a process for each core."""
    torch.set_num_threads(1)
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)


def _run_or_describe_failure(function: Callable[[RawCase], _Result], case: RawCase) -> _Result | Failure:
    """Return the result for a case, or the failure: a library may raise anything for a damaged file."""
    try:
        return function(case)
    except Exception as error:
        return Failure(case.name, printable(f"{type(error).__name__}: {error}", limit=300))


def _killed(case: RawCase) -> Failure:
    return Failure(case.name, "the process died twice; it may need more memory: use fewer processes, -np")


def describe_failures(failures: list[Failure], total: int) -> str:
    """Return one line about the cases that failed."""
    first = failures[0]
    return f"{len(failures)} of {total} cases failed, the first is {first.case}: {first.reason}"
