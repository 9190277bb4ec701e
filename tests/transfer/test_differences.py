from __future__ import annotations

import copy

import pytest

from nnunetv2_vf.transfer.artifact import read_artifact
from nnunetv2_vf.transfer.differences import describe_differences, find_differences


@pytest.fixture
def metadata(artifact) -> dict:
    return read_artifact(artifact)["vf"]


def aspects(metadata: dict, target) -> list[str]:
    return [difference.aspect for difference in find_differences(metadata, target)]


def change_architecture(metadata: dict, **kwargs) -> dict:
    metadata["architecture"]["arch_kwargs"] |= kwargs


def shift_intensities(metadata: dict) -> None:
    intensities = metadata["plans"]["foreground_intensity_properties_per_channel"]["0"]
    intensities["mean"] += 5 * intensities["std"]


def test_the_plans_of_pretraining_have_no_differences(metadata, target):
    assert find_differences(metadata, target) == []


@pytest.mark.parametrize(
    ("aspect", "change"),
    [
        ("channels", lambda vf: vf.update(channel_names={"0": "T1"})),
        ("normalisation", lambda vf: vf.update(normalization_schemes=["ZScoreNormalization"])),
        ("intensities", shift_intensities),
        ("spacing", lambda vf: vf.update(spacing=[2 * mm for mm in vf["spacing"]])),
        ("axis order", lambda vf: vf["plans"].update(transpose_forward=[2, 0, 1])),
        ("nonlin", lambda vf: change_architecture(vf, nonlin="torch.nn.ReLU")),
        ("norm_op", lambda vf: change_architecture(vf, norm_op="torch.nn.modules.batchnorm.BatchNorm3d")),
        (
            "normalisation within the mask only",
            lambda vf: vf["plans"]["configurations"]["3d_fullres"].update(use_mask_for_norm=[True]),
        ),
    ],
)
def test_a_difference_names_both_values_and_its_consequence(metadata, target, aspect, change):
    metadata = copy.deepcopy(metadata)
    change(metadata)
    (found,) = find_differences(metadata, target)
    assert found.aspect == aspect
    assert found.pretrained != found.target
    assert str(found) == f"{aspect}: {found.pretrained} in pretraining, {found.target} here: {found.consequence}"


def test_a_suggested_command_names_the_dataset_and_the_option(metadata, target):
    metadata["spacing"] = [2 * mm for mm in metadata["spacing"]]
    (found,) = find_differences(metadata, target)
    assert found.consequence.endswith("add --spacing pretrained to nnUNetv2_vf plan -d 7 --like FILE")


@pytest.mark.parametrize(
    ("scheme", "pretrained_channel", "channel", "is_suggested"),
    [
        ("CTNormalization", "CT", "CT", True),
        ("CTNormalization", "CT", "MR", False),
        ("RescaleTo01Normalization", "MR", "MR", False),
    ],
)
def test_only_the_normalisation_of_ct_is_suggested_and_only_for_ct(
    metadata, change_target, scheme, pretrained_channel, channel, is_suggested
):
    metadata |= {"channel_names": {"0": pretrained_channel}, "normalization_schemes": [scheme]}
    target = change_target([channel], normalization_schemes=["ZScoreNormalization"])
    (found,) = (each for each in find_differences(metadata, target) if each.aspect == "normalisation")
    assert ("--normalization pretrained" in found.consequence) == is_suggested


def test_only_recorded_aspects_are_called_equal(metadata, target):
    for key in ("channel_names", "plans"):
        del metadata[key]
    assert describe_differences(metadata, target) == ["normalisation, spacing: as in pretraining"]


def test_a_spacing_within_the_crop_scales_is_named_but_is_no_difference(metadata, target):
    metadata["spacing"] = [1.2 * mm for mm in metadata["spacing"]]
    assert not aspects(metadata, target)
    equal, spacing = describe_differences(metadata, target)
    assert equal == "channels, normalisation, axis order: as in pretraining"
    assert spacing.startswith("spacing: 12.7 x 11.9 x 12.7 mm in pretraining, 10.6 x 9.92 x 10.6 mm here")


def test_layers_are_compared_even_if_the_preprocessing_is_not_recorded(metadata, target):
    del metadata["normalization_schemes"]
    change_architecture(metadata, norm_op="torch.nn.modules.batchnorm.BatchNorm3d")
    assert aspects(metadata, target) == ["spacing and normalisation", "norm_op"]


def test_crop_scales_that_are_not_recorded_are_not_mentioned(metadata, target):
    metadata["spacing"] = [2 * mm for mm in metadata["spacing"]]
    (found,) = find_differences(metadata, target)
    assert "2 x 2 x 2 times as many voxels as in pretraining, which saw crops of 0.7 to 1.5 times" in found.consequence
    del metadata["settings"]
    (found,) = find_differences(metadata, target)
    assert "crops" not in found.consequence


def test_channels_in_another_order_are_a_difference(metadata, change_target):
    schemes = ["CTNormalization", "ZScoreNormalization"]
    metadata |= {"channel_names": {"0": "CT", "1": "PET"}, "normalization_schemes": schemes}
    swapped = change_target(["PET", "CT"], normalization_schemes=schemes[::-1])
    assert {"channels", "normalisation"} <= {*aspects(metadata, swapped)}


@pytest.mark.parametrize(
    ("factor", "is_difference"), [(0.72, False), (1.0, False), (1.45, False), (0.6, True), (1.6, True)]
)
def test_a_spacing_within_the_crop_scales_of_pretraining_is_no_difference(metadata, target, factor, is_difference):
    metadata["spacing"] = [mm / factor for mm in target.configuration.spacing]
    assert aspects(metadata, target) == ["spacing"] * is_difference


@pytest.mark.parametrize(
    ("pretrained", "current", "is_difference"),
    [
        (["ct"], ["CT"], False),
        (["MR"], ["MRI"], False),
        (["MR"], ["MRI", "MRI1", "mr_2"], False),
        (["MR"], ["T1", "T2w", "FLAIR"], False),
        (["T1"], ["T2"], True),
        (["MR"], ["CT"], True),
        (["MR"], ["T1", "PET"], True),
        (["CT"], ["CT", "CT"], False),
        (["T1", "T2"], ["T2", "T1"], True),
    ],
)
def test_channel_names_of_one_modality_are_no_difference(metadata, change_target, pretrained, current, is_difference):
    metadata["channel_names"] = dict(enumerate(pretrained))
    assert ("channels" in aspects(metadata, change_target(current))) == is_difference


def test_weights_without_metadata_are_reported(target):
    (found,) = find_differences({}, target)
    assert "not recorded" in str(found)
