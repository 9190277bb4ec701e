"""Read DICOM series. Case names contain hashes only.

:func:`.volumes.check_volume` later removes the metadata of the images, which may identify the patient.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import SimpleITK as sitk  # noqa: N813  the package's own convention

from nnunetv2_vf.importing.images import describe_error, error_line
from nnunetv2_vf.importing.settings import Selection
from nnunetv2_vf.importing.sources import case_name, is_other_file, may_be_dicom, volume_ending
from nnunetv2_vf.importing.volumes import (
    MAX_ROUNDING_OF_COSINES,
    RejectedError,
    Volume,
    orthonormalize,
    require_spacing,
)

# Modalities that are not a volume of a scan: segmentations, doses and documents; ultrasound, projections, photographs.
_OTHER_MODALITIES = {
    *("SEG", "RTDOSE", "RTIMAGE", "RTSTRUCT", "RTPLAN", "SR", "PR", "KO", "REG", "DOC"),
    *("US", "IVUS", "XA", "RF", "MG", "CR", "DX", "IO", "PX", "ES", "GM", "SM", "OP", "OCT", "XC", "ECG"),
}
# Enhanced CT, MR and PET, whose files state the spacing of each frame in another place.
_ENHANCED_CLASSES = {f"1.2.840.10008.5.1.4.1.1.{end}" for end in ("2.1", "2.2", "4.1", "4.4", "130", "128.1")}
_SOP_CLASS, _MODALITY, _PIXEL_SPACING = "0008|0016", "0008|0060", "0028|0030"
_POSITION, _ORIENTATION = "0020|0032", "0020|0037"
_RESCALE_INTERCEPT, _RESCALE_SLOPE = "0028|1052", "0028|1053"
# Distances between slices that differ by more than this fraction mean a missing slice; less is rounding.
_MAX_UNEVENNESS = 0.1


def read_dicom_folder(folder: str, selection: Selection) -> Iterator[Volume]:
    """Yield a volume for each series in a folder, and a rejected one for the DICOM files that belong to no series."""
    names, dead_links = _dicom_files(folder)
    series = _list_series(folder, names)
    for number, (uid, files) in enumerate(series.items(), start=1):
        volume = Volume(case_name("dicom", folder, uid), f"series {number} of {len(series)}, {len(files)} files")
        try:
            volume.images = [_read_series(files, selection, volume.notes)]
        except RejectedError as rejection:
            volume.rejection = str(rejection)
        except Exception as error:  # pydicom raises anything for damaged files; go on with the next series
            volume.rejection = describe_error(error)
        yield volume
    in_series = {Path(file).name for files in series.values() for file in files}
    stray = [name for name in names if name not in in_series]
    reasons = [f"{len(stray)} DICOM files belong to no series"] if stray else []
    reasons += [f"{len(dead_links)} DICOM files are links to nothing"] if dead_links else []
    if reasons:
        yield Volume(case_name("dicom", folder), "other files", rejection=f"unreadable: {'; '.join(reasons)}")


def check_dicom_header(path: str) -> None:
    """Raise RejectedError if a file's modality is not a scan, or its pixel spacing is missing or not positive.

    Raises:
        RuntimeError: SimpleITK cannot read the header.
    """
    reader = sitk.ImageFileReader()
    reader.SetFileName(path)
    reader.ReadImageInformation()

    def value(tag: str) -> str:
        return reader.GetMetaData(tag).strip("\0 ") if reader.HasMetaDataKey(tag) else ""

    if value(_MODALITY) in _OTHER_MODALITIES:
        raise RejectedError(f"modality: {value(_MODALITY)} is not a scan")
    if value(_SOP_CLASS) not in _ENHANCED_CLASSES:
        require_spacing(value(_PIXEL_SPACING), separator="\\")


def check_frames(path: str, selection: Selection, notes: list[str]) -> None:
    """Check positions, orientations and rescaling of the frames of a file, which SimpleITK does not.

    It reads the frames in the order of the file, takes distances that differ for 1 mm, and puts the frames of a tilted
    scanner straight above each other.

    Raises:
        RejectedError: frames are missing, doubled, unevenly spaced, sheared or without a position, have different
            orientations, or are rescaled differently.
    """
    header = pydicom.dcmread(path, stop_before_pixels=True, force=True)  # old files lack the prefix DICM
    num_frames = int(header.get("NumberOfFrames") or 1)
    if num_frames == 1:
        return
    frames = header.get("PerFrameFunctionalGroupsSequence", ())
    positions = [_of_frame(frame, "PlanePositionSequence", "ImagePositionPatient") for frame in frames]
    if len(positions) != num_frames or None in positions:
        raise RejectedError(f"slices: the file does not state the positions of its {num_frames} frames")
    group, names = "PixelValueTransformationSequence", ("RescaleSlope", "RescaleIntercept")
    if any(len({_of_frame(frame, group, name) for frame in frames}) > 1 for name in names):
        raise RejectedError("slices: the frames have different rescale slopes or intercepts")
    _check_slice_distances(np.array(positions, dtype=float), selection, notes)
    shared = header.get("SharedFunctionalGroupsSequence", ())
    stated = [_of_frame(frame, "PlaneOrientationSequence", "ImageOrientationPatient") for frame in (*shared, *frames)]
    orientations = [orientation for orientation in stated if orientation]
    if orientations:
        _check_orientations(np.array(orientations, dtype=float))
        row, column = np.array(orientations[0], dtype=float).reshape(2, 3)
        normal = np.subtract(positions[-1], positions[0], dtype=float)
        orthonormalize(np.column_stack([row, column, normal / np.linalg.norm(normal)]), selection, notes)


def _of_frame(frame: pydicom.Dataset, group: str, name: str) -> Any:
    """Return a value of one frame; None if the file does not state it."""
    values = frame.get(group)
    return values[0].get(name) if values else None


def _dicom_files(folder: str) -> tuple[list[str], list[str]]:
    """Return the names of the DICOM files of a folder, and of links to nothing that may be slices of a series."""
    paths = sorted(path for path in Path(folder).iterdir() if not path.name.startswith("."))
    candidates = [path for path in paths if not volume_ending(path.name) and not is_other_file(path.name)]
    files = [path for path in candidates if path.is_file() and may_be_dicom(folder, path.name)]
    endings = {_ending(path) for path in files}
    dead_links = [
        path.name
        for path in candidates
        if not path.exists() and (_ending(path) in endings or may_be_dicom(folder, path.name))
    ]
    return [path.name for path in files], dead_links


def _ending(path: Path) -> str:
    return "" if path.suffix[1:].isdigit() else path.suffix  # slices may be named by UIDs, which end in numbers


def _list_series(folder: str, names: Sequence[str]) -> dict[str, list[str]]:
    """Return the files of each series, by its UID, in the order of their slices; without those that cannot be read."""
    names_by_uid: dict[str, list[str]] = {}
    for name in names:
        with suppress(Exception):  # pydicom raises anything for damaged files; they will belong to no series
            names_by_uid.setdefault(_read_series_uid(Path(folder, name)), []).append(name)
    series = {uid: _sort_slices(folder, names) for uid, names in sorted(names_by_uid.items())}
    return {uid: files for uid, files in series.items() if files}


def _read_series_uid(path: Path) -> str:
    header = pydicom.dcmread(path, stop_before_pixels=True, force=True, specific_tags=["SeriesInstanceUID"])
    element = header.get_item("SeriesInstanceUID")  # the bytes of the file: scanners write UIDs that are not legal
    return bytes(element.value or b"").decode("latin-1").strip("\0 ") if element else ""


def _sort_slices(folder: str, names: Sequence[str]) -> list[str]:
    """Return the files of one series in the order of their slices, without those that GDCM cannot read.

    GDCM gets a folder of links to these files. In the folder itself it reads the headers of all series, and stops at a
    link to nothing.
    """
    list_files = sitk.ImageSeriesReader.GetGDCMSeriesFileNames  # of the only series in the folder
    with tempfile.TemporaryDirectory() as links:
        for name in names:
            _link(Path(links, name), Path(folder, name).absolute())
        try:
            in_order = list_files(links)
        except RuntimeError:  # GDCM lists nothing if it cannot read one of the files
            for link in Path(links).iterdir():
                if not _has_usable_header(str(link)):
                    link.unlink()
            in_order = list_files(links)
    return [str(Path(folder, Path(file).name)) for file in in_order]


def _link(link: Path, target: Path) -> None:
    try:
        link.symlink_to(target)
    except OSError:  # Windows allows links to administrators only
        shutil.copyfile(target, link)


def _has_usable_header(path: str) -> bool:
    try:
        check_dicom_header(path)
    except (RuntimeError, RejectedError):
        return False
    return True


def _read_series(files: Sequence[str], selection: Selection, notes: list[str]) -> sitk.Image:
    try:
        check_dicom_header(files[0])
        if len(files) == 1:  # a single slice, or all frames of an enhanced CT or MR
            check_frames(files[0], selection, notes)
            return sitk.ReadImage(files[0])
        reader = sitk.ImageSeriesReader()
        reader.SetFileNames(files)
        reader.MetaDataDictionaryArrayUpdateOn()
        reader.ForceOrthogonalDirectionOff()  # a tilted scanner shears the volume; the direction check must see it
        image = reader.Execute()
        if _needs_float(*(_read_numbers(reader, len(files), tag) for tag in (_RESCALE_SLOPE, _RESCALE_INTERCEPT))):
            reader.SetOutputPixelType(sitk.sitkFloat32)
            image = reader.Execute()
        _check_slices(reader, len(files), selection, notes)
    except (RuntimeError, ValueError) as error:  # ValueError: a number in the header is no number
        raise RejectedError(f"unreadable: {error_line(error)}") from error
    return image


def _read_numbers(reader: sitk.ImageSeriesReader, num_slices: int, tag: str) -> list[tuple[float, ...]]:
    """Return the numbers in an entry of the slices that have it."""
    stated = [reader.GetMetaData(number, tag) for number in range(num_slices) if reader.HasMetaDataKey(number, tag)]
    return [tuple(map(float, text.split("\\"))) for text in stated]


def _needs_float(slopes: list[tuple[float, ...]], intercepts: list[tuple[float, ...]]) -> bool:
    """True if the voxel type of the first slice, which SimpleITK takes for all, may not hold the others' values.

    Later slices would lose their fractions (PET, some MR) or overflow.
    """
    has_fractions = any(not value.is_integer() for values in (*slopes, *intercepts) for value in values)
    return has_fractions or len({*slopes}) > 1 or len({*intercepts}) > 1


def _check_slices(reader: sitk.ImageSeriesReader, num_slices: int, selection: Selection, notes: list[str]) -> None:
    """Raise RejectedError if slices lack a position, or differ in pixel spacing or orientation; check distances."""
    positions = _read_numbers(reader, num_slices, _POSITION)
    if len(positions) < num_slices:
        raise RejectedError(f"slices: {num_slices - len(positions)} of {num_slices} files state no position")
    spacings = np.array(_read_numbers(reader, num_slices, _PIXEL_SPACING))
    if spacings.size and (np.ptp(spacings, axis=0) > _MAX_UNEVENNESS * spacings.max(axis=0)).any():
        raise RejectedError("slices: their pixel spacings differ")
    _check_orientations(np.array(_read_numbers(reader, num_slices, _ORIENTATION)))
    _check_slice_distances(np.array(positions), selection, notes)


def _check_orientations(orientations: np.ndarray) -> None:
    """Raise RejectedError if slices are not parallel, as in scout views or a rotating acquisition.

    Args:
        orientations: cosines of the slices that state them, (slices, 6).
    """
    if orientations.size and (np.ptp(orientations, axis=0) > MAX_ROUNDING_OF_COSINES).any():
        raise RejectedError("slices: their orientations differ")


def _check_slice_distances(positions: np.ndarray, selection: Selection, notes: list[str]) -> None:
    """Raise RejectedError if slices are missing, doubled or unevenly spaced.

    Args:
        positions: of the slices in the order of the volume, (slices, 3), mm.
    """
    steps = np.diff(positions, axis=0)
    distances = np.linalg.norm(steps, axis=1)
    smallest, largest = float(distances.min()), float(distances.max())
    goes_back = bool((steps @ steps[0] < 0).any())
    if largest - smallest <= _MAX_UNEVENNESS * largest and not goes_back:
        return
    has_doubled_slices = smallest < _MAX_UNEVENNESS * largest or goes_back  # several phases at the same positions
    if "slices" not in selection.keep or has_doubled_slices:
        raise RejectedError(f"slices: missing, doubled or uneven, {smallest:.3g} to {largest:.3g} mm apart")
    notes.append(f"slices: {smallest:.3g} to {largest:.3g} mm apart, treated as even")
