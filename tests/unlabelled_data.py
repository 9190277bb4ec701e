"""Small unlabelled volumes in every format that ``import`` reads, whole and damaged."""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import SimpleITK as sitk  # noqa: N813  its own convention

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
