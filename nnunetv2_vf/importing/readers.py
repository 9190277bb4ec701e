"""Read all volumes of a source: NRRD and MetaImage here, NIfTI and Analyze in :mod:`.nifti`, DICOM in :mod:`.dicom`.

SimpleITK reads the images. The checks find what SimpleITK does not report: for example, it takes a missing spacing for
1 mm.
"""

from __future__ import annotations

import os
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
from nnunetv2_vf.importing.volumes import RejectedError, Volume, require_spacing

_FORMAT_ERRORS = (
    *(OSError, EOFError, zlib.error),
    *(HeaderDataError, ImageFileError, WrapStructError),
)
_KINDS_OF_ITK_ERRORS = {"Refusing to change spacing": "spacing", "Refusing to change direction": "direction"}
_NIFTI_ENDINGS = (".nii", ".nii.gz", ".hdr", ".hdr.gz")
_NRRD_ENDINGS = (".nrrd", ".nhdr")
_NRRD_SPACING = re.compile(rb"^(?:spacings|space directions):(.*)$", re.MULTILINE)
_METAIMAGE_SPACING = re.compile(rb"^\s*Element(?:Spacing|Size)\s*=(.*)$", re.MULTILINE)
_METAIMAGE_COMPRESSED = re.compile(rb"^\s*CompressedData\s*=\s*[Tt1]", re.MULTILINE)
_METAIMAGE_DATA = re.compile(rb"^[ \t]*ElementDataFile[ \t]*=[ \t]*(\S+)[ \t]*\r?\n", re.MULTILINE)


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
    ending = volume_ending(path)
    try:
        if ending in _NIFTI_ENDINGS:
            return read_nifti(path, selection, notes)
        if ending in _NRRD_ENDINGS:
            return _read_nrrd(path)
        if ending:
            return _read_metaimage(path)
        check_dicom_header(path)
        check_frames(path, selection, notes)
        return sitk.ReadImage(path)
    except _FORMAT_ERRORS as error:
        raise RejectedError(f"unreadable: {error_line(error)}") from error
    except RuntimeError as error:
        kinds = [kind for message, kind in _KINDS_OF_ITK_ERRORS.items() if message in str(error)]
        kind = kinds[0] if kinds else "unreadable"
        raise RejectedError(f"{kind}: {error_line(error)}") from error


def _read_nrrd(path: str) -> sitk.Image:
    _check_spacing(_read_header(path), _NRRD_SPACING)
    return sitk.ReadImage(path)


def _read_metaimage(path: str) -> sitk.Image:
    header = _read_header(path)
    _check_spacing(header, _METAIMAGE_SPACING)
    image = sitk.ReadImage(path)
    _check_compressed_voxels(path, header, image)
    return image


def _read_header(path: str) -> bytes:
    """Return the beginning of a file, which holds its text header."""
    with Path(path).open("rb") as file:
        return file.read(1 << 14)


def _check_spacing(header: bytes, spacing_field: re.Pattern[bytes]) -> None:
    """Raise RejectedError if a header has no spacing, which SimpleITK takes for 1 mm, or one that is not positive."""
    if not header:
        return  # SimpleITK reports an empty file
    match = spacing_field.search(header)
    spacing = match[1].decode(errors="replace").strip() if match else ""
    is_matrix = "(" in spacing  # NRRD's space directions
    if not is_matrix:
        require_spacing(spacing)
    elif not any(digit in spacing for digit in "123456789"):
        raise RejectedError(f"spacing: the file states {spacing}")


def _check_compressed_voxels(path: str, header: bytes, image: sitk.Image) -> None:
    """Decompress the voxels of a MetaImage to their checksum: SimpleITK only prints a message if they are damaged.

    Raises:
        zlib.error, RejectedError: the voxels are damaged or incomplete.
    """
    data_file = _METAIMAGE_DATA.search(header)
    if not data_file or data_file[1] == b"LIST" or not _METAIMAGE_COMPRESSED.search(header):
        return  # LIST: a file for each slice
    is_local = data_file[1].upper() == b"LOCAL"
    voxels = Path(path) if is_local else Path(path).parent / os.fsdecode(data_file[1])
    decompressor = zlib.decompressobj(wbits=47)  # 47: zlib or gzip
    num_bytes = 0
    with voxels.open("rb") as file:
        file.seek(data_file.end() if is_local else 0)
        while not decompressor.eof and (block := decompressor.unconsumed_tail or file.read(1 << 20)):
            num_bytes += len(decompressor.decompress(block, max_length=1 << 24))
    num_bytes += len(decompressor.flush())  # may be left if the last block has reached max_length
    components = image.GetNumberOfComponentsPerPixel() * image.GetSizeOfPixelComponent()
    if not decompressor.eof or num_bytes != image.GetNumberOfPixels() * components:
        raise RejectedError("unreadable: too short or damaged")
