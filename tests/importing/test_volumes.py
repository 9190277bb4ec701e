from __future__ import annotations

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from unlabelled_data import (
    SHAPE,
    SPACING,
    change_text_header,
    check_only_volume,
    ct,
    make_image,
    mr,
    read_all,
    shear_nifti,
    write_volume,
)

from nnunetv2_vf.importing.settings import Selection
from nnunetv2_vf.importing.volumes import check_volume


@pytest.mark.parametrize("shape", [(15, 24, 28), (20, 15, 28), (20, 24, 15)])
def test_a_volume_with_a_side_that_is_too_short_is_rejected(tmp_path, shape):
    path = write_volume(tmp_path / "a.nii.gz", ct(0, shape))
    assert (
        check_only_volume(path)
        == f"size: {' x '.join(map(str, shape))} voxels; needs 3 axes with at least 16 voxels each"
    )
    assert check_only_volume(path, min_size=15) == "fine"


def test_a_single_slice_is_rejected(tmp_path):
    path = write_volume(tmp_path / "a.nii.gz", ct(0)[0], SPACING[1:])
    assert check_only_volume(path).startswith("size: 24 x 28 voxels")


def test_a_spacing_above_the_limit_is_rejected(tmp_path):
    path = write_volume(tmp_path / "a.nii.gz", ct(0), (25.0, 1.0, 1.0))
    assert check_only_volume(path) == "spacing: 25 mm, more than 20"
    assert check_only_volume(path, max_spacing=25) == "fine"


def test_the_fine_spacing_of_optical_coherence_tomography_is_accepted(tmp_path):
    assert check_only_volume(write_volume(tmp_path / "a.mha", ct(0), (0.047, 0.00196, 0.0117))) == "fine"


def test_a_spacing_in_metres_is_rejected(tmp_path):
    path = write_volume(tmp_path / "a.nii.gz", ct(0), (0.003, 0.001, 0.001))
    assert check_only_volume(path) == "spacing: 0.003 mm on the longest side of a voxel; is it in metres?"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nonfinite_voxels_are_rejected_or_set_to_the_lowest_finite_value(tmp_path, value):
    array = mr(0)
    array[3, 4, 5] = value
    path = write_volume(tmp_path / "a.nii.gz", array)
    assert check_only_volume(path) == "nonfinite: 1 voxels are NaN or infinite"
    (volume,) = read_all(path)
    assert check_only_volume(path, keep=("nonfinite",)) == "nonfinite: 1 voxels set to the lowest finite value"
    check_volume(volume, Selection(keep=("nonfinite",)))
    repaired = sitk.GetArrayFromImage(volume.images[0])
    assert repaired[3, 4, 5] == mr(0).min()
    assert volume.images[0].GetSpacing() == pytest.approx(SPACING[::-1])


@pytest.mark.parametrize("keep", [(), ("nonfinite",)])
def test_a_volume_of_nan_is_always_rejected(tmp_path, keep):
    path = write_volume(tmp_path / "a.nii.gz", np.full(SHAPE, np.nan, np.float32))
    assert check_only_volume(path, keep=keep).startswith("nonfinite")


def test_constant_volumes_are_rejected(tmp_path):
    path = write_volume(tmp_path / "a.nii.gz", np.zeros(SHAPE, np.int16))
    assert check_only_volume(path) == "constant: all intensities are between 0 and 0"
    nearly_constant = np.full(SHAPE, 7, np.int16)
    nearly_constant[0] = 6
    path = write_volume(tmp_path / "b.nii.gz", nearly_constant)
    assert check_only_volume(path) == "fine"
    assert check_only_volume(path, min_range=1).startswith("constant")


@pytest.mark.parametrize("ending", ["nii", "mha"])
@pytest.mark.parametrize(
    ("amount", "keep", "expected"),
    [
        (0.002, (), "direction: made orthonormal"),  # a header written with two digits
        (0.05, (), "direction: axes are not at right angles"),
        (0.05, ("direction",), "direction: made orthonormal"),
    ],
)
def test_directions_are_made_orthonormal_or_rejected(tmp_path, ending, amount, keep, expected):
    path = write_volume(tmp_path / f"a.{ending}", ct(0))
    if ending == "nii":
        shear_nifti(path, amount)
    else:
        change_text_header(
            path, rb"TransformMatrix = 1 0 0 0 1 0 0 0 1", b"TransformMatrix = 1 0 0 0 1 0 %f 0 1" % amount
        )
    assert check_only_volume(path, keep=keep).startswith(expected)
    if expected == "direction: made orthonormal":
        (volume,) = read_all(path, keep=keep)
        check_volume(volume, Selection(keep=keep))
        matrix = np.reshape(volume.images[0].GetDirection(), (3, 3))
        np.testing.assert_allclose(matrix @ matrix.T, np.eye(3), atol=1e-6)
        sitk.WriteImage(volume.images[0], str(tmp_path / "repaired.nii.gz"))
        sitk.ReadImage(str(tmp_path / "repaired.nii.gz"))  # ITK, with which nnU-Net reads, refuses other directions


def test_colour_images_are_rejected(tmp_path):
    grey = make_image(ct(0).astype(np.uint8))
    sitk.WriteImage(sitk.Compose([grey] * 3), str(tmp_path / "a.nrrd"))
    assert check_only_volume(tmp_path / "a.nrrd").startswith("vector")


def test_channels_on_different_grids_are_rejected(tmp_path):
    write_volume(tmp_path / "a_0000.nii.gz", mr(0))
    write_volume(tmp_path / "a_0001.nii.gz", mr(1))
    assert check_only_volume(tmp_path) == "fine"
    write_volume(tmp_path / "a_0001.nii.gz", mr(1), (2.0, 1.5, 1.0005))
    assert check_only_volume(tmp_path) == "channels: put on the grid of the first"
    write_volume(tmp_path / "a_0001.nii.gz", mr(1), (2.0, 1.5, 1.5))
    assert check_only_volume(tmp_path) == "channels: not on the same grid"
    write_volume(tmp_path / "a_0001.nii.gz", mr(1, (21, 24, 28)))
    assert check_only_volume(tmp_path) == "channels: not on the same grid"


def test_the_content_hash_depends_on_voxels_and_spacing_but_not_on_the_format(tmp_path):
    def digest(name, array, spacing=SPACING):
        (volume,) = read_all(write_volume(tmp_path / name, array, spacing))
        return check_volume(volume, Selection()).content_hash

    first = digest("a.nii.gz", ct(0))
    assert digest("a.nrrd", ct(0)) == digest("b.mha", ct(0).astype(np.float64)) == first
    other = ct(0)
    other[0, 0, 0] += 1
    assert len({first, digest("c.nrrd", other), digest("d.nrrd", ct(0), (2, 1.5, 1.1))}) == 3
