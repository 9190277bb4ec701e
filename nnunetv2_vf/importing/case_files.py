"""The image and label files of a dataset's cases.

Every file is written to a scratch folder and then renamed, so no file in the dataset is ever half-written.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import SimpleITK as sitk  # noqa: N813  the package's own convention

from nnunetv2_vf.importing.images import NIFTI_IO, error_line

# Files of cases that sources.case_name has named: NAME_<hash>, _v<number> for a volume of a 4D file, _<channel>.
_IMPORTED_FILE = re.compile(r".+_[0-9a-f]{12}(_v\d{3,})?(_\d{4})?\.[a-z.]+")
_NIFTI_HEADER_BYTES = 352


class CannotWriteError(Exception):
    """A file of the dataset cannot be written, for example because the disk is full."""


@dataclass(frozen=True)
class CaseFiles:
    """The files of all cases in ``imagesTr`` and ``labelsTr`` of a dataset.

    Attributes:
        dataset_folder: the dataset, on the same file system as the scratch folder.
        scratch_folder: where files are written before they are renamed. Each part of an import has its own.
        file_ending: ending of all files.
        num_channels: number of images per case.
    """

    dataset_folder: Path
    scratch_folder: Path
    file_ending: str
    num_channels: int

    @property
    def images_folder(self) -> Path:
        return self.dataset_folder / "imagesTr"

    @property
    def labels_folder(self) -> Path:
        return self.dataset_folder / "labelsTr"

    def image_names(self, case: str) -> list[str]:
        """Return the file names of a case's channels."""
        return [f"{case}_{channel:04d}{self.file_ending}" for channel in range(self.num_channels)]

    def label_name(self, case: str) -> str:
        """Return the file name of a case's label."""
        return f"{case}{self.file_ending}"

    def complete_cases(self) -> set[str]:
        """Return the cases whose files all exist. Broken links and empty files (after a power failure) do not count."""
        images, labels = (
            {entry.name for entry in os.scandir(folder) if entry.is_file() and entry.stat().st_size > 0}
            for folder in (self.images_folder, self.labels_folder)
        )
        cases = (name.removesuffix(self.file_ending) for name in labels)
        return {case for case in cases if images.issuperset(self.image_names(case))}

    def write(self, case: str, images: Sequence[sitk.Image], label: sitk.Image, link_targets: Sequence[str]) -> None:
        """Write the files of a case. The label is written first, so a case that has all its images also has its label.

        Args:
            link_targets: files to link to, one per channel, instead of writing the images; empty to write them.

        Raises:
            CannotWriteError: a file cannot be written.
        """
        try:
            name = self.label_name(case)
            _write_image(label, self.scratch_folder / name)
            (self.scratch_folder / name).replace(self.labels_folder / name)
            for channel, name in enumerate(self.image_names(case)):
                if link_targets:
                    (self.scratch_folder / name).unlink(missing_ok=True)  # a killed process may have left it
                    (self.scratch_folder / name).symlink_to(link_targets[channel])
                else:
                    _write_image(images[channel], self.scratch_folder / name)
                (self.scratch_folder / name).replace(self.images_folder / name)
        except OSError as error:
            raise CannotWriteError(error_line(error)) from error

    def remove_other_cases(self, cases: Collection[str]) -> None:
        """Remove all files that an import has written, except those of the given cases."""
        images = {name for case in cases for name in self.image_names(case)}
        labels = {self.label_name(case) for case in cases}
        for folder, kept in ((self.images_folder, images), (self.labels_folder, labels)):
            for path in folder.iterdir():
                if path.name not in kept and _IMPORTED_FILE.fullmatch(path.name):
                    path.unlink(missing_ok=True)


def _write_image(image: sitk.Image, path: Path) -> None:
    try:
        image_io = NIFTI_IO if ".nii" in path.suffixes else ""
        sitk.WriteImage(image, str(path), useCompression=True, imageIO=image_io)
    except RuntimeError as error:
        raise CannotWriteError(error_line(error)) from error
    if not _is_complete(path, image):
        raise CannotWriteError("a file is shorter than its image; is the disk full?")


def _is_complete(path: Path, image: sitk.Image) -> bool:
    """True if the file holds the whole image. On a full disk ITK reports an error for all formats but NIfTI."""
    required = _NIFTI_HEADER_BYTES + image.GetNumberOfPixels() * image.GetSizeOfPixelComponent()
    if path.name.endswith(".nii"):
        return path.stat().st_size >= required
    if path.name.endswith(".nii.gz"):  # its last four bytes are the length of the uncompressed data
        with path.open("rb") as file:
            file.seek(-min(4, path.stat().st_size), os.SEEK_END)
            return int.from_bytes(file.read(), "little") == required % 2**32
    return True
