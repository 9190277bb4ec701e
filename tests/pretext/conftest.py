from __future__ import annotations

import pytest
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from preprocessed_cases import noise, save_cases


@pytest.fixture(scope="session")
def cases(tmp_path_factory: pytest.TempPathFactory) -> nnUNetDatasetBlosc2:
    """Four cases of noise with two channels, which no test changes."""
    volumes = {f"case_{i}": noise(2, 30, 31 + i, 32, seed=i) for i in range(4)}
    return save_cases(tmp_path_factory.mktemp("cases"), **volumes)
