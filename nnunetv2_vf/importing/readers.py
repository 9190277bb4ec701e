"""Read all volumes of a source: NRRD and MetaImage here, NIfTI and Analyze in :mod:`.nifti`, DICOM in :mod:`.dicom`.

SimpleITK reads the images. The checks find what SimpleITK does not report: for example, it takes a missing spacing for
1 mm.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from pathlib import Path

import SimpleITK as sitk  # noqa: N813  the package's own convention
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from nibabel.wrapstruct import WrapStructError

from nnunetv2_vf.importing.dicom import check_dicom_header, check_frames, read_dicom_folder
from nnunetv2_vf.importing.images import error_line
from nnunetv2_vf.importing.nifti import read_nifti
from nnunetv2_vf.importing.settings import Selection
from nnunetv2_vf.importing.sources import Source, case_name, volume_ending
from nnunetv2_vf.importing.volumes import RejectedError, Volume

_FORMAT_ERRORS = (
    *(OSError, EOFError, zlib.error),
    *(HeaderDataError, ImageFileError, WrapStructError),
)
_NIFTI_ENDINGS = (".nii", ".nii.gz", ".hdr", ".hdr.gz")
_NRRD_SPACING = re.compile(rb"^(?:spacings|space directions):(.*)$", re.MULTILINE)
_METAIMAGE_SPACING = re.compile(rb"^\s*Element(?:Spacing|Size)\s*=(.*)$", re.MULTILINE)


def read_volumes(source: Source, selection: Selection) -> Iterator[Volume]:
    """Yield the volumes of a source one by one. A volume that cannot be read is yielded with a rejection."""
    if source.rejection:
        yield Volume(case_name(source.stem, source.key), rejection=source.rejection)
    elif Path(source.key).is_dir():
        yield from read_dicom_folder(source.key, selection)
    else:
        yield from _read_files(source, selection)


def _read_files(source: Source, selection: Selection) -> Iterator[Volume]:
    # The name of a DICOM file may identify the patient, so it does not become part of the case name.
    case = case_name(source.stem if volume_ending(source.key) else "dicom", source.key)
    notes: list[str] = []
    try:
        images = [_read_file(path, selection, notes) for path in source.paths]
        if images[0].GetDimension() > 4:
            raise RejectedError(f"vector: {images[0].GetDimension()} axes; needs 3, or 4 for several volumes")
        frames = images[0].GetSize()[3] if images[0].GetDimension() == 4 else 1
        if frames > 1 and (len(images) > 1 or not selection.split_4d):
            raise RejectedError(f"4D: {frames} volumes in one file")
    except RejectedError as rejection:
        yield Volume(case, rejection=str(rejection))
        return
    if images[0].GetDimension() < 4:
        yield Volume(case, images=images, notes=notes, files=source.paths)
    elif frames == 1:
        yield Volume(case, images=[image[:, :, :, 0] for image in images], notes=notes)
    else:
        for frame in range(frames):
            item = f"volume {frame + 1} of {frames}"
            yield Volume(f"{case}_v{frame:03d}", item, [images[0][:, :, :, frame]], notes=[*notes])


def _read_file(path: str, selection: Selection, notes: list[str]) -> sitk.Image:
    try:
        ending = volume_ending(path)
        if ending in _NIFTI_ENDINGS:
            return read_nifti(path, selection, notes)
        if ending:
            _check_text_header(path, _NRRD_SPACING if ending in (".nrrd", ".nhdr") else _METAIMAGE_SPACING)
        else:
            check_dicom_header(path)
            check_frames(path, selection, notes)
        return sitk.ReadImage(path)
    except _FORMAT_ERRORS as error:
        raise RejectedError(f"unreadable: {error_line(error)}") from error
    except RuntimeError as error:
        kind = "spacing" if "Refusing to change spacing" in str(error) else "unreadable"
        raise RejectedError(f"{kind}: {error_line(error)}") from error


def _check_text_header(path: str, spacing_field: re.Pattern[bytes]) -> None:
    """Raise RejectedError if a header has no spacing, which SimpleITK takes for 1 mm, or one that is not positive."""
    with Path(path).open("rb") as file:
        header = file.read(1 << 14)
    if not header:
        return  # SimpleITK reports an empty file
    match = spacing_field.search(header)
    spacing = match[1].decode(errors="replace").strip() if match else ""
    if not any(digit in spacing for digit in "123456789"):
        raise RejectedError(f"spacing: the file states {spacing or 'none'}")
    is_matrix = "(" in spacing  # NRRD's space directions
    if not is_matrix and not _all_positive(spacing):
        raise RejectedError(f"spacing: {spacing} mm")


def _all_positive(numbers: str) -> bool:
    try:
        return all(float(number) > 0 for number in numbers.split())
    except ValueError:
        return False
