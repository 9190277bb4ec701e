"""Sub-volumes: random boxes, flips, padding, resizing, and crops without contrast."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from preprocessed_cases import noise, save_cases

from nnunetv2_vf.pretext.cases import RejectedCaseError
from nnunetv2_vf.pretext.subvolumes import SubvolumeSampler, draw_box, resize
from nnunetv2_vf.settings import VFSettings

PATCH = (12, 14, 16)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


# ---------------------------------------------------------------- boxes


def test_box_sizes_span_the_crop_scales():
    generator = rng()
    boxes = np.array([draw_box((100, 100, 100), PATCH, (0.7, 1.5), generator) for _ in range(400)])
    sizes = (boxes[:, :, 1] - boxes[:, :, 0]) / PATCH
    assert sizes.min() == pytest.approx(0.7, abs=0.05)
    assert sizes.max() == pytest.approx(1.5, abs=0.05)
    assert sizes.mean() == pytest.approx(1.1, abs=0.03)
    assert boxes.min() >= 0
    assert boxes.max() <= 100


def test_a_box_is_no_longer_than_image_and_patch():
    box = draw_box((13, 100, 5), PATCH, (1.5, 1.5), rng())
    assert box[0] == [0, 13]  # longer than the patch of 12, so the image limits it
    assert box[1][1] - box[1][0] == 21
    assert box[2][1] - box[2][0] == 16  # the image is shorter than the patch of 16, so the patch limits it


# ---------------------------------------------------------------- crops


def test_an_unscaled_subvolume_is_a_part_of_the_image(cases):
    settings = VFSettings(crop_scale=(1, 1), flip_probability=0)
    crops = SubvolumeSampler(cases, PATCH, settings).draw("case_1", 2, rng())
    image = torch.from_numpy(cases.load_case("case_1")[0][:])
    for crop in crops:
        corners = (image[0] == crop[0, 0, 0, 0]).nonzero()
        assert len(corners) == 1
        z, y, x = corners[0]
        assert torch.equal(crop, image[:, z : z + PATCH[0], y : y + PATCH[1], x : x + PATCH[2]])


def test_each_axis_of_each_crop_is_flipped_with_the_given_probability(tmp_path):
    """The image has a ramp along each axis, each in its own channel, which shows the direction of the axis."""
    ramps = np.stack(np.meshgrid(*(np.arange(12.0),) * 3, indexing="ij"))
    sampler = SubvolumeSampler(save_cases(tmp_path, ramps=ramps), (6, 6, 6), VFSettings(flip_probability=0.3))
    crops = [crop for seed in range(6) for crop in sampler.draw("ramps", 100, rng(seed))]
    flipped = np.array([[crop[axis].diff(dim=axis).mean() < 0 for axis in range(3)] for crop in crops])
    np.testing.assert_allclose(flipped.mean(0), 0.3, atol=0.06)
    assert abs(np.corrcoef(flipped.T) - np.eye(3)).max() < 0.15, "axes are independent"
    assert abs(np.corrcoef(flipped[::2, 0], flipped[1::2, 0])[0, 1]) < 0.15, "crops are independent"


def test_small_images_are_centred_and_padded_with_zero_as_in_nnunet(tmp_path):
    cases = save_cases(tmp_path, small=1 + np.abs(noise(1, 6, 20, 16)))
    (subvolume,) = SubvolumeSampler(cases, PATCH, VFSettings(crop_scale=(1, 1))).draw("small", 1, rng())
    assert (subvolume[0, :3] == 0).all()
    assert (subvolume[0, 9:] == 0).all()
    assert (subvolume[0, 3:9] > 0).all()


def test_only_the_voxels_of_the_crops_are_read(cases):
    class RecordingImage:
        def __init__(self, image: Any):
            self.image, self.shape, self.voxels = image, image.shape, 0

        def __getitem__(self, where: Any) -> np.ndarray:
            voxels = self.image[where]
            self.voxels += voxels.size
            return voxels

    class RecordingDataset(nnUNetDatasetBlosc2):
        def load_case(self, identifier: str) -> Any:
            data, *rest = super().load_case(identifier)
            opened.append(RecordingImage(data))
            return opened[-1], *rest

    opened: list[RecordingImage] = []
    sampler = SubvolumeSampler(RecordingDataset(cases.source_folder), PATCH, VFSettings(crop_scale=(1, 1)))
    sampler.draw("case_0", 2, rng())
    (image,) = opened  # both crops come from one open file
    assert image.voxels == 2 * 2 * np.prod(PATCH)


# ---------------------------------------------------------------- images without contrast


def test_crops_of_air_are_replaced(tmp_path):
    mostly_air = np.full((1, 60, 20, 20), -1.0)
    mostly_air[:, :10] = noise(1, 10, 20, 20)
    sampler = SubvolumeSampler(save_cases(tmp_path, scan=mostly_air), PATCH, VFSettings())
    crops = [crop for seed in range(10) for crop in sampler.draw("scan", 2, rng(seed))]
    assert all(crop.std() > 0 for crop in crops)


def test_an_image_that_is_almost_all_air_is_rejected_for_this_draw(tmp_path):
    air = np.zeros((1, 200, 40, 40))
    air[:, 0, 0, 0] = 1
    sampler = SubvolumeSampler(save_cases(tmp_path, air=air), PATCH, VFSettings())
    message = r"is constant or nearly constant: only \d of 100 crops have more than one value"
    with pytest.raises(RejectedCaseError, match=message) as error:
        sampler.draw("air", 2, rng())
    assert not error.value.unusable


@pytest.mark.parametrize("flip_probability", [0, 1])
def test_the_padding_of_a_small_constant_image_is_no_contrast(tmp_path, flip_probability):
    cases = save_cases(tmp_path, flat=np.full((1, 6, 7, 5), 5.0))
    sampler = SubvolumeSampler(cases, PATCH, VFSettings(flip_probability=flip_probability))
    with pytest.raises(RejectedCaseError, match="has no image content") as error:
        sampler.draw("flat", 1, rng())
    assert error.value.unusable


# ---------------------------------------------------------------- resizing


@pytest.mark.parametrize("size", [(9, 14, 11), (6, 20, 7), (13, 9, 16), (1, 30, 8), (12, 14, 14), (12, 9, 17)])
def test_resizing_is_trilinear(size):
    crop = torch.randn(2, *size, generator=torch.Generator().manual_seed(0))
    expected = F.interpolate(crop[None], PATCH, mode="trilinear", align_corners=False)[0]
    torch.testing.assert_close(resize(crop, PATCH), expected, rtol=1e-5, atol=1e-5)


def test_resizing_keeps_a_linear_ramp_linear():
    ramp = torch.arange(20.0).view(1, 20, 1, 1).expand(1, 20, 4, 4)
    small = resize(ramp, (10, 4, 4))[0, :, 0, 0]
    torch.testing.assert_close(small.diff(), torch.full((9,), 2.0))


def test_resizing_to_the_same_size_copies_nothing():
    crop = torch.zeros(1, 20, 4, 4)
    assert resize(crop, (20, 4, 4)) is crop
