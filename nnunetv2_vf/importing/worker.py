"""What each process of an import does with a source: read it, judge it, put its cases into the dataset."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import SimpleITK as sitk  # noqa: N813  its own convention

from nnunetv2_vf.errors import UserError
from nnunetv2_vf.importing.body_mask import body_mask, segmentation_note
from nnunetv2_vf.importing.journal import Row
from nnunetv2_vf.importing.readers import read_volumes
from nnunetv2_vf.importing.sources import Source, ending
from nnunetv2_vf.importing.volumes import NIFTI_IO, Rejected, Selection, Volume, examine, on_grid_of, one_line

FILE_ENDINGS = (".nii.gz", ".nii", ".nrrd", ".mha")  # that nnU-Net reads


class CannotWriteError(Exception):
    """A file of the dataset could not be written."""


@dataclass(frozen=True)
class ImportSettings:
    """What decides about a case and its files; a source that was imported with other settings is imported again.

    Attributes:
        selection: which volumes are fit.
        mask: label 1 is the body; else all of the volume.
        link: link to files that nnU-Net reads as they are, instead of copying them.
        file_ending: of the dataset's files.

    Raises:
        UserError: nnU-Net does not read such files.
    """

    selection: Selection = field(default_factory=Selection)
    mask: bool = True
    link: bool = False
    file_ending: str = ".nii.gz"

    def __post_init__(self) -> None:
        if self.file_ending not in FILE_ENDINGS:
            raise UserError(f"--file-ending is {self.file_ending!r}; nnU-Net reads {', '.join(FILE_ENDINGS)}")

    @property
    def digest(self) -> str:
        """For the journal: whether a source was imported with these settings."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]


def start_worker() -> None:
    """What each process does first."""
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)  # as many workers as cores
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    # the readers' own complaints, some with a file's contents; what matters of them is in the report
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def import_source(folder: Path, scratch: Path, settings: ImportSettings, channels: int, source: Source) -> list[Row]:
    """Import all volumes of a source; a row of the report for each.

    Args:
        folder: of the dataset.
        scratch: where files are written before they are renamed; on the same disk.
        channels: that every volume must have.

    Raises:
        CannotWriteError: the disk is full, or something like it.
    """
    rows = []
    try:
        for volume in read_volumes(source, settings.selection):
            row = Row(source.key, volume.item)
            try:
                if not volume.problem and len(volume.images) != channels:
                    raise Rejected(f"channels: {len(volume.images)} of {channels}")
                _import_volume(volume, row, folder, scratch, settings)
            except Rejected as reason:
                row.reason = str(reason)
            row.note = "; ".join(volume.notes)
            rows.append(row)
    except CannotWriteError:
        raise
    except Exception as error:  # whatever a reader makes of a damaged file: the next one is to be imported all the same
        rows.append(Row(source.key, reason=f"error: {type(error).__name__}: {one_line(error)}"))
    return rows


def _import_volume(volume: Volume, row: Row, folder: Path, scratch: Path, settings: ImportSettings) -> None:
    """Judge a volume, find its body, and put its files in place."""
    if volume.problem:
        raise Rejected(volume.problem)
    row.shape = "x".join(map(str, volume.images[0].GetSize()[::-1]))
    row.spacing_mm = "x".join(f"{mm:.4g}" for mm in volume.images[0].GetSpacing()[::-1])
    facts = examine(volume, settings.selection)
    row.minimum, row.maximum, row.hash = facts.minimum, facts.maximum, facts.digest
    row.hu_like = " ".join("yes" if yes else "no" for yes in facts.hu_like)
    array = sitk.GetArrayViewFromImage(volume.images[0])
    row.linked = (
        settings.link and not volume.notes and all(ending(f) == settings.file_ending for f in volume.files or "-")
    )
    mask, note = body_mask(array, facts.hu_like[0]) if settings.mask else (np.ones(array.shape, dtype=np.uint8), "")
    volume.notes += filter(None, [note, segmentation_note(array)])
    try:
        _put_in_place(volume, on_grid_of(volume.images[0], mask), row.linked, folder, scratch, settings.file_ending)
    except OSError as error:
        raise CannotWriteError(error.strerror) from error
    row.case = volume.case


def _put_in_place(volume: Volume, label: sitk.Image, link: bool, folder: Path, scratch: Path, file_ending: str) -> None:
    """Write elsewhere, then rename; the label first, so that a case whose images are there is complete."""
    name = f"{volume.case}{file_ending}"
    _write(label, scratch / name)
    (scratch / name).replace(folder / "labelsTr" / name)
    for channel, image in enumerate(volume.images):
        name = f"{volume.case}_{channel:04d}{file_ending}"
        if link:
            (scratch / name).symlink_to(volume.files[channel])
        else:
            _write(image, scratch / name)
        (scratch / name).replace(folder / "imagesTr" / name)


def _write(image: sitk.Image, path: Path) -> None:
    try:
        image_io = NIFTI_IO if ".nii" in path.suffixes else ""
        sitk.WriteImage(image, str(path), useCompression=True, imageIO=image_io)
    except RuntimeError as error:
        raise CannotWriteError(one_line(error)) from error
    if not _is_complete(path, image):
        raise CannotWriteError("a file ended early; is the disk full?")


def _is_complete(path: Path, image: sitk.Image) -> bool:
    """Whether all of an image is in its file: ITK writes NIfTI on a full disk without a word, others it does not."""
    needed = 352 + image.GetNumberOfPixels() * image.GetSizeOfPixelComponent()  # header, voxels
    if path.name.endswith(".nii"):
        return path.stat().st_size >= needed
    if path.name.endswith(".nii.gz"):  # which ends with the length of what it holds
        with path.open("rb") as file:
            file.seek(-min(4, path.stat().st_size), os.SEEK_END)
            return int.from_bytes(file.read(), "little") == needed % 2**32
    return True
