"""The pretext task: X = a * I_f + (1 - a) * I_b, Y = K * a; fusion maps of boxes and of blocks."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from nnunetv2_vf.pretext import fusion
from nnunetv2_vf.pretext.augmentation import draw_augmentation, fit_intensity_transform
from nnunetv2_vf.pretext.fusion import draw_blocks, draw_boxes, draw_fusion_map, fuse, fuse_batch
from nnunetv2_vf.settings import VFSettings

PAPER_PATCH = (64, 128, 128)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


# ---------------------------------------------------------------- fusing


@pytest.mark.parametrize("steps", [1, 3, 4, 10])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_fused_volume_is_the_weighted_sum_of_both_subvolumes(steps, channels):
    generator = torch.Generator().manual_seed(steps)
    foreground, background = torch.randn(2, 2, channels, 5, 6, 7, generator=generator)
    fusion_map = torch.randint(0, steps + 1, (2, 5, 6, 7), generator=generator, dtype=torch.uint8)
    fused = fuse(foreground, background, fusion_map, steps)
    a = fusion_map[:, None].double() / steps
    expected = a * foreground.double() + (1 - a) * background.double()
    torch.testing.assert_close(fused.double(), expected, rtol=0, atol=1e-6)
    is_background = (fusion_map == 0)[:, None].expand_as(fused)
    assert torch.equal(fused[is_background], background[is_background])
    is_foreground = (fusion_map == steps)[:, None].expand_as(fused)
    assert torch.equal(fused[is_foreground], foreground[is_foreground])


@pytest.mark.parametrize("steps", [1, 4, 7])
def test_the_class_of_a_voxel_is_k_times_its_coefficient(steps):
    foreground, background = torch.ones(1, 1, 8, 8, 8), torch.zeros(1, 1, 8, 8, 8)
    fusion_map = draw_boxes((8, 8, 8), VFSettings(coefficient_steps=steps), rng())[None]
    coefficient = fuse(foreground, background, fusion_map, steps)[:, 0]  # a * 1 + (1 - a) * 0
    torch.testing.assert_close(coefficient * steps, fusion_map.float())


@pytest.mark.parametrize("slab_voxels", [1, 500, 10**9])
def test_a_batch_is_augmented_and_fused_in_slabs_of_any_size(slab_voxels, monkeypatch):
    monkeypatch.setattr(fusion, "_SLAB_VOXELS", slab_voxels)
    settings = VFSettings()
    samples = [draw_augmentation(2, settings, rng(seed)) for seed in range(3)]
    parameters = {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}
    subvolumes = torch.randn(2, 3, 2, 9, 10, 11, generator=torch.Generator().manual_seed(0))
    batch = {
        "foreground": subvolumes[0].clone(),
        "background": subvolumes[1].clone(),
        "fusion_map": torch.stack([draw_boxes((9, 10, 11), settings, rng(seed)) for seed in range(3)]),
        **parameters,
    }
    fused = fuse_batch(batch, 4)
    pairs = subvolumes.transpose(0, 1)  # B, 2, C, D, H, W
    foreground, background = fit_intensity_transform(pairs, **parameters)(pairs).unbind(1)
    torch.testing.assert_close(fused, fuse(foreground, background, batch["fusion_map"], 4))
    unchanged = torch.stack([batch["foreground"], batch["background"]])
    assert torch.equal(unchanged, subvolumes), "the batch is not changed"


# ---------------------------------------------------------------- fusion maps of both kinds


@pytest.mark.parametrize("kind", ["boxes", "blocks"])
@pytest.mark.parametrize("patch", [(8, 8, 8), (9, 40, 8), (40, 56, 40), PAPER_PATCH])
def test_fusion_maps_of_any_patch_have_classes_0_to_k_and_are_reproducible(kind, patch):
    settings = VFSettings(fusion_map=kind)
    fusion_map = draw_fusion_map(patch, settings, rng(3))
    assert fusion_map.shape == patch
    assert fusion_map.dtype == torch.uint8
    assert fusion_map.max() <= 4
    assert torch.equal(fusion_map, draw_fusion_map(patch, settings, rng(3)))


@pytest.mark.parametrize("kind", ["boxes", "blocks"])
def test_every_draw_gives_another_fusion_map(kind):
    generator = rng()
    maps = [draw_fusion_map((24, 32, 32), VFSettings(fusion_map=kind), generator) for _ in range(10)]
    assert len({fusion_map.numpy().tobytes() for fusion_map in maps}) == 10


# ---------------------------------------------------------------- boxes


def single_boxes(patch: tuple[int, int, int], count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return sides (count, 3), starts (count, 3) and classes (count,) of fusion maps with one box each."""
    settings, generator = VFSettings(box_count=(1, 1)), rng()
    sides, starts, classes = [], [], []
    for _ in range(count):
        fusion_map = draw_boxes(patch, settings, generator).numpy()
        covered = [np.flatnonzero(fusion_map.any(axis=axes)) for axes in ((1, 2), (0, 2), (0, 1))]
        lows, highs = np.array([c[0] for c in covered]), np.array([c[-1] + 1 for c in covered])
        assert np.count_nonzero(fusion_map) == (highs - lows).prod(), "a box has no holes"
        sides.append(highs - lows)
        starts.append(lows)
        classes.append(fusion_map.max())
    return np.array(sides), np.array(starts), np.array(classes)


def test_box_sides_positions_and_classes_have_the_papers_distribution():
    sides, starts, classes = single_boxes(PAPER_PATCH, 600)
    for axis, longest in enumerate((40, 80, 80)):
        values = sides[:, axis]
        assert 8 <= values.min() <= 8 + 2
        assert longest - 2 <= values.max() <= longest
        standard_error = (longest - 8) / np.sqrt(12 * len(values))
        assert abs(values.mean() - (8 + longest) / 2) < 4 * standard_error
    room = np.array(PAPER_PATCH) - sides
    assert (starts >= 0).all()
    assert (starts <= room).all()
    assert abs((starts / room).mean() - 0.5) < 0.05
    assert np.bincount(classes, minlength=5)[1:].min() > 600 / 4 * 0.7


def test_box_sides_scale_with_the_patch():
    sides, _, _ = single_boxes((8, 24, 160), 200)
    assert (sides[:, 0] == 8).all()
    assert sides[:, 1].min() >= 8
    assert sides[:, 1].max() == 15  # 62.5 % of 24
    assert 90 <= sides[:, 2].max() <= 100


def reference_boxes(patch: tuple[int, int, int], seed: int) -> np.ndarray:
    """Return a fusion map as the paper describes it, drawn with another random generator."""
    draw = random.Random(seed)
    fusion_map = np.zeros(patch, np.uint8)
    for _ in range(draw.randint(10, 40)):
        sides = [draw.randint(8, int(0.625 * length)) for length in patch]
        starts = [draw.randint(0, length - side) for length, side in zip(patch, sides, strict=True)]
        box = tuple(slice(start, start + side) for start, side in zip(starts, sides, strict=True))
        fusion_map[box] = draw.randint(1, 4)
    return fusion_map


def test_the_share_of_every_class_equals_that_of_the_papers_description():
    patch, count, generator = (32, 48, 48), 300, rng(1)
    maps = [draw_boxes(patch, VFSettings(), generator).numpy() for _ in range(count)]
    references = [reference_boxes(patch, seed) for seed in range(count)]
    shares, expected = (
        np.stack([np.bincount(fusion_map.ravel(), minlength=5) for fusion_map in drawn]) / np.prod(patch)
        for drawn in (maps, references)
    )
    errors = np.hypot(shares.std(0), expected.std(0)) / np.sqrt(count)
    assert (abs(shares.mean(0) - expected.mean(0)) < 4 * errors).all()


# ---------------------------------------------------------------- blocks


def test_blocks_form_one_grid_of_equal_blocks_with_the_published_share_of_foreground():
    settings = VFSettings(fusion_map="blocks", block_side=(8, 8))
    fusion_map = draw_blocks((64, 64, 64), settings, rng()).numpy()
    blocks = fusion_map.reshape(8, 8, 8, 8, 8, 8).transpose(0, 2, 4, 1, 3, 5).reshape(512, -1)
    assert (blocks == blocks[:, :1]).all()
    classes = np.bincount(blocks[:, 0], minlength=5)
    assert classes[1:].sum() in (358, 359)  # 70 % of 512
    assert classes[1:].min() > 512 * 0.7 / 4 * 0.6


def test_a_single_block_is_foreground_with_the_published_probability():
    settings = VFSettings(fusion_map="blocks")
    generator = rng()
    is_foreground = [bool(draw_blocks((8, 8, 8), settings, generator).any()) for _ in range(500)]
    assert np.mean(is_foreground) == pytest.approx(0.7, abs=0.08)


def test_the_grid_has_a_random_offset_and_whole_blocks_only():
    settings = VFSettings(fusion_map="blocks", block_side=(10, 10), block_foreground=1)
    generator = rng()
    masks = [draw_blocks((24, 24, 24), settings, generator).numpy() != 0 for _ in range(60)]
    assert {int(np.nonzero(mask)[0].min()) for mask in masks} == set(range(5))  # 24 = 2 * 10 + 4
    assert all(mask.sum() == 20**3 for mask in masks)


def test_block_sides_have_the_published_range():
    settings = VFSettings(fusion_map="blocks", block_foreground=1, coefficient_steps=100)
    generator, sides = rng(), []
    for _ in range(200):
        column = draw_blocks((128, 8, 8), settings, generator).numpy()[:, 4, 4]
        borders = np.nonzero(np.diff(column))[0]
        sides.extend(np.diff(borders))
    assert min(sides) == 8
    # Two neighbouring blocks of the same class look like one block; longer sides are ignored for that reason.
    assert {side for side in sides if side <= 32} == set(range(8, 33))
