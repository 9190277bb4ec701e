"""``nnUNetv2_vf preview`` on datasets with unusable cases."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import DATASET_ID, NUM_CASES
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

from nnunetv2_vf.cli import main
from nnunetv2_vf.pretext.pictures import view_names


def make_constant(folder, case: str) -> None:
    """Replace the image of a preprocessed case by one with equal voxels."""
    data, labels, _, properties = nnUNetDatasetBlosc2(str(folder)).load_case(case)
    data, labels = np.zeros_like(data[:]), labels[:]
    for path in folder.glob(f"{case}*.b2nd"):
        path.unlink()  # blosc2 does not overwrite files
    nnUNetDatasetBlosc2.save_case(data, labels, properties, str(folder / case), (1, 8, 8, 8), (1, 8, 8, 8))


def test_unusable_cases_are_named_and_skipped(copied_dataset, tmp_path, capsys):
    constant = [f"torso_{number:04d}" for number in range(NUM_CASES - 1)]
    for case in constant:
        make_constant(copied_dataset / "nnUNetPlans_3d_fullres", case)
    main(["preview", "-d", str(DATASET_ID), "-n", "2", "-o", str(tmp_path / "preview.png")])
    *skipped, last = capsys.readouterr().out.splitlines()
    assert last == f"wrote {tmp_path / 'preview.png'}"
    assert skipped
    reason = "it has no image content: all voxels are equal, NaN or infinite"
    assert set(skipped) <= {f"skipped case {case}: {reason}" for case in constant}


def test_a_dataset_without_a_usable_case_is_an_error(copied_dataset, tmp_path):
    for number in range(NUM_CASES):
        make_constant(copied_dataset / "nnUNetPlans_3d_fullres", f"torso_{number:04d}")
    with pytest.raises(SystemExit, match=r"no usable sub-volume found in .*; check the images, .* of torso_\d{4}"):
        main(["preview", "-d", str(DATASET_ID), "-o", str(tmp_path / "preview.png")])
    assert not (tmp_path / "preview.png").exists()


def test_views_are_named_by_the_axes_of_the_original_image():
    """nnU-Net may transpose the axes: here, axis 0 of the preprocessed case is axis 1 (y) of the image."""
    assert view_names([0, 1, 2]) == ["along z", "along y", "along x"]
    assert view_names([1, 0, 2]) == ["along y", "along z", "along x"]
