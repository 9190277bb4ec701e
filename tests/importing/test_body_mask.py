from __future__ import annotations

import numpy as np
import pytest
from unlabelled_data import SHAPE, ct, mr

from nnunetv2_vf.importing.body_mask import find_body, is_hu_like


def test_only_ct_looks_like_hu():
    rng = np.random.default_rng(0)
    assert is_hu_like(ct(0))
    assert is_hu_like(ct(0)[:, 8:16, 8:20].clip(-150))  # cropped to the body: no air, some fat
    assert is_hu_like(np.where(ct(0) < -500, -3024, ct(0)))  # padding
    assert not is_hu_like(mr(0))
    assert not is_hu_like((mr(0) - mr(0).mean()) / mr(0).std())
    assert not is_hu_like(ct(0) + 1024)
    assert not is_hu_like(rng.integers(-4096, 4096, SHAPE))  # the phase of an MR


@pytest.mark.parametrize(("make", "hu_like"), [(ct, True), (mr, False)])
@pytest.mark.parametrize("shape", [SHAPE, (20, 150, 300)])
def test_the_mask_covers_the_body_and_its_holes(make, hu_like, shape):
    array = make(0, shape)
    y, x = np.meshgrid(np.linspace(-1, 1, shape[1]), np.linspace(-1, 1, shape[2]), indexing="ij")
    body = np.broadcast_to(y**2 + x**2 < 0.6, shape)
    mask, note = find_body(array, hu_like)
    assert note == ""
    assert (mask.dtype, mask.shape) == (np.uint8, array.shape)
    overlap = 2 * np.sum(mask * body) / (mask.sum() + body.sum())
    assert overlap > 0.97  # subsampling makes the edge coarse; the lung is a tenth of the slice


def test_a_row_length_that_divides_the_number_of_voxels_does_not_bias_the_percentiles():
    # If every 50th of 100 x 100 x 100 voxels were taken, all of them would lie in two columns.
    array = np.full((100, 100, 100), 5, np.float32) + np.random.default_rng(0).random((100, 100, 100), np.float32)
    array[:, 20:80, 10:40] += 300
    mask, note = find_body(array, False)
    assert note == ""
    np.testing.assert_array_equal(mask, array > 100)
    assert is_hu_like(np.where(array > 100, 40, -1000))


def test_lungs_are_part_of_the_body_although_an_airway_connects_them_to_the_outside():
    array = ct(0)
    closed, _ = find_body(array, True)
    array[7, 12, :14] = -1000  # an airway from the side to the lung
    opened, _ = find_body(array, True)
    other_slices = np.arange(len(array)) != 7
    np.testing.assert_array_equal(opened[other_slices], closed[other_slices])
    assert opened[:, 12, 14].sum() == len(array) - 1


def test_the_table_and_specks_are_not_part_of_the_body():
    array = ct(0)
    array[:, -1, :] = 100
    array[3, 0, 0] = 2000
    mask, _ = find_body(array, True)
    assert not mask[:, -1, :].any()
    assert not mask[3, 0, 0]


def test_one_bright_voxel_does_not_move_the_threshold():
    array = mr(0)
    array[0, 12, 14] = 1e6
    np.testing.assert_array_equal(find_body(array, False)[0], find_body(mr(0), False)[0])


def test_if_no_body_is_found_the_mask_is_all_voxels_above_the_minimum():
    array = np.full(SHAPE, -1000, np.int16)
    array[5, 5, 5] = 40
    array[6:9] = -990
    mask, note = find_body(array, True)
    np.testing.assert_array_equal(mask, array > -1000)
    assert note.startswith("mask: threshold -500 found 0.0% of the voxels")
