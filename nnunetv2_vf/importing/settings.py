"""Settings of an import: which volumes are accepted, and how their files are written."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field

from nnunetv2_vf.errors import UserError

CHECKS = ("duplicates", "nonfinite", "direction", "slices", "labels")  # legal values of --keep
FILE_ENDINGS = (".nii.gz", ".nii", ".nrrd", ".mha")  # formats that nnU-Net reads


@dataclass(frozen=True)
class Selection:
    """Limits that a volume must meet to be accepted.

    Attributes:
        min_size: smallest number of slices, rows and columns.
        max_spacing: largest spacing in mm; a larger one is considered an error in the header.
        min_range: a volume is rejected as constant if its intensities span no more than this.
        keep: checks of :data:`CHECKS` that repair a volume instead of rejecting it. Duplicates are kept, non-finite
            voxels are set to the lowest finite value, directions are made orthonormal, unevenly spaced slices are
            treated as evenly spaced, label maps are imported as images.
        split_4d: True splits a 4D file into volumes; False rejects it.

    Raises:
        UserError: a value is not legal.
    """

    min_size: int = 16
    max_spacing: float = 20.0
    min_range: float = 0.0
    keep: tuple[str, ...] = ()
    split_4d: bool = True

    def __post_init__(self) -> None:
        unknown = sorted({*self.keep} - {*CHECKS})
        if unknown:
            raise UserError(f"--keep has no check {unknown[0]!r}; use {', '.join(CHECKS)}, separated by commas")
        if self.min_size < 1:
            raise UserError(f"--min-size is {self.min_size}; it must be at least 1 voxel")
        if not self.max_spacing > 0:
            raise UserError(f"--max-spacing is {self.max_spacing}; it must be more than 0 mm")
        if not self.min_range >= 0:
            raise UserError(f"--min-range is {self.min_range}; it must be at least 0")


@dataclass(frozen=True)
class ImportSettings:
    """Everything that determines the cases of a source and their files.

    A source is imported again when these settings change.

    Attributes:
        selection: which volumes are accepted.
        mask: True makes the body label 1; False makes the whole volume label 1.
        link: link to files that nnU-Net can read as they are, instead of copying them.
        file_ending: ending of the dataset's files.

    Raises:
        UserError: nnU-Net does not read files with this ending.
    """

    selection: Selection = field(default_factory=Selection)
    mask: bool = True
    link: bool = False
    file_ending: str = ".nii.gz"

    def __post_init__(self) -> None:
        if self.file_ending not in FILE_ENDINGS:
            raise UserError(f"--file-ending is {self.file_ending!r}; nnU-Net reads {', '.join(FILE_ENDINGS)}")

    @property
    def digest(self) -> str:
        """A hash of all settings. The journal stores it with every source."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]
