from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from nnunetv2_vf.pretext import fusion
from nnunetv2_vf.pretext.augmentation import adjust_intensity, draw_augmentation
from nnunetv2_vf.pretext.fusion import draw_blocks, draw_boxes, draw_fusion_map, fuse, fuse_batch
from nnunetv2_vf.settings import VFSettings

PAPER_PATCH = (64, 128, 128)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


# ---------------------------------------------------------------- the two laws: X = a I_f + (1 - a) I_b; Y = K a


@pytest.mark.parametrize("steps", [1, 3, 4, 10])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_fused_image_is_exactly_the_mix(steps, channels):
    generator = torch.Generator().manual_seed(steps)
    foreground, background = torch.randn(2, 2, channels, 5, 6, 7, generator=generator)
    fusion_map = torch.randint(0, steps + 1, (2, 5, 6, 7), generator=generator, dtype=torch.uint8)
    fused = fuse(foreground, background, fusion_map, steps)
    a = fusion_map[:, None].double() / steps
    expected = a * foreground.double() + (1 - a) * background.double()
    torch.testing.assert_close(fused.double(), expected, rtol=0, atol=1e-6)
    pure = (fusion_map == 0)[:, None].expand_as(fused)
    assert torch.equal(fused[pure], background[pure])
    pure = (fusion_map == steps)[:, None].expand_as(fused)
    assert torch.equal(fused[pure], foreground[pure])


@pytest.mark.parametrize("piece", [1, 500, 10**9])
def test_a_batch_is_augmented_and_fused_alike_in_pieces_of_any_size(piece, monkeypatch):
    monkeypatch.setattr(fusion, "_CACHED_VOXELS", piece)
    generator = torch.Generator().manual_seed(0)
    settings = VFSettings()
    drawn = [draw_augmentation(2, settings, rng(seed)) for seed in range(3)]
    subvolumes = torch.randn(2, 3, 2, 9, 10, 11, generator=generator)
    parameters = {name: torch.stack([sample[name] for sample in drawn]) for name in drawn[0]}
    batch = {
        "foreground": subvolumes[0].clone(),
        "background": subvolumes[1].clone(),
        "fusion_map": torch.stack([draw_boxes((9, 10, 11), settings, rng(seed)) for seed in range(3)]),
        **parameters,
    }
    fused = fuse_batch(batch, 4, torch.device("cpu"))
    pair = adjust_intensity(subvolumes.transpose(0, 1), **parameters).unbind(1)
    torch.testing.assert_close(fused.fused, fuse(*pair, batch["fusion_map"], 4))
    assert torch.equal(torch.stack([batch["foreground"], batch["background"]]), subvolumes), "the batch is left alone"
    assert fused.fusion_map is batch["fusion_map"]


@pytest.mark.parametrize("steps", [1, 4, 7])
def test_the_label_is_k_times_the_coefficient(steps):
    foreground, background = torch.ones(1, 1, 8, 8, 8), torch.zeros(1, 1, 8, 8, 8)
    fusion_map = draw_boxes((8, 8, 8), VFSettings(coefficient_steps=steps), rng())[None]
    coefficient = fuse(foreground, background, fusion_map, steps)[:, 0]  # 1 in the one and 0 in the other: a itself
    torch.testing.assert_close(coefficient * steps, fusion_map.float())


# ---------------------------------------------------------------- both maps


@pytest.mark.parametrize("kind", ["boxes", "blocks"])
@pytest.mark.parametrize("patch", [(8, 8, 8), (9, 40, 8), (40, 56, 40), PAPER_PATCH])
def test_maps_of_any_patch_hold_classes_0_to_k_and_are_reproducible(kind, patch):
    settings = VFSettings(fusion_map=kind)
    fusion_map = draw_fusion_map(patch, settings, rng(3))
    assert fusion_map.shape == patch
    assert fusion_map.dtype == torch.uint8
    assert fusion_map.max() <= 4
    assert torch.equal(fusion_map, draw_fusion_map(patch, settings, rng(3)))


@pytest.mark.parametrize("kind", ["boxes", "blocks"])
def test_maps_differ_from_draw_to_draw(kind):
    generator = rng()
    maps = [draw_fusion_map((24, 32, 32), VFSettings(fusion_map=kind), generator) for _ in range(10)]
    assert len({fusion_map.numpy().tobytes() for fusion_map in maps}) == 10


# ---------------------------------------------------------------- boxes


def single_boxes(patch: tuple[int, int, int], count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sides (count, 3), starts (count, 3) and classes (count,) of maps that hold one box each."""
    settings, generator = VFSettings(box_count=(1, 1)), rng()
    sides, starts, classes = [], [], []
    for _ in range(count):
        fusion_map = draw_boxes(patch, settings, generator).numpy()
        where = np.nonzero(fusion_map)
        lows, highs = np.array([w.min() for w in where]), np.array([w.max() + 1 for w in where])
        assert (fusion_map != 0).sum() == (highs - lows).prod(), "a box is full"
        sides.append(highs - lows)
        starts.append(lows)
        classes.append(fusion_map.max())
    return np.array(sides), np.array(starts), np.array(classes)


def test_box_sides_and_classes_are_the_papers():
    sides, starts, classes = single_boxes(PAPER_PATCH, 600)
    for axis, longest in enumerate((40, 80, 80)):
        values = sides[:, axis]
        assert values.min() >= 8
        assert values.max() <= longest
        assert values.min() <= 8 + 2
        assert values.max() >= longest - 2
        standard_error = (longest - 8) / np.sqrt(12 * len(values))
        assert abs(values.mean() - (8 + longest) / 2) < 4 * standard_error
    room = np.array(PAPER_PATCH) - sides
    relative = starts / room
    assert (starts >= 0).all()
    assert (starts <= room).all()
    assert abs(relative.mean() - 0.5) < 0.05
    assert np.bincount(classes, minlength=5)[1:].min() > 600 / 4 * 0.7


def test_box_bounds_scale_with_the_patch():
    sides, _, _ = single_boxes((8, 24, 160), 200)
    assert (sides[:, 0] == 8).all()
    assert sides[:, 1].min() >= 8
    assert sides[:, 1].max() == 15  # 62.5 % of 24
    assert 90 <= sides[:, 2].max() <= 100


def slow_boxes(patch: tuple[int, int, int], seed: int) -> np.ndarray:
    """The paper's sentence, word by word, with another random generator."""
    draw = random.Random(seed)
    fusion_map = np.zeros(patch, int)
    for _ in range(draw.randint(10, 40)):
        sides = [draw.randint(8, int(0.625 * n)) for n in patch]
        starts = [draw.randint(0, n - s) for n, s in zip(patch, sides, strict=True)]
        box = tuple(slice(a, a + s) for a, s in zip(starts, sides, strict=True))
        fusion_map[box] = draw.randint(1, 4)
    return fusion_map


def test_box_maps_have_the_statistics_of_a_plain_restatement():
    patch, count, generator = (32, 48, 48), 300, rng(1)
    ours = np.stack([draw_boxes(patch, VFSettings(), generator).numpy() for _ in range(count)])
    slow = np.stack([slow_boxes(patch, seed) for seed in range(count)])
    for label in range(5):
        shares_ours, shares_slow = ((maps == label).mean(axis=(1, 2, 3)) for maps in (ours, slow))
        error = np.hypot(shares_ours.std(), shares_slow.std()) / np.sqrt(count)
        assert abs(shares_ours.mean() - shares_slow.mean()) < 4 * error


# ---------------------------------------------------------------- blocks


def test_blocks_are_one_grid_of_equal_blocks_with_the_published_share_of_foreground():
    settings = VFSettings(fusion_map="blocks", block_side=(8, 8))
    fusion_map = draw_blocks((64, 64, 64), settings, rng()).numpy()
    blocks = fusion_map.reshape(8, 8, 8, 8, 8, 8).transpose(0, 2, 4, 1, 3, 5).reshape(512, -1)
    assert (blocks == blocks[:, :1]).all()
    classes = np.bincount(blocks[:, 0], minlength=5)
    assert classes[1:].sum() in (358, 359)  # 70 % of 512
    assert classes[1:].min() > 512 * 0.7 / 4 * 0.6


def test_the_share_of_foreground_holds_for_a_single_block():
    settings = VFSettings(fusion_map="blocks")
    generator = rng()
    foreground = [bool(draw_blocks((8, 8, 8), settings, generator).any()) for _ in range(500)]
    assert np.mean(foreground) == pytest.approx(0.7, abs=0.08)


def test_the_grid_lies_at_a_random_offset_and_blocks_are_whole():
    settings = VFSettings(fusion_map="blocks", block_side=(10, 10), block_foreground=1)
    generator = rng()
    covered = [draw_blocks((24, 24, 24), settings, generator).numpy() != 0 for _ in range(60)]
    starts = {int(np.nonzero(mask)[0].min()) for mask in covered}
    assert starts == set(range(5))  # 24 = 2 * 10 + 4
    assert all(mask.sum() == 20**3 for mask in covered)


def test_block_sides_span_the_published_range():
    settings = VFSettings(fusion_map="blocks", block_foreground=1, coefficient_steps=100)
    generator, sides = rng(), []
    for _ in range(200):
        column = draw_blocks((128, 8, 8), settings, generator).numpy()[:, 4, 4]
        borders = np.nonzero(np.diff(column))[0]
        sides.extend(np.diff(borders))
    assert min(sides) >= 8
    assert min(sides) == 8
    # two neighbouring blocks of one class look like one: look at the shorter ones only
    assert {s for s in sides if s <= 32} == set(range(8, 33))
