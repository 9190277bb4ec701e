"""Small unlabelled volumes in every format that ``import`` reads, whole and damaged; importing them, and looking."""

from __future__ import annotations

import csv
import json
import re
import struct
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813  its own convention

from nnunetv2_vf.cli import main

ID, DATASET = 100, "Dataset100_Test"

NAME, PATIENT, STUDY = "Doe^Jane", "PAT-4711", "1.2.826.0.1.3680043.99"  # what must never come out
SHAPE = (20, 24, 28)
SPACING = (2.0, 1.5, 1.0)  # slices, rows, columns; in mm


def ct(seed: int, shape: Sequence[int] = SHAPE) -> np.ndarray:
    """Air around an ellipsoid of soft tissue with an air-filled hole, in HU, int16."""
    rng = np.random.default_rng(seed)
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij", sparse=True)
    radius = y**2 + x**2 + 0 * z
    values = np.where(radius < 0.6, 40, -1000) + rng.normal(0, 20, radius.shape)
    values[radius < 0.1] = -950  # from the first to the last slice, as lungs that are cut off
    return values.astype(np.int16)


def mr(seed: int, shape: Sequence[int] = SHAPE) -> np.ndarray:
    """The same body on dark noise, without units, float32."""
    noise = np.random.default_rng(seed).random(shape, dtype=np.float32)
    return np.where(ct(seed, shape) > -500, np.float32(300), np.float32(5)) + 4 * noise


def image(array: np.ndarray, spacing: Sequence[float] = SPACING) -> sitk.Image:
    made = sitk.GetImageFromArray(array)
    made.SetSpacing(tuple(spacing)[::-1])
    return made


def write(path: Path, array: np.ndarray, spacing: Sequence[float] = SPACING) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image(array, spacing), str(path))
    return path


def write_4d(path: Path, arrays: Sequence[np.ndarray]) -> Path:
    sitk.WriteImage(sitk.JoinSeries([image(array) for array in arrays]), str(path))
    return path


def write_dicom(
    folder: Path,
    array: np.ndarray,
    series: int = 1,
    ending: str = ".dcm",
    skip: Sequence[int] = (),
    tags: dict[str, str] | None = None,
    shift: float = 0.0,
    slopes: Sequence[str] = ("1",),
) -> None:
    """Write a series, a file a slice, with a patient's name and ids in every file.

    Args:
        skip: slices that are missing.
        shift: of each slice against the one before, across, in mm: a tilted scanner.
        slopes: of the rescaling to the modality's units, in turn.
    """
    folder.mkdir(parents=True, exist_ok=True)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    volume = image(array)
    for number in range(len(array)):
        if number in skip:
            continue
        one_slice = volume[:, :, number]
        x, y, z = volume.TransformIndexToPhysicalPoint((0, 0, number))
        values = {
            "0008|0060": "CT",
            "0010|0010": NAME,
            "0010|0020": PATIENT,
            "0020|000d": STUDY,
            "0020|000e": f"{STUDY}.{series}",
            "0008|0018": f"{STUDY}.{series}.{number + 1}",
            "0020|0013": str(number + 1),
            "0020|0032": f"{x}\\{y + number * shift}\\{z}",
            "0020|0037": "1\\0\\0\\0\\1\\0",
            "0028|1052": "0",
            "0028|1053": "1",
            **(tags or {}),
        }
        for tag, value in values.items():
            one_slice.SetMetaData(tag, value)
        written = folder / f"s{series}_{number:03d}.dcm"
        writer.SetFileName(str(written))
        writer.Execute(one_slice)
        slope = slopes[number % len(slopes)].encode().ljust(4)
        content, tag = written.read_bytes(), b"\x28\x00\x53\x10"  # GDCM writes no fractions, but reads them
        assert content.count(tag + b"\x02\x00\x00\x001 ") == 1
        content = content.replace(tag + b"\x02\x00\x00\x001 ", tag + b"\x04\x00\x00\x00" + slope)
        written.write_bytes(content)
        written.rename(written.with_suffix(ending))


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def change_header(path: Path, pattern: bytes, replacement: bytes) -> None:
    """Of NRRD or MetaImage: text."""
    content = path.read_bytes()
    changed = re.sub(pattern, replacement, content, count=1)
    assert changed != content
    path.write_bytes(changed)


def change_pixdim(path: Path, axis: int, millimetres: float) -> None:
    """Of an uncompressed NIfTI; axis 1 to 3 counts from the columns."""
    content = bytearray(path.read_bytes())
    struct.pack_into("<f", content, 76 + 4 * axis, millimetres)
    path.write_bytes(content)


def shear(path: Path, amount: float) -> None:
    """Of an uncompressed NIfTI: its only matrix has slices that are shifted by ``amount`` times their distance."""
    content = bytearray(path.read_bytes())
    x, y, z = struct.unpack_from("<3f", content, 80)
    struct.pack_into("<hh", content, 252, 0, 1)  # no quaternion, only the matrix
    for row, values in enumerate(((-x, 0, amount * z, 0), (0, -y, 0, 0), (0, 0, z, 0))):
        struct.pack_into("<4f", content, 280 + 16 * row, *values)
    path.write_bytes(content)


# ---------------------------------------------------------------- importing it


def command(*arguments: object) -> list[str]:
    return ["import", "-d", str(ID), "-n", "Test", "-np", "1", *map(str, arguments)]


def run(*arguments: object) -> None:
    main(command(*arguments))


def error_of(*arguments: object) -> str:
    with pytest.raises(SystemExit) as exit_info:
        run(*arguments)
    message = str(exit_info.value.code)
    assert message.startswith("nnUNetv2_vf: error: ")
    assert "\n" not in message
    return message


def report(dataset: Path) -> list[dict[str, str]]:
    with (dataset / "import_report.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def reasons(dataset: Path) -> dict[str, str]:
    """Of each source's file name: 'accepted' or the kind of its rejection."""
    return {Path(row["source"]).name: row["reason"].partition(":")[0] or row["status"] for row in report(dataset)}


def description(dataset: Path) -> dict:
    return json.loads((dataset / "dataset.json").read_text())


def check_consistent(dataset: Path) -> None:
    """Report, description and files tell the same, and nothing is left behind."""
    cases = {row["case"] for row in report(dataset) if row["status"] == "accepted"}
    told = description(dataset)
    assert set(told["dataset"]) == cases
    assert told["numTraining"] == len(cases) > 0
    images = {dataset / name for case in told["dataset"].values() for name in case["images"]}
    labels = {dataset / case["label"] for case in told["dataset"].values()}
    assert {*(dataset / "imagesTr").iterdir()} == images
    assert {*(dataset / "labelsTr").iterdir()} == labels
    assert not list((dataset / "import_journals").glob("*.scratch"))
    assert not (dataset / "import_report_refused.csv").exists()


def content(dataset: Path) -> dict[str, bytes]:
    """Every file that a user reads, by its path; not the journals, nor the picture."""
    return {
        str(path.relative_to(dataset)): path.read_bytes()
        for path in sorted(dataset.rglob("*"))
        if path.is_file() and "import_journals" not in path.parts and path.suffix != ".png"
    }


def check_whole(dataset: Path) -> None:
    """Every image that is there can be read to its end, and has a label."""
    for path in (dataset / "imagesTr").iterdir():
        assert sitk.GetArrayFromImage(sitk.ReadImage(str(path))).std() > 0
        label = dataset / "labelsTr" / path.name.replace("_0000", "")
        assert sitk.GetArrayFromImage(sitk.ReadImage(str(label))).max() == 1


def start(raw: Path, *arguments: object) -> subprocess.Popen:
    words = [sys.executable, "-m", "nnunetv2_vf", *command(*arguments)]
    return subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def children(process: subprocess.Popen) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def wait_until(condition, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


# ---------------------------------------------------------------- volumes that are rejected


def write_rejected(data: Path) -> dict[str, str]:
    """One source for every reason, and the reason."""
    write(data / "a_good.nii.gz", ct(0))
    write(data / "small.nii.gz", ct(0, (15, 24, 28)))
    write(data / "flat.nii.gz", ct(0)[0], (1.0, 1.0))
    change_pixdim(write(data / "zero_spacing.nii", ct(1)), 1, 0.0)
    change_header(write(data / "no_spacing.mha", ct(1)), rb"ElementSpacing[^\n]*\n", b"")
    write(data / "far.nii.gz", ct(1), (21.0, 1.0, 1.0))
    array = mr(0)
    array[0, 0, 0] = np.nan
    write(data / "nan.nii.gz", array)
    array[0, 0, 0] = np.inf
    write(data / "inf.nrrd", array)
    write(data / "constant.nii.gz", ct(0) * 0)
    cut_off(write(data / "cut_off.nii.gz", ct(2)))
    (data / "text.nii.gz").write_text("no image")
    (data / "gone.nii.gz").symlink_to(data / "nowhere")
    write(data / "same.mha", ct(0))
    shear(write(data / "sheared.nii", ct(3)), 0.2)
    sitk.WriteImage(sitk.Compose([image(ct(0).astype(np.uint8))] * 3), str(data / "colour.nrrd"))
    write_dicom(data / "gap", ct(4), skip=(7,))
    write_dicom(data / "segmentation", ct(4), series=2, tags={"0008|0060": "SEG"})
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
        "cut_off.nii.gz": "unreadable",
        "text.nii.gz": "unreadable",
        "gone.nii.gz": "unreadable",
        "same.mha": "duplicate",
        "sheared.nii": "direction",
        "colour.nrrd": "vector",
        "gap": "slices",
        "segmentation": "modality",
    }
