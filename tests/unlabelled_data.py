"""Small unlabelled volumes in every format that ``import`` reads, valid and damaged; helpers to import them."""

from __future__ import annotations

import csv
import json
import re
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk  # noqa: N813  the package's own convention

from nnunetv2_vf.cli import main
from nnunetv2_vf.importing.readers import read_volumes
from nnunetv2_vf.importing.search import find_sources
from nnunetv2_vf.importing.settings import Selection
from nnunetv2_vf.importing.volumes import RejectedError, Volume, check_volume

DATASET_ID, DATASET = 100, "Dataset100_Test"
PATIENT_NAME, PATIENT_ID, STUDY_UID = "Doe^Jane", "PAT-4711", "1.2.826.0.1.3680043.99"  # must not leave DICOM files
SHAPE = (20, 24, 28)  # slices, rows, columns
SPACING = (2.0, 1.5, 1.0)  # in mm
VOLUME_FORMATS = ("nii", "nii.gz", "hdr", "nrrd", "nhdr", "mha", "mhd")


# ---------------------------------------------------------------- arrays


def ct(seed: int, shape: Sequence[int] = SHAPE) -> np.ndarray:
    """Return a cylinder of soft tissue in air, with a smaller cylinder of lung inside; int16, in HU."""
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, length) for length in shape), indexing="ij", sparse=True)
    squared_radius = y**2 + x**2 + 0 * z
    values = np.where(squared_radius < 0.6, 40, -1000) + np.random.default_rng(seed).normal(0, 20, shape)
    values[squared_radius < 0.1] = -950
    return values.astype(np.int16)


def mr(seed: int, shape: Sequence[int] = SHAPE) -> np.ndarray:
    """Return the same body on dark noise, in arbitrary units; float32."""
    noise = np.random.default_rng(seed).random(shape, dtype=np.float32)
    return np.where(ct(seed, shape) > -500, np.float32(300), np.float32(5)) + 4 * noise


# ---------------------------------------------------------------- files


def make_image(array: np.ndarray, spacing: Sequence[float] = SPACING) -> sitk.Image:
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(tuple(spacing)[::-1])
    return image


def write_volume(path: Path, array: np.ndarray, spacing: Sequence[float] = SPACING) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(make_image(array, spacing), str(path))
    return path


def write_4d(path: Path, arrays: Sequence[np.ndarray]) -> Path:
    sitk.WriteImage(sitk.JoinSeries([make_image(array) for array in arrays]), str(path))
    return path


def write_dicom(
    folder: Path,
    array: np.ndarray,
    series: int = 1,
    ending: str = ".dcm",
    skipped: Sequence[int] = (),
    tags: dict[str, str] | None = None,
    shift: float = 0.0,
    slopes: Sequence[str] = ("1",),
) -> None:
    """Write a DICOM series, one file per slice, with a patient's name and ids in every file.

    Args:
        skipped: numbers of the slices that are not written.
        shift: offset of each slice from the previous one within the plane, in mm, as a tilted scanner has it.
        slopes: rescale slopes, used in turn.
    """
    folder.mkdir(parents=True, exist_ok=True)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    volume = make_image(array)
    for number in sorted({*range(len(array))} - {*skipped}):
        one_slice = volume[:, :, number]
        x, y, z = volume.TransformIndexToPhysicalPoint((0, 0, number))
        values = {
            "0008|0060": "CT",
            "0010|0010": PATIENT_NAME,
            "0010|0020": PATIENT_ID,
            "0020|000d": STUDY_UID,
            "0020|000e": f"{STUDY_UID}.{series}",
            "0008|0018": f"{STUDY_UID}.{series}.{number + 1}",
            "0020|0013": str(number + 1),
            "0020|0032": f"{x}\\{y + number * shift}\\{z}",
            "0020|0037": "1\\0\\0\\0\\1\\0",
            "0028|1052": "0",
            "0028|1053": "1",
            **(tags or {}),
        }
        for tag, value in values.items():
            one_slice.SetMetaData(tag, value)
        path = folder / f"s{series}_{number:03d}.dcm"
        writer.SetFileName(str(path))
        writer.Execute(one_slice)
        _set_rescale_slope(path, slopes[number % len(slopes)])
        path.rename(path.with_suffix(ending))


def write_enhanced_dicom(
    file: Path,
    array: np.ndarray,
    positions: Sequence[float],
    slopes: Sequence[float] = (1,),
    states_positions: bool = True,
    shift: float = 0.0,
) -> None:
    """Write an enhanced MR: one file with all frames.

    Args:
        positions: of the frames along z, mm.
        slopes: rescale slopes of the frames, used in turn.
        shift: offset of each frame from the previous one within the plane, in mm.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    meta = pydicom.dataset.FileMetaDataset()
    meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = pydicom.uid.EnhancedMRImageStorage
    meta.MediaStorageSOPInstanceUID = f"{STUDY_UID}.9"
    content = pydicom.Dataset()
    content.file_meta = meta
    content.SOPClassUID, content.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    content.StudyInstanceUID, content.SeriesInstanceUID = STUDY_UID, f"{STUDY_UID}.8"
    content.Modality, content.PatientName, content.PatientID = "MR", PATIENT_NAME, PATIENT_ID
    content.NumberOfFrames, content.Rows, content.Columns = array.shape
    content.SamplesPerPixel, content.PhotometricInterpretation = 1, "MONOCHROME2"
    content.BitsAllocated, content.BitsStored, content.HighBit, content.PixelRepresentation = 16, 16, 15, 1
    content.PixelData = array.astype("<i2").tobytes()

    def group(**values: object) -> pydicom.Sequence:
        entry = pydicom.Dataset()
        for name, value in values.items():
            setattr(entry, name, value)
        return pydicom.Sequence([entry])

    shared = pydicom.Dataset()
    shared.PixelMeasuresSequence = group(PixelSpacing=list(SPACING[1:]), SliceThickness=SPACING[0])
    shared.PlaneOrientationSequence = group(ImageOrientationPatient=[1, 0, 0, 0, 1, 0])
    content.SharedFunctionalGroupsSequence = pydicom.Sequence([shared])
    frames = []
    for number, z in enumerate(positions):
        frame = pydicom.Dataset()
        if states_positions:
            frame.PlanePositionSequence = group(ImagePositionPatient=[0, number * shift, z])
        slope = slopes[number % len(slopes)]
        frame.PixelValueTransformationSequence = group(RescaleSlope=slope, RescaleIntercept=0, RescaleType="US")
        frames.append(frame)
    content.PerFrameFunctionalGroupsSequence = pydicom.Sequence(frames)
    content.save_as(file, enforce_file_format=True)


def _set_rescale_slope(path: Path, slope: str) -> None:
    """Change the slope in the file: GDCM reads fractions, but does not write them."""
    content, tag = path.read_bytes(), b"\x28\x00\x53\x10"
    written = tag + b"\x02\x00\x00\x001 "
    assert content.count(written) == 1
    path.write_bytes(content.replace(written, tag + b"\x04\x00\x00\x00" + slope.encode().ljust(4)))


# ---------------------------------------------------------------- damage


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def change_text_header(path: Path, pattern: bytes, replacement: bytes) -> None:
    """Replace the first match of a pattern in a NRRD or MetaImage file."""
    content = path.read_bytes()
    changed = re.sub(pattern, replacement, content, count=1)
    assert changed != content
    path.write_bytes(changed)


def set_nifti_spacing(path: Path, axis: int, millimetres: float) -> None:
    """Change one spacing of an uncompressed NIfTI file. Axis 1 is that of the columns, 3 that of the slices."""
    content = bytearray(path.read_bytes())
    struct.pack_into("<f", content, 76 + 4 * axis, millimetres)
    path.write_bytes(content)


def shear_nifti(path: Path, amount: float) -> None:
    """Shift each slice of an uncompressed NIfTI file by ``amount`` times the slice distance, in its only matrix."""
    content = bytearray(path.read_bytes())
    x, y, z = struct.unpack_from("<3f", content, 80)
    struct.pack_into("<hh", content, 252, 0, 1)  # no quaternion, only the matrix
    for row, values in enumerate(((-x, 0, amount * z, 0), (0, -y, 0, 0), (0, 0, z, 0))):
        struct.pack_into("<4f", content, 280 + 16 * row, *values)
    path.write_bytes(content)


def write_rejected_volumes(folder: Path) -> dict[str, str]:
    """Write one valid source, and one for every kind of rejection; return what is expected of each by file name."""
    write_volume(folder / "a_good.nii.gz", ct(0))
    write_volume(folder / "small.nii.gz", ct(0, (15, 24, 28)))
    write_volume(folder / "flat.nii.gz", ct(0)[0], (1.0, 1.0))
    set_nifti_spacing(write_volume(folder / "zero_spacing.nii", ct(1)), 1, 0.0)
    change_text_header(write_volume(folder / "no_spacing.mha", ct(1)), rb"ElementSpacing[^\n]*\n", b"")
    write_volume(folder / "far.nii.gz", ct(1), (21.0, 1.0, 1.0))
    array = mr(0)
    array[0, 0, 0] = np.nan
    write_volume(folder / "nan.nii.gz", array)
    array[0, 0, 0] = np.inf
    write_volume(folder / "inf.nrrd", array)
    write_volume(folder / "constant.nii.gz", ct(0) * 0)
    truncate(write_volume(folder / "truncated.nii.gz", ct(2)))
    (folder / "text.nii.gz").write_text("no image")
    (folder / "broken_link.nii.gz").symlink_to(folder / "nowhere")
    write_volume(folder / "same.mha", ct(0))
    shear_nifti(write_volume(folder / "sheared.nii", ct(3)), 0.2)
    sitk.WriteImage(sitk.Compose([make_image(ct(0).astype(np.uint8))] * 3), str(folder / "colour.nrrd"))
    write_volume(folder / "OTMultiClass.mha", (ct(0) > -500) * np.uint8(3))
    write_dicom(folder / "gap", ct(4), skipped=(7,))
    write_dicom(folder / "dicom_seg_object", ct(4), series=2, tags={"0008|0060": "SEG"})
    return {
        "a_good.nii.gz": "accepted",
        "small.nii.gz": "size",
        "flat.nii.gz": "size",
        "zero_spacing.nii": "spacing",
        "no_spacing.mha": "spacing",
        "far.nii.gz": "spacing",
        "nan.nii.gz": "nonfinite",
        "inf.nrrd": "nonfinite",
        "constant.nii.gz": "constant",
        "truncated.nii.gz": "unreadable",
        "text.nii.gz": "unreadable",
        "broken_link.nii.gz": "unreadable",
        "same.mha": "duplicate",
        "sheared.nii": "direction",
        "colour.nrrd": "vector",
        "gap": "slices",
        "dicom_seg_object": "modality",
        "OTMultiClass.mha": "labels",
    }


# ---------------------------------------------------------------- reading volumes


def read_all(path: Path, **selection) -> list[Volume]:
    """Read all volumes of a file or folder."""
    sources = find_sources([path], excluded=Path("/nowhere")).sources
    return [volume for source in sources for volume in read_volumes(source, Selection(**selection))]


def check_only_volume(path: Path, **selection) -> str:
    """Read and check the only volume of a path. Return the reason for its rejection, its notes, or ``fine``."""
    (volume,) = read_all(path, **selection)
    try:
        if not volume.rejection:
            check_volume(volume, Selection(**selection))
    except RejectedError as rejection:
        return str(rejection)
    return volume.rejection or "; ".join(volume.notes) or "fine"


# ---------------------------------------------------------------- importing


def import_arguments(*arguments: object) -> list[str]:
    return ["import", "-d", str(DATASET_ID), "-n", "Test", "-np", "1", *map(str, arguments)]


def run_import(*arguments: object) -> None:
    main(import_arguments(*arguments))


def start_import(*arguments: object, **options) -> subprocess.Popen[str]:
    """Start an import in a process of its own."""
    command = [sys.executable, "-m", "nnunetv2_vf", *import_arguments(*arguments)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, encoding="utf-8", **options)


def import_error(*arguments: object) -> str:
    """Run an import that fails. Return its error message."""
    with pytest.raises(SystemExit) as exit_info:
        run_import(*arguments)
    message = str(exit_info.value.code)
    assert message.startswith("nnUNetv2_vf: error: ")
    assert "\n" not in message
    return message


def wait_until(condition: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


# ---------------------------------------------------------------- the imported dataset


def read_report(dataset: Path) -> list[dict[str, str]]:
    with (dataset / "import_report.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def read_outcomes(dataset: Path) -> dict[str, str]:
    """Return ``accepted`` or the kind of the rejection for each source, by the name of its file or folder."""
    rows = read_report(dataset)
    return {Path(row["source"]).name: row["reason"].partition(":")[0] or row["status"] for row in rows}


def read_description(dataset: Path) -> dict:
    return json.loads((dataset / "dataset.json").read_text())


def read_user_files(dataset: Path) -> dict[str, bytes]:
    """Return the content of every file but the journals and the picture, by its path in the dataset."""
    return {
        str(path.relative_to(dataset)): path.read_bytes()
        for path in sorted(dataset.rglob("*"))
        if path.is_file() and "import_journals" not in path.parts and path.suffix != ".png"
    }


def image_times(dataset: Path) -> dict[Path, int]:
    """Return the time at which each image was written, in ns. An image that is imported again gets a new time."""
    return {path: path.stat().st_mtime_ns for path in (dataset / "imagesTr").iterdir()}


def assert_consistent(dataset: Path) -> None:
    """Assert that the report, dataset.json and the files have the same cases, and that no temporary file is left."""
    cases = {row["case"] for row in read_report(dataset) if row["status"] == "accepted"}
    description = read_description(dataset)
    assert set(description["dataset"]) == cases
    assert description["numTraining"] == len(cases) > 0
    images = {dataset / name for case in description["dataset"].values() for name in case["images"]}
    labels = {dataset / case["label"] for case in description["dataset"].values()}
    assert {*(dataset / "imagesTr").iterdir()} == images
    assert {*(dataset / "labelsTr").iterdir()} == labels
    assert not list((dataset / "import_journals").glob("*.scratch"))
    assert not (dataset / "import_report_refused.csv").exists()


def assert_no_partial_case(dataset: Path) -> None:
    """Assert that every image can be read to its end and has a label."""
    for path in (dataset / "imagesTr").iterdir():
        assert sitk.GetArrayFromImage(sitk.ReadImage(str(path))).std() > 0
        label = dataset / "labelsTr" / path.name.replace("_0000", "")
        assert sitk.GetArrayFromImage(sitk.ReadImage(str(label))).max() == 1
