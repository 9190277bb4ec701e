"""One source of unlabelled data, volume by volume: read it, and decide whether it is fit for training.

Reading is SimpleITK's, with what it lets pass checked beside it: it fills a truncated NIfTI with zeros and takes a
missing spacing for 1 mm. Axes are (slices, rows, columns), spacings in mm in the same order.
"""

from __future__ import annotations

import gzip
import hashlib
import math
import os
import re
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path

import nibabel
import numpy as np
import SimpleITK as sitk  # noqa: N813  its own convention
from nibabel.spatialimages import HeaderDataError
from nibabel.wrapstruct import WrapStructError

from nnunetv2_vf.body import is_hu_like
from nnunetv2_vf.errors import UserError
from nnunetv2_vf.sources import Source, case_name, ending, is_dicom, may_be_dicom

CHECKS = ("duplicates", "nonfinite", "direction", "slices")  # what --keep can let pass
_ROUNDING = 5e-3  # of a direction cosine: headers written with two digits; a scanner tilted by 1 degree is 0.017 off
# DICOM: modalities that are no scans of a volume; classes of files that state the spacing for each frame; tags
_NO_SCANS = {"SEG", "RTDOSE", "RTIMAGE", "RTSTRUCT", "RTPLAN", "SR", "PR", "KO", "REG", "DOC"}
_NO_SCANS |= {"US", "IVUS", "XA", "RF", "MG", "CR", "DX", "IO", "PX", "ES", "GM", "SM", "OP", "OCT", "XC", "ECG"}
_ENHANCED = {f"1.2.840.10008.5.1.4.1.1.{end}" for end in ("2.1", "2.2", "4.1", "4.4", "130", "128.1")}
_SOP_CLASS, _MODALITY, _POSITION = "0008|0016", "0008|0060", "0020|0032"
_PIXEL_SPACING, _RESCALE = "0028|0030", ("0028|1052", "0028|1053")
_UNEVEN = 0.1  # of the distance between slices: differ by more, and one is missing; by less, it is rounding
NIFTI_IO = "NiftiImageIO"  # named, ITK need not ask all others: saves a tenth of the time of a small volume
_PERMISSIVE = "ITK_NIFTI_SFORM_PERMISSIVE"


@dataclass(frozen=True)
class Selection:
    """Which volumes are fit for training.

    Attributes:
        min_size: least number of slices, rows and columns.
        max_spacing: in mm; larger ones are taken for mistakes.
        min_range: volumes whose intensities do not differ by more than this are constant.
        keep: checks of :data:`CHECKS` that let pass what they find: duplicates as they are, voxels that are not
            finite set to the lowest that is, directions made orthonormal, unevenly spaced slices as if they were even.
        split_4d: a 4D file is so many volumes; else it is rejected.

    Raises:
        UserError: for a value that is not legal.
    """

    min_size: int = 16
    max_spacing: float = 20.0
    min_range: float = 0.0
    keep: tuple[str, ...] = ()
    split_4d: bool = True

    def __post_init__(self) -> None:
        unknown = sorted({*self.keep} - {*CHECKS})
        if unknown:
            raise UserError(f"--keep: there is no check {unknown[0]!r}; use {', '.join(CHECKS)}, separated by commas")
        if self.min_size < 1:
            raise UserError(f"--min-size is {self.min_size}; it must be at least 1 voxel")
        if not self.max_spacing > 0:
            raise UserError(f"--max-spacing is {self.max_spacing}; it must be more than 0 mm")
        if not self.min_range >= 0:
            raise UserError(f"--min-range is {self.min_range}; it must be at least 0")


class Rejected(Exception):  # noqa: N818  a verdict, not an error
    """A volume is not fit; the message is ``KIND: what is wrong``."""


@dataclass
class Volume:
    """One volume (of one or more channels) that a source gave, or why it did not.

    Attributes:
        case: its name in the dataset.
        item: which of the source's volumes; empty if there is but one.
        images: one a channel, all on one grid.
        problem: why there are none.
        notes: what was mended.
        files: one a channel that hold just this volume, for links; empty if there are none.
    """

    case: str
    item: str = ""
    images: list[sitk.Image] = field(default_factory=list)
    problem: str = ""
    notes: list[str] = field(default_factory=list)
    files: tuple[str, ...] = ()


@dataclass(frozen=True)
class Facts:
    """What the report says of a volume; ``hu_like`` has an entry per channel."""

    shape: tuple[int, ...]
    spacing: tuple[float, ...]
    minimum: float
    maximum: float
    hu_like: tuple[bool, ...]
    digest: str


def read_volumes(source: Source, selection: Selection) -> Iterator[Volume]:
    """Read a source's volumes one after the other; what cannot be read comes as a problem, never as an exception."""
    if source.problem:
        yield Volume(case_name(source.stem, source.key), problem=source.problem)
    elif Path(source.key).is_dir():
        yield from _dicom_series(source, selection)
    else:
        yield from _volumes_of_files(source, selection)


def examine(volume: Volume, selection: Selection) -> Facts:
    """Measure a volume and decide whether it is fit for training; mend in place what may be mended, with a note.

    Raises:
        Rejected: it is not fit.
    """
    for image in volume.images:
        if image.GetDimension() != 3 or min(image.GetSize()) < selection.min_size:
            extent = " x ".join(map(str, image.GetSize()[::-1]))
            raise Rejected(f"size: {extent} voxels, fewer than {selection.min_size} on a side")
        if max(image.GetSpacing()) > selection.max_spacing:
            raise Rejected(f"spacing: {max(image.GetSpacing()):g} mm, more than {selection.max_spacing:g}")
    for number, image in enumerate(volume.images):
        _mend_direction(image, selection, volume.notes)
        _share_grid(volume.images[0], image, volume.notes)
        volume.images[number] = _finite(_storable(image), selection, volume.notes)
    shape, spacing = volume.images[0].GetSize()[::-1], volume.images[0].GetSpacing()[::-1]
    arrays = [sitk.GetArrayViewFromImage(image) for image in volume.images]
    lows, highs = [float(array.min()) for array in arrays], [float(array.max()) for array in arrays]
    for low, high in zip(lows, highs, strict=True):
        if high - low <= selection.min_range:
            raise Rejected(f"constant: all voxels between {low:g} and {high:g}")
    hu_like = tuple(is_hu_like(array) for array in arrays)
    return Facts(shape, spacing, min(lows), max(highs), hu_like, _content_hash(arrays, spacing))


def on_grid_of(like: sitk.Image, array: np.ndarray) -> sitk.Image:
    """An array, (D, H, W), as an image on the grid of another."""
    image = sitk.GetImageFromArray(array, isVector=False)
    image.CopyInformation(like)
    return image


def one_line(error: Exception) -> str:
    """What went wrong, as the last line of a library's message has it."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    last = " ".join(str(error).strip().rpartition("\n")[2].split()).removeprefix("sitk::ERROR: ")
    return "too short or damaged" if last in ("", "Reason: No such file or directory") else last  # MetaImage's


# ---------------------------------------------------------------- what a volume holds


def _storable(image: sitk.Image) -> sitk.Image:
    """Without metadata, which may tell of the patient, and in no more than 32 bits: nnU-Net computes in float32."""
    if image.GetNumberOfComponentsPerPixel() > 1 or "complex" in image.GetPixelIDTypeAsString():
        raise Rejected(f"vector: {image.GetPixelIDTypeAsString()} with several numbers a voxel")
    for key in image.GetMetaDataKeys():
        image.EraseMetaData(key)
    wide = (sitk.sitkFloat64, sitk.sitkInt64, sitk.sitkUInt64, sitk.sitkUInt32)
    return sitk.Cast(image, sitk.sitkFloat32) if image.GetPixelID() in wide else image


def _finite(image: sitk.Image, selection: Selection, notes: list[str]) -> sitk.Image:
    array = sitk.GetArrayViewFromImage(image)
    with np.errstate(invalid="ignore"):
        total = array.sum(dtype=np.float64)  # finite where all float32 are, and needs no array of its own
    if np.isfinite(total):
        return image
    finite = np.isfinite(array)
    count = array.size - int(finite.sum())
    if "nonfinite" not in selection.keep or count == array.size:
        raise Rejected(f"nonfinite: {count} voxels are NaN or infinite")
    notes.append(f"nonfinite: {count} voxels set to the lowest finite value")
    return on_grid_of(image, np.where(finite, array, array[finite].min()))


def _content_hash(arrays: Sequence[np.ndarray], spacing: Sequence[float]) -> str:
    """Of pixels and spacing, whatever the file's format or type of pixel."""
    digest = hashlib.sha256(f"{arrays[0].shape} {[round(mm, 3) for mm in spacing]}".encode())
    for array in arrays:
        for one_slice in array:
            digest.update(np.ascontiguousarray(one_slice, dtype=np.float32).data)
    return digest.hexdigest()[:32]


def _mend_direction(image: sitk.Image, selection: Selection, notes: list[str]) -> None:
    nearest, off = _orthonormal(np.reshape(image.GetDirection(), (3, 3)))
    if off > 1e-6:
        _accept_direction(off, selection, notes)
        image.SetDirection(nearest.ravel().tolist())


def _accept_direction(off: float, selection: Selection, notes: list[str]) -> None:
    if off > _ROUNDING and "direction" not in selection.keep:
        raise Rejected(f"direction: axes are not at right angles, off by {off:.3g}")
    notes.append(f"direction: made orthonormal, was off by {off:.2g}")


def _share_grid(first: sitk.Image, image: sitk.Image, notes: list[str]) -> None:
    """Give a further channel the first one's grid, which it may differ from by rounding only."""
    if image.IsSameImageGeometryAs(first, 0.0, 0.0):
        return
    if image.GetSize() != first.GetSize() or not (
        np.allclose(image.GetSpacing(), first.GetSpacing(), rtol=1e-3)
        and np.allclose(image.GetDirection(), first.GetDirection(), atol=_ROUNDING)
        and np.allclose(image.GetOrigin(), first.GetOrigin(), rtol=0, atol=0.1 * min(first.GetSpacing()))
    ):
        raise Rejected("channels: not on one grid")
    image.CopyInformation(first)
    notes.append("channels: put on the grid of the first")


def _orthonormal(direction: np.ndarray) -> tuple[np.ndarray, float]:
    """The orthonormal matrix nearest to one whose columns are directions, and how far the two are apart."""
    left, _, right = np.linalg.svd(direction)
    return left @ right, float(np.abs(left @ right - direction).max())


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
    _, off = _orthonormal(matrix / np.linalg.norm(matrix, axis=0))
    _accept_direction(off, selection, notes)
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
