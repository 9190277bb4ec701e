"""``nnUNetv2_vf fingerprint``: nnU-Net's dataset fingerprint, in parts, continued after a crash, or of a sample."""

from __future__ import annotations

import contextlib
import io
import random
import uuid
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from batchgenerators.utilities.file_and_folder_operations import load_json, save_json
from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor
from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json
from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw

from nnunetv2_vf.errors import UserError
from nnunetv2_vf.nnunet_folders import dataset_name, require_variables
from nnunetv2_vf.parts import PartJournals, check_parts, continuable_errors, part_name
from nnunetv2_vf.preparation.raw_cases import Failure, RawCase, describe_failures, read_raw_dataset, work_on_cases

FINGERPRINT = "dataset_fingerprint.json"
_INTENSITIES = ".intensities"
_SAMPLE = "volume_fusion_sample"  # entry of the file; nnU-Net ignores it


@dataclass(frozen=True)
class _Task:
    """What a process needs to analyze a case."""

    reader_writer_class: type
    intensities_per_case: int

    def analyze(self, case: RawCase) -> tuple[dict[str, Any], list[np.ndarray]]:
        """Return nnU-Net's measurements of a case as a line of the journal, and the intensities of each channel."""
        stamp = case.stamp()
        shape, spacing, intensities, _, relative_size = DatasetFingerprintExtractor.analyze_case(
            list(case.images), case.label, self.reader_writer_class, self.intensities_per_case
        )
        line = {
            "case": case.name,
            "stamp": stamp,
            "shape": [int(voxels) for voxels in shape],
            "spacing": [float(mm) for mm in spacing],
            "relative_size": float(relative_size),
        }
        return line, [np.asarray(channel) for channel in intensities]  # an empty list becomes an empty float64 array


class Results:
    """The measurements of the cases: lines in the journals, and a file with the intensities of each run.

    A line says where the intensities of its case begin in the file, and which type and how many there are for each
    channel. They are written before the line. Still, a power failure may lose them: such lines do not count.
    """

    def __init__(self, folder: Path, part: str):
        self.journals = PartJournals(folder, part)
        self._file = folder / f"{part}_{uuid.uuid4().hex}{_INTENSITIES}"  # no other run writes to it

    def append(self, line: Mapping[str, Any], intensities: Sequence[np.ndarray]) -> None:
        with self._file.open("ab") as file:
            begin = file.tell()
            for channel in intensities:
                file.write(channel.tobytes())
        arrays = [[channel.dtype.str, len(channel)] for channel in intensities]
        self.journals.append_line({**line, "file": self._file.name, "begin": begin, "arrays": arrays})

    def read_lines(self) -> dict[str, dict[str, Any]]:
        """Return the newest line of each case, if its intensities are whole."""
        file_sizes = {}
        for file in self.journals.folder.glob(f"*{_INTENSITIES}"):
            # Opened, because a network drive may know an old size. Another part, which has finished the work, may
            # remove the file.
            with suppress(FileNotFoundError), file.open("rb") as opened:
                file_sizes[file.name] = opened.seek(0, io.SEEK_END)
        lines = self.journals.read_newest("case")
        return {
            case: line
            for case, line in lines.items()
            if line["begin"] + sum(_sizes(line)) <= file_sizes.get(line["file"], -1)
        }

    def read_intensities(self, line: Mapping[str, Any], channel: int) -> np.ndarray:
        dtype, count = line["arrays"][channel]
        offset = line["begin"] + sum(_sizes(line)[:channel])
        return np.fromfile(self.journals.folder / line["file"], dtype, count, offset=offset)

    def clear(self) -> None:
        """Remove all files, the lines first: a line must not outlive its intensities."""
        for ending in (".jsonl", _INTENSITIES):
            for file in self.journals.folder.glob(f"*{ending}"):
                file.unlink()


def _sizes(line: Mapping[str, Any]) -> list[int]:
    """Return the number of bytes that the intensities of each channel take."""
    return [np.dtype(dtype).itemsize * count for dtype, count in line["arrays"]]


def make_missing_fingerprint(dataset: str, processes: int) -> None:
    """Write the fingerprint of a dataset that has none yet.

    Raises:
        UserError: as :func:`extract_fingerprint`.
    """
    require_variables(nnUNet_raw, nnUNet_preprocessed)
    name = dataset_name(dataset)
    exists = (Path(nnUNet_raw) / name / "dataset.json").is_file()
    if exists and not (Path(nnUNet_preprocessed) / name / FINGERPRINT).is_file():
        print(f"{name} has no fingerprint yet; making it (on several machines: nnUNetv2_vf fingerprint)")
        extract_fingerprint(dataset, None, 0, processes, 1, 0, clean=False)


def extract_fingerprint(
    dataset: str, sample: int | None, seed: int, processes: int, num_parts: int, part_id: int, clean: bool
) -> str:
    """Write the fingerprint of a dataset, which planning needs. Continues where an earlier run has stopped.

    Args:
        dataset: id or name.
        sample: number of cases to analyze, chosen at random; None for all.
        seed: of the choice.
        processes: number of processes, each of which holds one case in memory.
        num_parts, part_id: analyze only this part of the cases. The part that finishes last writes the fingerprint.
        clean: True makes a new fingerprint if there is one.

    Returns:
        what was done, and the next command.

    Raises:
        UserError: a value is not legal, the dataset does not exist, or cases cannot be read.
    """
    check_parts(num_parts, part_id, processes)
    require_variables(nnUNet_raw, nnUNet_preprocessed)
    name = dataset_name(dataset)
    description, all_cases = read_raw_dataset(name)
    cases = choose_cases(all_cases, sample, seed)
    record = {} if sample is None else {_SAMPLE: {"cases": len(cases), "of": len(all_cases), "seed": seed}}
    file = Path(nnUNet_preprocessed) / name / FINGERPRINT
    if file.is_file() and not clean:
        return _describe_existing(file, len(cases), record)
    before = _version(file)
    task = _Task(_choose_reader(description, next(iter(cases.values()))), _intensities_per_case(name, len(cases)))
    with continuable_errors(file.parent):
        # Intensities depend on the number of cases, so a sample and the whole dataset have journals of their own.
        journals = file.parent / "journals" / f"fingerprint_{task.intensities_per_case}"
        results = Results(journals, part_name(num_parts, part_id))
        with results.journals.lock_part():
            failures = _analyze(task, list(cases.values())[part_id::num_parts], results, processes)
            with results.journals.lock_merge():
                is_written = _version(file) != before  # by another part
                lines = results.read_lines()
                unfinished = (cases.keys() - lines.keys()) | {failure.case for failure in failures}
                if not unfinished:  # cases of other parts may have changed since
                    unfinished = {case.name for case in cases.values() if _has_changed(case, lines[case.name])}
                if not is_written and not unfinished:
                    _require_intensities(lines.values())
                    fingerprint = merge(results, [lines[case] for case in cases], len(_channels(description)))
                    with results.journals.replacing(file) as temporary:
                        save_json({**fingerprint, **record}, str(temporary))
                    results.clear()
    if failures:
        raise UserError(f"{describe_failures(failures, len(cases))}; mend or remove them, then run the same command")
    if unfinished and not is_written:
        return (
            f"part {part_id} of {num_parts} is finished; {len(unfinished)} cases of other parts are not. The part that "
            "finishes last writes the fingerprint"
        )
    return f"{file}: {len(cases)} cases\nnext: nnUNetv2_plan_experiment -d {dataset}, or nnUNetv2_vf plan -d {dataset}"


def choose_cases(cases: Mapping[str, RawCase], sample: int | None, seed: int) -> dict[str, RawCase]:
    """Return all cases or a random sample of them, in nnU-Net's order.

    Raises:
        UserError: the sample is empty or larger than the dataset.
    """
    if sample is None:
        return dict(cases)
    if not 1 <= sample <= len(cases):
        raise UserError(f"--sample is {sample}; legal: 1 to {len(cases)}, the number of cases")
    chosen = set(random.Random(seed).sample(sorted(cases), sample))
    return {name: case for name, case in cases.items() if name in chosen}


def _describe_existing(file: Path, num_cases: int, record: Mapping[str, Any]) -> str:
    try:
        existing = load_json(str(file))
        existing_cases = len(existing["spacings"])
    except (ValueError, LookupError, TypeError) as error:  # a run was killed while it wrote the file
        raise UserError(f"{file} is damaged: {error}; make it again: --clean") from error
    is_the_same = existing_cases == num_cases and existing.get(_SAMPLE) == record.get(_SAMPLE)
    change = "" if is_the_same else f", made from {existing_cases} cases; this would be {num_cases}"
    return f"{file} exists already{change}; to make it again: --clean"


def _version(file: Path) -> tuple[int, int] | None:
    """Return a value that changes when the file is replaced; None if it does not exist."""
    if not file.is_file():
        return None
    status = file.stat()
    return status.st_ino, status.st_mtime_ns


def _choose_reader(description: Mapping[str, Any], case: RawCase) -> type:
    """Return the class that nnU-Net reads the dataset with. Without a name in ``dataset.json`` it tries a case."""
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # it prints a traceback for each reader that fails
            reader: type = determine_reader_writer_from_dataset_json(description, case.images[0], verbose=False)
    except RuntimeError as error:
        raise UserError(f"nnU-Net cannot read {case.images[0]}; mend or remove this case") from error
    return reader


def _intensities_per_case(name: str, num_cases: int) -> int:
    extractor = DatasetFingerprintExtractor(name)
    return int(extractor.num_foreground_voxels_for_intensitystats // num_cases)


def _analyze(task: _Task, cases: Sequence[RawCase], results: Results, processes: int) -> list[Failure]:
    """Analyze the cases that are not finished; return those that fail."""
    lines = results.read_lines()
    unfinished = [case for case in cases if case.name not in lines or _has_changed(case, lines[case.name])]
    failures: list[Failure] = []
    for _, result in work_on_cases(task.analyze, unfinished, len(cases), processes):
        if isinstance(result, Failure):
            failures.append(result)
        else:
            results.append(*result)
    return failures


def _has_changed(case: RawCase, line: Mapping[str, Any]) -> bool:
    try:
        return case.stamp() != str(line["stamp"])
    except OSError:  # the case will fail, with a better message
        return True


def merge(results: Results, lines: Sequence[Mapping[str, Any]], num_channels: int) -> dict[str, Any]:
    """Return the fingerprint, equal to nnU-Net's: the same operations on the same numbers in the same order."""
    return {
        "spacings": [line["spacing"] for line in lines],
        "shapes_after_crop": [line["shape"] for line in lines],
        "foreground_intensity_properties_per_channel": {
            channel: _describe_intensities(np.concatenate([results.read_intensities(line, channel) for line in lines]))
            for channel in range(num_channels)
        },
        "median_relative_size_after_cropping": float(np.median([line["relative_size"] for line in lines])),
    }


def _require_intensities(lines: Iterable[Mapping[str, Any]]) -> None:
    """Raise UserError if no case has a labelled voxel: nnU-Net's statistics are those of the foreground."""
    if not any(count for line in lines for _, count in line["arrays"]):
        raise UserError(
            "the labels of all cases are empty, so there are no intensities to analyze; import makes labels"
        )


def _describe_intensities(intensities: np.ndarray) -> dict[str, float]:
    """Return nnU-Net's statistics. Changes the order of the intensities."""
    mean, std = np.mean(intensities), np.std(intensities)  # first: their last digits depend on the order
    percentiles = (0.5, 50.0, 99.5)
    low, median, high = np.percentile(intensities, percentiles, overwrite_input=True)  # else it copies 400 MB
    return {
        "mean": float(mean),
        "median": float(median),
        "std": float(std),
        "min": float(np.min(intensities)),
        "max": float(np.max(intensities)),
        "percentile_99_5": float(high),
        "percentile_00_5": float(low),
    }


def _channels(description: Mapping[str, Any]) -> Mapping[str, str]:
    channels: Mapping[str, str] = description.get("channel_names") or description["modality"]
    return channels
