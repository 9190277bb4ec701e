"""Read DICOM series. Case names contain hashes only.

:func:`.volumes.check_volume` later removes the metadata of the images, which may identify the patient.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import SimpleITK as sitk  # noqa: N813  the package's own convention

from nnunetv2_vf.importing.images import error_line
from nnunetv2_vf.importing.settings import Selection
from nnunetv2_vf.importing.sources import case_name, may_be_dicom, volume_ending
from nnunetv2_vf.importing.volumes import RejectedError, Volume

# Modalities that are not a volume of a scan: segmentations, doses and documents; ultrasound, projections, photographs.
_OTHER_MODALITIES = {
    *("SEG", "RTDOSE", "RTIMAGE", "RTSTRUCT", "RTPLAN", "SR", "PR", "KO", "REG", "DOC"),
    *("US", "IVUS", "XA", "RF", "MG", "CR", "DX", "IO", "PX", "ES", "GM", "SM", "OP", "OCT", "XC", "ECG"),
}
# Enhanced CT, MR and PET, whose files state the spacing of each frame in another place.
_ENHANCED_CLASSES = {f"1.2.840.10008.5.1.4.1.1.{end}" for end in ("2.1", "2.2", "4.1", "4.4", "130", "128.1")}
_SOP_CLASS, _MODALITY, _POSITION, _PIXEL_SPACING = "0008|0016", "0008|0060", "0020|0032", "0028|0030"
_RESCALE_INTERCEPT, _RESCALE_SLOPE = "0028|1052", "0028|1053"
# Distances between slices that differ by more than this fraction mean a missing slice; less is rounding.
_MAX_UNEVENNESS = 0.1


def read_dicom_folder(folder: str, selection: Selection) -> Iterator[Volume]:
    """Yield a volume for each series in a folder, and a rejected one for the DICOM files that belong to no series."""
    series = _list_series(folder)
    for number, (uid, files) in enumerate(series.items(), start=1):
        volume = Volume(case_name("dicom", folder, uid), f"series {number} of {len(series)}, {len(files)} files")
        try:
            volume.images = [_read_series(files, selection, volume.notes)]
        except RejectedError as rejection:
            volume.rejection = str(rejection)
        yield volume
    in_series = {Path(file).name for files in series.values() for file in files}
    stray = [name for name in _dicom_files(folder) if name not in in_series]
    if stray:
        reason = f"unreadable: {len(stray)} DICOM files belong to no series"
        yield Volume(case_name("dicom", folder), "other files", rejection=reason)


def check_dicom_header(path: str) -> None:
    """Raise RejectedError if a file's modality is not a scan, or its pixel spacing is missing.

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
    if value(_SOP_CLASS) not in _ENHANCED_CLASSES and not reader.HasMetaDataKey(_PIXEL_SPACING):
        raise RejectedError("spacing: the file states none")


def _dicom_files(folder: str) -> list[str]:
    files = [path.name for path in Path(folder).iterdir() if path.is_file() and not path.name.startswith(".")]
    return [name for name in files if not volume_ending(name) and may_be_dicom(folder, name)]


def _list_series(folder: str) -> dict[str, Sequence[str]]:
    """Return the files of each series, by its UID, in the order of their slices as GDCM sorts them."""
    try:
        return _list_series_with_gdcm(folder)
    except RuntimeError:  # GDCM lists nothing if it cannot read one of the files; list the others without that file
        with tempfile.TemporaryDirectory() as links:
            for name in _dicom_files(folder):
                path = Path(folder, name)
                if _has_usable_header(str(path)):
                    Path(links, name).symlink_to(path)
            return {
                uid: [str(Path(folder, Path(file).name)) for file in files]
                for uid, files in _list_series_with_gdcm(links).items()
            }


def _list_series_with_gdcm(folder: str) -> dict[str, Sequence[str]]:
    reader = sitk.ImageSeriesReader
    return {uid: reader.GetGDCMSeriesFileNames(folder, uid) for uid in sorted(reader.GetGDCMSeriesIDs(folder))}


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
            return sitk.ReadImage(files[0])
        reader = sitk.ImageSeriesReader()
        reader.SetFileNames(files)
        reader.MetaDataDictionaryArrayUpdateOn()
        reader.ForceOrthogonalDirectionOff()  # a tilted scanner shears the volume; the direction check must see it
        image = reader.Execute()
        if _has_fractional_rescaling(reader, len(files)):
            # The first file alone decides the voxel type, and later slices lose their fractions (PET, some MR).
            reader.SetOutputPixelType(sitk.sitkFloat32)
            image = reader.Execute()
        _check_slice_distances(reader, len(files), selection, notes)
    except (RuntimeError, ValueError) as error:  # ValueError: a number in the header is no number
        raise RejectedError(f"unreadable: {error_line(error)}") from error
    return image


def _has_fractional_rescaling(reader: sitk.ImageSeriesReader, num_slices: int) -> bool:
    stated = (
        float(reader.GetMetaData(number, tag))
        for number in range(num_slices)
        for tag in (_RESCALE_INTERCEPT, _RESCALE_SLOPE)
        if reader.HasMetaDataKey(number, tag)
    )
    return any(not value.is_integer() for value in stated)


def _check_slice_distances(
    reader: sitk.ImageSeriesReader, num_slices: int, selection: Selection, notes: list[str]
) -> None:
    """Raise RejectedError if slices are missing, doubled or unevenly spaced. Does nothing if positions are missing."""
    if not all(reader.HasMetaDataKey(number, _POSITION) for number in range(num_slices)):
        return
    positions = [reader.GetMetaData(number, _POSITION).split("\\") for number in range(num_slices)]
    distances = np.linalg.norm(np.diff(np.array(positions, dtype=float), axis=0), axis=1)
    smallest, largest = float(distances.min()), float(distances.max())
    if largest - smallest <= _MAX_UNEVENNESS * largest:
        return
    has_doubled_slices = smallest < _MAX_UNEVENNESS * largest  # several phases at the same positions
    if "slices" not in selection.keep or has_doubled_slices:
        raise RejectedError(f"slices: missing, doubled or uneven, {smallest:.3g} to {largest:.3g} mm apart")
    notes.append(f"slices: {smallest:.3g} to {largest:.3g} mm apart, treated as even")
