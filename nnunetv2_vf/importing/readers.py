"""One source of unlabelled data, volume by volume, from whatever format.

Reading is SimpleITK's, with what it lets pass checked beside it: it fills a truncated NIfTI with zeros and takes a
missing spacing for 1 mm.
"""

from __future__ import annotations

import gzip
import math
import os
import re
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from io import BufferedReader
from pathlib import Path

import nibabel
import numpy as np
import SimpleITK as sitk  # noqa: N813  its own convention
from nibabel.spatialimages import HeaderDataError
from nibabel.wrapstruct import WrapStructError

from nnunetv2_vf.importing.sources import Source, case_name, ending, is_dicom, may_be_dicom
from nnunetv2_vf.importing.volumes import (
    NIFTI_IO,
    Rejected,
    Selection,
    Volume,
    accept_direction,
    on_grid_of,
    one_line,
    orthonormal,
)

# DICOM: modalities that are no scans of a volume; classes of files that state the spacing for each frame; tags
_NO_SCANS = {"SEG", "RTDOSE", "RTIMAGE", "RTSTRUCT", "RTPLAN", "SR", "PR", "KO", "REG", "DOC"}
_NO_SCANS |= {"US", "IVUS", "XA", "RF", "MG", "CR", "DX", "IO", "PX", "ES", "GM", "SM", "OP", "OCT", "XC", "ECG"}
_ENHANCED = {f"1.2.840.10008.5.1.4.1.1.{end}" for end in ("2.1", "2.2", "4.1", "4.4", "130", "128.1")}
_SOP_CLASS, _MODALITY, _POSITION = "0008|0016", "0008|0060", "0020|0032"
_PIXEL_SPACING, _RESCALE = "0028|0030", ("0028|1052", "0028|1053")
_UNEVEN = 0.1  # of the distance between slices: differ by more, and one is missing; by less, it is rounding
_PERMISSIVE = "ITK_NIFTI_SFORM_PERMISSIVE"


def read_volumes(source: Source, selection: Selection) -> Iterator[Volume]:
    """Read a source's volumes one after the other; what cannot be read comes as a problem, never as an exception."""
    if source.problem:
        yield Volume(case_name(source.stem, source.key), problem=source.problem)
    elif Path(source.key).is_dir():
        yield from _dicom_series(source, selection)
    else:
        yield from _volumes_of_files(source, selection)


# ---------------------------------------------------------------- files


def _volumes_of_files(source: Source, selection: Selection) -> Iterator[Volume]:
    dicom = not ending(source.key) and is_dicom(source.key)  # whose file name may be an identifier
    case = case_name("dicom" if dicom else source.stem, source.key)
    notes: list[str] = []
    try:
        images = [_read_file(path, selection, notes) for path in source.paths]
        frames = images[0].GetSize()[3] if images[0].GetDimension() == 4 else 1
        if frames > 1 and (len(images) > 1 or not selection.split_4d):
            raise Rejected(f"4D: {frames} volumes in one file")
    except Rejected as reason:
        yield Volume(case, problem=str(reason))
        return
    if images[0].GetDimension() < 4:
        yield Volume(case, "", images, notes=notes, files=source.paths)
    elif frames == 1:
        yield Volume(case, "", [image[:, :, :, 0] for image in images], notes=notes)
    else:
        for frame in range(frames):
            item = f"volume {frame + 1} of {frames}"
            yield Volume(f"{case}_v{frame:03d}", item, [images[0][:, :, :, frame]], notes=[*notes])


def _read_file(path: str, selection: Selection, notes: list[str]) -> sitk.Image:
    try:
        if ending(path) in (".nii", ".nii.gz"):
            return _read_nifti(path, selection, notes)
        check = _check_text_header if ending(path) else _check_dicom
        check(path)
        return sitk.ReadImage(path)
    except (OSError, EOFError, zlib.error, HeaderDataError, WrapStructError) as error:
        raise Rejected(f"unreadable: {one_line(error)}") from error
    except RuntimeError as error:
        kind = "spacing" if "Refusing to change spacing" in str(error) else "unreadable"
        raise Rejected(f"{kind}: {one_line(error)}") from error


def _read_nifti(path: str, selection: Selection, notes: list[str]) -> sitk.Image:
    """Read a NIfTI, and find what SimpleITK passes over: damage, spacings that are not positive, NaN (made 0)."""
    header = _nifti_header(path)
    spacing = header["pixdim"][1:4]
    if not np.all(np.isfinite(spacing) & (spacing > 0)):
        raise Rejected(f"spacing: {' x '.join(f'{mm:g}' for mm in spacing[::-1])} mm")
    try:
        image = sitk.ReadImage(path, imageIO=NIFTI_IO)
    except RuntimeError as error:
        if "orthonormal" not in str(error):
            raise
        image = _read_skewed(path, header, selection, notes)
    has_nonfinite = not _is_all_of(path, header, image) and _check_nifti_data(path, header)
    if not has_nonfinite:
        return image
    array = sitk.GetArrayViewFromImage(image)
    finite = np.isfinite(nibabel.load(path).dataobj).T.reshape(array.shape)
    return on_grid_of(image, np.where(finite, array, np.nan))


def _unpacked(path: str) -> gzip.GzipFile | BufferedReader:
    return gzip.open(path) if path.lower().endswith(".gz") else Path(path).open("rb")


def _nifti_header(path: str) -> nibabel.Nifti1Header:
    with _unpacked(path) as file:
        size = file.read(4)
        if 540 in (int.from_bytes(size, "little"), int.from_bytes(size, "big")):
            raise Rejected("unreadable: NIfTI-2, which SimpleITK does not read")
        file.seek(0)
        return nibabel.Nifti1Header.from_fileobj(file, check=False)


def _is_all_of(path: str, header: nibabel.Nifti1Header, image: sitk.Image) -> bool:
    """Whether the checksum at the end of a compressed NIfTI is that of its header and just these voxels.

    If so, the file is whole and SimpleITK changed nothing. If not, the voxels may be scaled or swapped in the file, or
    something is wrong: then all of it must be unpacked once more to know, which takes a sixth of the time of a volume.
    """
    if not path.lower().endswith(".gz"):
        return False
    with _unpacked(path) as file:
        before = file.read(int(header["vox_offset"]))
    with Path(path).open("rb") as packed:
        packed.seek(-8, os.SEEK_END)
        stated = int.from_bytes(packed.read(4), "little")
    return zlib.crc32(sitk.GetArrayViewFromImage(image), zlib.crc32(before)) == stated


def _check_nifti_data(path: str, header: nibabel.Nifti1Header) -> bool:
    """Read all of the data, which also checks a compressed file's checksum, and say whether some is not finite.

    Raises:
        Rejected: there is less than the header says.
        EOFError, zlib.error, OSError: the file is damaged.
    """
    dtype, dimensions = header.get_data_dtype(), int(header["dim"][0])
    needed = math.prod(map(int, header["dim"][1 : dimensions + 1])) * dtype.itemsize
    length, has_nonfinite = 0, False
    with _unpacked(path) as file:
        file.seek(int(header["vox_offset"]))
        for block in iter(lambda: file.read(1 << 20), b""):
            length += len(block)
            if dtype.kind == "f" and not has_nonfinite:
                whole = len(block) // dtype.itemsize
                has_nonfinite = not np.isfinite(np.frombuffer(block, dtype, count=whole)).all()
    if length < needed:
        raise Rejected(f"unreadable: truncated, {length} of {needed} bytes of voxels")
    return has_nonfinite


def _read_skewed(path: str, header: nibabel.Nifti1Header, selection: Selection, notes: list[str]) -> sitk.Image:
    """Read a NIfTI whose only matrix is not orthonormal, which ITK refuses unless told otherwise."""
    matrix = header.get_sform()[:3, :3]
    _, off = orthonormal(matrix / np.linalg.norm(matrix, axis=0))
    accept_direction(off, selection, notes)
    os.environ[_PERMISSIVE] = "1"
    try:
        return sitk.ReadImage(path)
    finally:
        del os.environ[_PERMISSIVE]


_SPACING_FIELD = {
    ".nrrd": re.compile(rb"^(?:spacings|space directions):(.*)$", re.MULTILINE),
    ".mha": re.compile(rb"^\s*Element(?:Spacing|Size)\s*=(.*)$", re.MULTILINE),
}


def _check_text_header(path: str) -> None:
    """Find a spacing that SimpleITK would take for 1 mm, or for positive."""
    with Path(path).open("rb") as file:
        header = file.read(1 << 14)
    stated = _SPACING_FIELD.get(ending(path), _SPACING_FIELD[".mha"]).search(header)
    if not header:
        return  # for SimpleITK to refuse
    text = stated[1].decode(errors="replace").strip() if stated else ""
    if not any(digit in text for digit in "123456789"):
        raise Rejected(f"spacing: the file states {text or 'none'}")
    if "(" not in text and _has_no_length(text):
        raise Rejected(f"spacing: {text} mm")


def _has_no_length(text: str) -> bool:
    """Whether one of several numbers is not positive, or no number."""
    try:
        return any(not float(mm) > 0 for mm in text.split())
    except ValueError:
        return True


# ---------------------------------------------------------------- DICOM


def _dicom_series(source: Source, selection: Selection) -> Iterator[Volume]:
    """The series of one folder. Case names and items tell nothing of the patient: identifiers are only hashed."""
    folder = source.key
    series = _list_series(folder)
    for number, (uid, files) in enumerate(series.items(), start=1):
        item = f"series {number} of {len(series)}, {len(files)} files"
        volume = Volume(case_name("dicom", folder, uid), item)
        try:
            volume.images = [_read_series(files, selection, volume.notes)]
        except Rejected as reason:
            volume.problem = str(reason)
        yield volume
    used = {Path(file).name for files in series.values() for file in files}
    others = [path.name for path in Path(folder).iterdir() if path.is_file() and not path.name.startswith(".")]
    stray = [name for name in others if name not in used and not ending(name) and may_be_dicom(folder, name)]
    if stray:
        problem = f"unreadable: {len(stray)} DICOM files that are part of no series"
        yield Volume(case_name("dicom", folder), "other files", problem=problem)


def _list_series(folder: str) -> dict[str, Sequence[str]]:
    """The files of each series, in the order of their slices, as GDCM sorts them."""
    try:
        return _ask_gdcm(folder)
    except RuntimeError:  # GDCM lists nothing if one file is beyond it: ask about the others
        with tempfile.TemporaryDirectory() as links:
            for path in Path(folder).iterdir():
                if not ending(path.name) and may_be_dicom(folder, path.name) and _is_scan(path):
                    Path(links, path.name).symlink_to(path)
            return {uid: [str(Path(folder, Path(file).name)) for file in f] for uid, f in _ask_gdcm(links).items()}


def _ask_gdcm(folder: str) -> dict[str, Sequence[str]]:
    reader = sitk.ImageSeriesReader
    return {uid: reader.GetGDCMSeriesFileNames(folder, uid) for uid in sorted(reader.GetGDCMSeriesIDs(folder))}


def _is_scan(path: Path) -> bool:
    try:
        _check_dicom(str(path))
    except (RuntimeError, Rejected):
        return False
    return True


def _read_series(files: Sequence[str], selection: Selection, notes: list[str]) -> sitk.Image:
    try:
        _check_dicom(files[0])
        if len(files) == 1:  # a slice, or all frames of an enhanced CT or MR
            return sitk.ReadImage(files[0])
        reader = sitk.ImageSeriesReader()
        reader.SetFileNames(files)
        reader.MetaDataDictionaryArrayUpdateOn()
        reader.ForceOrthogonalDirectionOff()  # a tilted scanner shears the volume: the direction's check must see it
        image = reader.Execute()
        if _is_rescaled_to_fractions(reader, len(files)):  # but the first file decides about the type: PET, some MR
            reader.SetOutputPixelType(sitk.sitkFloat32)
            image = reader.Execute()
    except RuntimeError as error:
        raise Rejected(f"unreadable: {one_line(error)}") from error
    nearest, farthest = _distances(reader, len(files))
    if farthest - nearest > _UNEVEN * farthest:
        if "slices" not in selection.keep or nearest < _UNEVEN * farthest:  # several phases at the same positions
            raise Rejected(f"slices: missing, doubled or uneven, {nearest:.3g} to {farthest:.3g} mm apart")
        notes.append(f"slices: {nearest:.3g} to {farthest:.3g} mm apart, taken as even")
    return image


def _is_rescaled_to_fractions(reader: sitk.ImageSeriesReader, slices: int) -> bool:
    stated = (
        float(reader.GetMetaData(number, tag))
        for number in range(slices)
        for tag in _RESCALE
        if reader.HasMetaDataKey(number, tag)
    )
    return any(not value.is_integer() for value in stated)


def _distances(reader: sitk.ImageSeriesReader, slices: int) -> tuple[float, float]:
    """The least and the largest distance between neighbouring slices, in mm; zeros if positions are not stated."""
    if not all(reader.HasMetaDataKey(number, _POSITION) for number in range(slices)):
        return 0.0, 0.0
    positions = [reader.GetMetaData(number, _POSITION).split("\\") for number in range(slices)]
    distances = np.linalg.norm(np.diff(np.array(positions, dtype=float), axis=0), axis=1)
    return float(distances.min()), float(distances.max())


def _check_dicom(path: str) -> None:
    reader = sitk.ImageFileReader()
    reader.SetFileName(path)
    reader.ReadImageInformation()
    modality = reader.GetMetaData(_MODALITY).strip() if reader.HasMetaDataKey(_MODALITY) else ""
    if modality in _NO_SCANS:
        raise Rejected(f"modality: {modality} is no scan")
    enhanced = reader.HasMetaDataKey(_SOP_CLASS) and reader.GetMetaData(_SOP_CLASS).strip("\0 ") in _ENHANCED
    if not enhanced and not reader.HasMetaDataKey(_PIXEL_SPACING):
        raise Rejected("spacing: the file states none")
