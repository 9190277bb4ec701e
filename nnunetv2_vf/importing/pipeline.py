"""``nnUNetv2_vf import``: make an nnU-Net raw dataset from unlabelled volumes."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw, nnUNet_results
from tqdm import tqdm

from nnunetv2_vf.errors import UserError
from nnunetv2_vf.importing.case_files import CannotWriteError
from nnunetv2_vf.importing.description import DESCRIPTION
from nnunetv2_vf.importing.job import ImportJob, prepare_job
from nnunetv2_vf.importing.journal import JOURNAL_FOLDER, ReportRow, SourceRecord
from nnunetv2_vf.importing.merge import merge_if_finished
from nnunetv2_vf.importing.report import describe_left_out
from nnunetv2_vf.importing.search import find_sources
from nnunetv2_vf.importing.settings import ImportSettings
from nnunetv2_vf.importing.sources import Source, is_in_part
from nnunetv2_vf.importing.worker import import_source, start_worker
from nnunetv2_vf.nnunet_folders import require_variables
from nnunetv2_vf.parts import check_parts, part_name
from nnunetv2_vf.process_pool import run_in_processes

# A source that was rejected for one of these reasons is tried again: the next attempt may succeed on the same file.
# The number of channels that is expected depends on the other sources.
_RETRIED_KINDS = ("unreadable", "memory", "error", "channels")


def import_volumes(
    dataset_id: int,
    name: str,
    paths: Sequence[Path],
    settings: ImportSettings,
    channel: str,
    select: Sequence[str],
    processes: int,
    num_parts: int,
    part_id: int,
) -> None:
    """Make ``nnUNet_raw/DatasetXXX_NAME`` from unlabelled volumes, add to it, or continue an interrupted import.

    Args:
        paths: folders, which are searched recursively, and files.
        channel: name of the channel, or of several channels separated by commas. ``auto`` names a channel CT if its
            intensities look like Hounsfield units (HU), else MR.
        select: if not empty, only volumes with one of these patterns in their path are imported.
        processes: number of processes, each of which holds one source in memory.
        num_parts, part_id: import only this part of the sources, to share the work among machines with a common file
            system. The part that finishes last merges all parts.

    Raises:
        UserError: a value is not legal, no volume can be used, or ``auto`` finds both HU-like and other volumes.
    """
    check_parts(num_parts, part_id, processes)
    folder = _choose_dataset_folder(dataset_id, name)
    try:
        found = find_sources(paths, folder, select, keep_labels="labels" in settings.selection.keep)
        job = prepare_job(folder, found, settings, channel, part_name(num_parts, part_id))
        _print_start(job)
        with job.journal.lock_part():
            _import_sources(
                job, [source for source in found.sources if is_in_part(source, part_id, num_parts)], processes
            )
            with job.journal.lock_merge():
                num_unfinished = merge_if_finished(job)
    except (OSError, CannotWriteError) as error:
        action = "write to" if isinstance(error, CannotWriteError) else "read or write"
        raise UserError(
            f"cannot {action} {folder}: {error}; fix this, then run the same command to continue"
        ) from error
    except KeyboardInterrupt:
        raise UserError("interrupted; run the same command to continue") from None
    if num_unfinished and num_parts == 1:
        print(f"{num_unfinished} sources are not finished: another command changed them; run the same command again")
    elif num_unfinished:
        print(
            f"part {part_id} of {num_parts} is finished; {num_unfinished} sources of other parts are not. The part "
            "that finishes last writes dataset.json. The same command without --num_parts imports the remaining "
            "sources and writes dataset.json"
        )


def _choose_dataset_folder(dataset_id: int, name: str) -> Path:
    """Return the dataset's folder in ``nnUNet_raw``.

    Raises:
        UserError: the id or the name is not legal, or another dataset has the id or the folder.
    """
    require_variables(nnUNet_raw)
    if not 1 <= dataset_id <= 999:
        raise UserError(f"-d is {dataset_id}; dataset ids are 1 to 999")
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise UserError(f"-n is {name!r}; use letters, digits, _ and - only")
    folder = Path(nnUNet_raw).absolute() / f"Dataset{dataset_id:03d}_{name}"
    for parent in map(Path, filter(None, (nnUNet_raw, nnUNet_preprocessed, nnUNet_results))):
        for other in parent.glob(f"Dataset{dataset_id:03d}*"):
            if other.is_dir() and other.name != folder.name:
                is_unfinished = (other / JOURNAL_FOLDER).exists() and not (other / DESCRIPTION).exists()
                hint = " (an unfinished import; delete it if you do not need it)" if is_unfinished else ""
                other_name = other.name.partition("_")[2]
                raise UserError(
                    f"id {dataset_id} belongs to {other}{hint}; to add to it: -n {other_name}; else choose another -d"
                )
    if folder.exists() and any(folder.iterdir()) and not (folder / JOURNAL_FOLDER).is_dir():
        raise UserError(f"{folder} was not made by import, or its {JOURNAL_FOLDER} is gone; give another -d and -n")
    return folder


def _print_start(job: ImportJob) -> None:
    num_channels = job.case_files.num_channels
    channels = [f"each case has {num_channels} channels"] if num_channels > 1 else []
    print("; ".join([f"{job.folder.name}: {len(job.sources)} sources", *channels, *describe_left_out(job.found)]))
    settings = asdict(job.settings)
    values = {"channel": job.channel, **settings.pop("selection"), **settings}
    print("settings: " + ", ".join(f"{key} {value}" for key, value in values.items()), flush=True)


def _import_sources(job: ImportJob, sources: Sequence[Source], processes: int) -> None:
    """Import the unfinished ones of the sources.

    Raises:
        CannotWriteError, OSError: files cannot be written.
    """
    scratch = job.case_files.scratch_folder
    unfinished = job.find_unfinished(sources, _RETRIED_KINDS)
    progress = tqdm(total=len(sources), initial=len(sources) - len(unfinished), unit="vol", smoothing=0.05)
    shutil.rmtree(scratch, ignore_errors=True)  # a killed run may have left it
    scratch.mkdir()
    try:
        _import_in_processes(job, unfinished, processes, progress)
        # If a source has changed, volumes that were rejected as its duplicates may be accepted now: import them again.
        again = job.find_unfinished(sources)
        progress.total += len(again)
        _import_in_processes(job, again, processes, progress)
    finally:
        progress.close()
        shutil.rmtree(scratch, ignore_errors=True)


def _import_in_processes(job: ImportJob, sources: Sequence[Source], processes: int, progress: tqdm) -> None:
    """Import sources in a pool of processes, and append a record to the journal when a source is finished."""
    import_one = partial(import_source, job.case_files, job.settings)
    digest, keep_duplicates = job.settings.digest, "duplicates" in job.settings.selection.keep
    counts: Counter[str] = Counter()
    for source, result in run_in_processes(import_one, sources, processes, start_worker, import_source.__module__):
        killed = ReportRow(
            source.key, reason="memory: the process that read it died twice; it may be too large or damaged"
        )
        rows = [killed] if result is None else result
        job.journal.append(SourceRecord(source.key, source.stamp, digest, rows, keep_duplicates))
        counts.update(row.kind or "accepted" for row in rows)
        progress.total += len(rows) - 1
        progress.set_postfix(counts, refresh=False)
        progress.update(len(rows))
