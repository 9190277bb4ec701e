"""Folders of nnU-Net for datasets that the tests make themselves."""

from __future__ import annotations

from pathlib import Path

import pytest


def set_folders(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Make nnU-Net's three folders below a folder, and set their variables."""
    for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (folder / variable).mkdir(parents=True, exist_ok=True)
        patch.setenv(variable, str(folder / variable))
