from __future__ import annotations

from pathlib import Path

import pytest
from unlabelled_data import DATASET


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fast_processes: None) -> Path:
    """The folder that ``import`` will create in an empty ``nnUNet_raw``."""
    for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (tmp_path / variable).mkdir()
        monkeypatch.setenv(variable, str(tmp_path / variable))
    return tmp_path / "nnUNet_raw" / DATASET


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """An empty folder for unlabelled data."""
    folder = tmp_path / "data"
    folder.mkdir()
    return folder
