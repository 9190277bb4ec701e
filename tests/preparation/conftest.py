from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprints, plan_experiments, preprocess
from raw_datasets import set_folders

from nnunetv2_vf.demo.phantoms import write_dataset

DATASET_ID, DATASET = 30, "Dataset030_Raw"
CASES = 6


@pytest.fixture(scope="session")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a raw dataset, and what nnU-Net's own commands make of it."""
    folder = tmp_path_factory.mktemp("stock")
    raw = folder / "nnUNet_raw" / DATASET
    with pytest.MonkeyPatch.context() as patch:
        set_folders(folder, patch)
        write_dataset(raw, range(CASES), spacing=16)
        extract_fingerprints([DATASET_ID], num_processes=1)
        plan_experiments([DATASET_ID], gpu_memory_target_in_gb=1)
        preprocess([DATASET_ID], configurations=["3d_fullres"], num_processes=[1])
    return folder


@pytest.fixture
def raw(stock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fast_processes: None) -> Path:
    """A copy of the raw dataset, of which nothing is done."""
    set_folders(tmp_path, monkeypatch)
    return Path(shutil.copytree(stock / "nnUNet_raw" / DATASET, tmp_path / "nnUNet_raw" / DATASET))


@pytest.fixture
def preprocessed(raw: Path, stock: Path) -> Path:
    """The dataset's folder in nnUNet_preprocessed, with plans but without preprocessed cases."""
    folder = raw.parents[1] / "nnUNet_preprocessed" / DATASET
    folder.mkdir()
    for name in ("dataset.json", "dataset_fingerprint.json", "nnUNetPlans.json"):
        shutil.copyfile(stock / "nnUNet_preprocessed" / DATASET / name, folder / name)
    return folder
