"""Merge the records of all parts: write the report, ``dataset.json`` and the picture, and print the summary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from nnunetv2.paths import nnUNet_preprocessed

from nnunetv2_vf.errors import UserError
from nnunetv2_vf.importing.channels import decide_channel_names
from nnunetv2_vf.importing.description import DESCRIPTION, make_description
from nnunetv2_vf.importing.images import error_line
from nnunetv2_vf.importing.job import ImportJob
from nnunetv2_vf.importing.journal import ReportRow
from nnunetv2_vf.importing.picture import draw_bodies
from nnunetv2_vf.importing.report import REFUSED_REPORT, REPORT, count_rejections, summarize, write_report
from nnunetv2_vf.importing.state import ImportState
from nnunetv2_vf.nnunet_folders import describe_left_out_cases

PICTURE = "import_preview.png"
_MAX_DRAWN_CASES = 6


def merge_if_finished(job: ImportJob) -> int:
    """Merge if all sources of all parts are finished. Return the number of unfinished sources.

    Raises:
        UserError: no volume was accepted, or the channel names cannot be decided.
    """
    state = job.read_state()
    num_unfinished = len(state.unfinished(job.sources, job.settings.digest))
    if not num_unfinished:
        _merge(job, state)
    return num_unfinished


def _merge(job: ImportJob, state: ImportState) -> None:
    """Make the dataset from the accepted volumes. If that is refused, an existing dataset stays as it is."""
    rows = _report_rows(job, state)
    accepted = [row for row in rows if row.case]
    cases = [row.case for row in accepted]
    try:
        channel_names = _decide_channel_names(job, rows, accepted)
    except UserError as error:
        name = REFUSED_REPORT if state.dataset_cases else REPORT
        with job.journal.replacing(job.folder / name) as temporary:
            write_report(rows, temporary)
        raise UserError(f"{error}; the reason for each volume is in {job.folder / name}") from None
    with job.journal.replacing(job.folder / REPORT) as temporary:
        write_report(rows, temporary)
    (job.folder / REFUSED_REPORT).unlink(missing_ok=True)
    job.journal.write_merged(state.records.keys())
    hashes = {row.case: row.hash for row in accepted}
    _write_description(job, make_description(hashes, channel_names, job.case_files, job.settings, job.channel))
    job.case_files.remove_other_cases(cases)
    job.journal.remove_leftover_scratch_folders()
    picture = _draw_picture(job, cases)
    summary = summarize(job.folder.name, rows, channel_names, job.channel, job.found)
    report = f"  the result for every volume: {job.folder / REPORT}"
    print("\n".join([*summary, report, picture, *_next_steps(job.folder, cases)]))


def _report_rows(job: ImportJob, state: ImportState) -> list[ReportRow]:
    """Return the rows of all sources.

    A volume whose files are no longer in the dataset is rejected. One whose source cannot be listed now gets a note.
    """
    unlisted = {source.key: source.rejection for source in job.sources if not source.stamp}

    def update(row: ReportRow) -> ReportRow:
        if row.case and row.case not in state.complete_cases:
            missing = "missing: its files are no longer in the dataset; if it still exists, import it again"
            return replace(row, case="", reason=missing)
        if row.case and row.source in unlisted:
            kept = f"kept: the source cannot be read now ({unlisted[row.source]})"
            return replace(row, note="; ".join(filter(None, [row.note, kept])))
        return row

    return [update(row) for rows in state.rows.values() for row in rows]


def _decide_channel_names(job: ImportJob, rows: Sequence[ReportRow], accepted: Sequence[ReportRow]) -> list[str]:
    if not accepted:
        raise UserError(f"none of {len(rows)} volumes can be used: {count_rejections(rows)}")
    return decide_channel_names(job.channel, accepted, job.case_files.num_channels)


def _write_description(job: ImportJob, text: str) -> None:
    path = job.folder / DESCRIPTION
    if path.is_file() and path.read_text() == text:
        return  # the file's time tells whether nnU-Net's fingerprint is older than the dataset
    with job.journal.replacing(path) as temporary:
        temporary.write_text(text)


def _draw_picture(job: ImportJob, cases: Sequence[str]) -> str:
    """Draw some cases; return a line for the summary."""
    chosen = sorted({*np.linspace(0, len(cases) - 1, _MAX_DRAWN_CASES).round().astype(int)})
    files = job.case_files
    drawn = [
        (case, files.images_folder / files.image_names(case)[0], files.labels_folder / files.label_name(case))
        for case in (cases[number] for number in chosen)
    ]
    try:
        with job.journal.replacing(job.folder / PICTURE) as temporary:
            draw_bodies(drawn, temporary)
    except RuntimeError as error:
        return f"  no picture: {error_line(error)}"
    return f"  some of the volumes, with the body outlined: {job.folder / PICTURE}"


def _next_steps(folder: Path, cases: Sequence[str]) -> list[str]:
    """Return the lines that name the commands to run next."""
    lines = []
    clean = ""
    fingerprint = Path(nnUNet_preprocessed or "") / folder.name / "dataset_fingerprint.json"
    if fingerprint.is_file() and fingerprint.stat().st_mtime < (folder / DESCRIPTION).stat().st_mtime:
        clean = " --clean"
        lines.append(
            "  nnUNet_preprocessed has the fingerprint of an older version of this dataset; --clean computes it again"
        )
    try:
        left_out = describe_left_out_cases(folder.name, cases)
    except UserError as error:  # the import itself is finished
        left_out = str(error)
    lines += [f"  {left_out}"] if left_out else []
    dataset_id = int(folder.name.removeprefix("Dataset")[:3])
    again = f"nnUNetv2_extract_fingerprint -d {dataset_id}{clean}; " if clean else ""
    lines += [
        f"next: nnUNetv2_plan_and_preprocess -d {dataset_id} -c 3d_fullres{clean}",
        f"  or, for PCT-Net: {again}nnUNetv2_vf plan -d {dataset_id} (for FMUNet: --network FMUNet)",
    ]
    if clean:
        lines.append(f"  or, to keep the plans: nnUNetv2_vf preprocess -d {dataset_id} -plans_name PLANS -c 3d_fullres")
    return lines
