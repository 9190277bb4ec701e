"""Import one source: read its volumes, check them, find the body, write the files of the cases.

Each process of an import runs this code.
"""

from __future__ import annotations

import os

import numpy as np
import SimpleITK as sitk  # noqa: N813  the package's own convention

from nnunetv2_vf.importing.body_mask import find_body
from nnunetv2_vf.importing.case_files import CannotWriteError, CaseFiles
from nnunetv2_vf.importing.images import describe_error, image_on_grid
from nnunetv2_vf.importing.journal import ReportRow
from nnunetv2_vf.importing.readers import read_volumes
from nnunetv2_vf.importing.settings import ImportSettings
from nnunetv2_vf.importing.sources import Source, volume_ending
from nnunetv2_vf.importing.volumes import RejectedError, Volume, check_volume


def start_worker() -> None:
    """Set up a process of the import: one thread, and no output of the readers.

    The readers' warnings may quote a file's contents. Everything that matters is in the report.
    """
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)  # the import runs several processes already
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def import_source(case_files: CaseFiles, settings: ImportSettings, source: Source) -> list[ReportRow]:
    """Import all volumes of a source. Return a row of the report for each.

    Raises:
        CannotWriteError: the files of a case cannot be written.
    """
    rows = []
    try:
        for volume in read_volumes(source, settings.selection):
            row = ReportRow(source.key, volume.item)
            try:
                _import_volume(volume, row, case_files, settings)
            except RejectedError as rejection:
                row.reason = str(rejection)
            except CannotWriteError:
                raise
            except Exception as error:  # libraries raise anything for unusual images; go on with the next volume
                row.reason = describe_error(error)
            row.note = "; ".join(volume.notes)
            rows.append(row)
    except CannotWriteError:
        raise
    except Exception as error:  # readers raise anything for damaged files; the import goes on with the next source
        rows.append(ReportRow(source.key, reason=describe_error(error)))
    # All files of a DICOM folder may vanish after the search.
    return rows or [ReportRow(source.key, reason="unreadable: no DICOM file is left")]


def _import_volume(volume: Volume, row: ReportRow, case_files: CaseFiles, settings: ImportSettings) -> None:
    """Check a volume, find its body, write its files, and fill in its row.

    Raises:
        RejectedError: the volume is not fit for training.
    """
    if volume.rejection:
        raise RejectedError(volume.rejection)
    if len(volume.images) != case_files.num_channels:
        raise RejectedError(f"channels: {len(volume.images)} of {case_files.num_channels}")
    row.shape = "x".join(map(str, volume.images[0].GetSize()[::-1]))
    row.spacing_mm = "x".join(f"{mm:.4g}" for mm in volume.images[0].GetSpacing()[::-1])
    facts = check_volume(volume, settings.selection)
    row.minimum, row.maximum, row.hash = facts.minimum, facts.maximum, facts.content_hash
    row.hu_like = " ".join("yes" if hu_like else "no" for hu_like in facts.hu_like)
    row.linked = settings.link and _can_be_linked(volume, settings.file_ending)
    array = sitk.GetArrayViewFromImage(volume.images[0])
    if settings.mask:
        mask, mask_note = find_body(array, facts.hu_like[0])
    else:
        mask, mask_note = np.ones(array.shape, dtype=np.uint8), ""
    if mask_note:
        volume.notes.append(mask_note)
    label = image_on_grid(mask, volume.images[0])
    case_files.write(volume.case, volume.images, label, link_targets=volume.files if row.linked else ())
    row.case = volume.case


def _can_be_linked(volume: Volume, file_ending: str) -> bool:
    """True if the volume's files hold only this volume, need no repair, and have the dataset's ending."""
    if not volume.files or volume.notes:
        return False
    return all(volume_ending(file) == file_ending for file in volume.files)
