"""Batches, outputs and losses of the three pretexts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from nnunetv2_vf.pretext.dataset import TRAINING, PretextDataset
from nnunetv2_vf.pretext.loader import collate
from nnunetv2_vf.pretext.masking import RestorationLoss, RestorationTarget, hide
from nnunetv2_vf.pretext.pictures import draw_examples, make_examples, score_colours
from nnunetv2_vf.pretext.task import PretextLoss, make_batch, output_names, split_output
from nnunetv2_vf.settings import VFSettings
from nnunetv2_vf.settings.pretraining import PRETEXTS

PATCH = (12, 14, 16)
CPU = torch.device("cpu")


def collated(cases, settings: VFSettings) -> dict:
    samples = PretextDataset(cases, PATCH, settings, TRAINING)
    return collate([samples[index] for index in range(2)])


def test_a_mask_changes_nothing_else_of_a_sample(cases):
    fusion = collated(cases, VFSettings())["tensors"]
    joint = collated(cases, VFSettings(pretext="fusion+masked"))["tensors"]
    assert joint.keys() - fusion.keys() == {"mask"}
    assert all(torch.equal(fusion[name], joint[name]) for name in fusion)


def test_each_sample_has_another_mask(cases):
    masks = collated(cases, VFSettings(pretext="masked", mask_side=4))["tensors"]["mask"]
    assert not torch.equal(masks[0], masks[1])


def test_the_masked_pretext_shows_one_subvolume_without_intensity_augmentation(cases):
    settings = VFSettings(pretext="masked", crop_scale=(1, 1), flip_probability=0, pairing="different", mask_side=4)
    batch = collated(cases, settings)
    assert [len(names) for names in batch["cases"]] == [1, 1]
    pretext = make_batch(batch["tensors"], settings, CPU)
    image = cases.load_case(batch["cases"][0][0])[0][:]
    crop = pretext.restoration.volume[0].numpy()
    windows = np.lib.stride_tricks.sliding_window_view(image[0], PATCH)
    assert (windows == crop[0]).all((-3, -2, -1)).any(), "the volume is a crop of the image as it is"
    assert torch.equal(pretext.data, hide(pretext.restoration))
    assert pretext.fusion_map is None


def test_the_joint_pretext_hides_blocks_of_the_fused_volume(cases):
    settings = VFSettings(pretext="fusion+masked", mask_side=4)
    tensors = collated(cases, settings)["tensors"]
    joint = make_batch(tensors, settings, CPU)
    fused = make_batch(tensors, VFSettings(), CPU)
    assert torch.equal(joint.restoration.volume, fused.data)
    assert torch.equal(joint.data, hide(RestorationTarget(fused.data, tensors["mask"])))
    assert torch.equal(joint.fusion_map, tensors["fusion_map"])


@pytest.mark.parametrize(
    ("pretext", "classes", "restored"), [("fusion", 4, 0), ("masked", 0, 2), ("fusion+masked", 4, 2)]
)
def test_the_outputs_are_fusion_classes_then_restored_channels(pretext, classes, restored):
    settings = VFSettings(pretext=pretext, coefficient_steps=3)
    names = output_names(settings, channels=2)
    assert len(names) == len(set(names)) == len(score_colours(settings, 2)) == classes + restored
    output = torch.arange(len(names)).float().view(1, -1, 1, 1, 1)
    parts = split_output(output, settings)
    assert [part.shape[1] for part in parts] == [classes, restored]
    assert torch.equal(torch.cat(parts, 1), output)


class Mean(nn.Module):
    """Stands for nnU-Net's loss."""

    def forward(self, outputs, targets):
        return outputs[0].mean()


def test_the_joint_loss_is_the_sum_of_both_with_the_weights_of_the_scales(cases):
    settings = VFSettings(pretext="fusion+masked", mask_side=4, reconstruction_weight=0.5)
    batch = make_batch(collated(cases, settings)["tensors"], settings, CPU)
    sizes = (PATCH, tuple(side // 2 for side in PATCH))
    outputs = [torch.zeros(2, 7, *size) for size in sizes]
    parts = [PretextLoss(Mean(), weights, settings)(outputs, [], batch.restoration) for weights in ((1, 0), (0, 1))]
    torch.testing.assert_close(
        PretextLoss(Mean(), (0.7, 0.3), settings)(outputs, [], batch.restoration), 0.7 * parts[0] + 0.3 * parts[1]
    )
    assert parts[0] > 0
    for output in outputs:
        output[:, :5] += 3
    torch.testing.assert_close(PretextLoss(Mean(), (1, 0), settings)(outputs, [], batch.restoration), parts[0] + 3)


def test_the_reconstruction_weight_multiplies_the_restoration_loss(cases):
    """In the joint pretext, where visible voxels count a tenth."""
    losses = []
    for weight in (1, 2):
        settings = VFSettings(pretext="fusion+masked", mask_side=4, reconstruction_weight=weight)
        batch = make_batch(collated(cases, settings)["tensors"], settings, CPU)
        output = torch.ones(2, 7, *PATCH)
        losses.append(PretextLoss(Mean(), (1,), settings)(output, None, batch.restoration))
    expected = RestorationLoss(0.1)([output[:, 5:]], batch.restoration)
    torch.testing.assert_close(losses[1] - losses[0], expected)


def test_the_masked_loss_has_a_gradient_at_hidden_voxels_only(cases):
    settings = VFSettings(pretext="masked", mask_side=4)
    batch = make_batch(collated(cases, settings)["tensors"], settings, CPU)
    loss = PretextLoss(Mean(), (1,), settings)
    restored = batch.restoration.volume.clone().requires_grad_()
    loss(restored + 1, None, batch.restoration).backward()
    assert (restored.grad != 0)[batch.restoration.mask[:, None].expand_as(restored)].all()
    assert (restored.grad == 0)[~batch.restoration.mask[:, None].expand_as(restored)].all()


def test_hidden_intensities_reach_neither_the_input_nor_the_loss_of_the_visible_part(cases):
    settings = VFSettings(pretext="fusion+masked", mask_side=4)
    batch = make_batch(collated(cases, settings)["tensors"], settings, CPU)
    hidden = batch.restoration.mask[:, None]
    other = RestorationTarget(batch.restoration.volume + 7 * hidden, batch.restoration.mask)
    assert torch.equal(hide(other), batch.data)
    gradients = []
    for target in (batch.restoration, other):
        outputs = torch.zeros(2, 7, *PATCH, requires_grad=True)
        PretextLoss(Mean(), (1,), settings)([outputs], [], target).backward()
        gradients.append(outputs.grad[:, 5:])
    assert torch.equal(gradients[0] * ~hidden, gradients[1] * ~hidden)
    assert (gradients[0] * ~hidden).any()
    assert not torch.equal(gradients[0], gradients[1])


@pytest.mark.pictures
@pytest.mark.parametrize("pretext", PRETEXTS)
def test_the_picture_has_a_column_for_everything_that_the_pretext_uses(cases, tmp_path, pretext):
    settings = VFSettings(pretext=pretext)
    batch = collated(cases, settings)
    outputs = len(output_names(settings, 2))
    examples = make_examples(batch, settings, CPU, lambda data: torch.zeros(2, outputs, *PATCH))
    (volumes, maps) = examples[0].volumes, examples[0].maps
    assert ("hidden blocks restored" in volumes) == (pretext != "fusion")
    assert len(maps) == (0 if pretext == "masked" else 2)
    assert all(image.shape == PATCH for image in (*volumes.values(), *maps.values()))
    draw_examples(examples, ("z", "y", "x"), settings, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000
