"""Small preprocessed cases, written by nnU-Net's own writer and opened by its own dataset."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2


def save_cases(folder: Path, **volumes: np.ndarray) -> nnUNetDatasetBlosc2:
    """Save volumes (C, D, H, W) as cases with these names, and return the dataset of the folder."""
    for name, data in volumes.items():
        labels = np.zeros((1, *data.shape[1:]), np.int8)
        nnUNetDatasetBlosc2.save_case(
            data.astype(np.float32), labels, {}, str(folder / name), chunks=(1, 16, 16, 16), blocks=(1, 8, 8, 8)
        )
    return nnUNetDatasetBlosc2(str(folder))


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    """Return a volume of normally distributed voxels."""
    return np.random.default_rng(seed).normal(size=shape)
