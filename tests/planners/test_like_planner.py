from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DATASET_ID
from networks import unet
from nnunetv2.experiment_planning.plan_and_preprocess_api import plan_experiment_dataset
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_vf.cli import main
from nnunetv2_vf.five_level_network import MODES
from nnunetv2_vf.planners.fmunet_planner import FMUNetPlanner
from nnunetv2_vf.planners.memory_fitting import patch_divisor
from nnunetv2_vf.planners.pct_net_planner import PCTNetPlanner
from nnunetv2_vf.transfer.architectures import build_network
from nnunetv2_vf.transfer.network_fit import mismatched_tensors
from nnunetv2_vf.transfer.target_plans import load_target

STAGES = 6
NETWORKS = {
    "U-Net": {
        "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
        "arch_kwargs": {
            "n_stages": STAGES,
            "features_per_stage": [8, 16, 32, 64, 80, 80],
            "conv_op": "torch.nn.modules.conv.Conv3d",
            "kernel_sizes": [[1, 3, 3]] + [[3, 3, 3]] * (STAGES - 1),
            "strides": [[1, 1, 1], [1, 2, 2]] + [[2, 2, 2]] * (STAGES - 2),
            "n_conv_per_stage": [2] * STAGES,
            "n_conv_per_stage_decoder": [2] * (STAGES - 1),
            "conv_bias": True,
            "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
            "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        },
        "_kw_requires_import": ["conv_op", "norm_op"],
    },
    "PCT-Net": PCTNetPlanner.published_architecture(MODES[1]),
    "FMUNet": FMUNetPlanner.published_architecture(MODES[1]),
}
PRIMUS = "dynamic_network_architectures.architectures.primus.Primus"
TARGETS = {
    "isotropic": ((1.0, 1.0, 1.0), (160, 200, 180)),
    "anisotropic": ((5.0, 0.7, 0.7), (24, 320, 320)),
    "tiny": ((1.0, 1.0, 1.0), (20, 24, 20)),
    "large": ((1.5, 0.8, 0.8), (300, 512, 512)),
}
CT = {"mean": 99.0, "std": 333.0}


@pytest.fixture
def pretrained(tmp_path):
    """A function that writes an artifact of a network without weights and returns its path."""

    def write(network="U-Net", schemes=("CTNormalization",), spacing=(4.0, 0.9, 0.8), means=(99.0,), **vf) -> Path:
        properties = {str(i): {**CT, "mean": means[i % len(means)]} for i in range(len(schemes))}
        configuration = {"use_mask_for_norm": [False] * len(schemes), "architecture": NETWORKS[network]}
        metadata = {
            "architecture": NETWORKS[network],
            "num_input_channels": len(schemes),
            "num_classes": 5,
            "normalization_schemes": list(schemes),
            "channel_names": {str(i): "CT" for i in range(len(schemes))},
            "spacing": spacing and list(spacing),
            "configuration": "3d_fullres",
            "plans": {
                "foreground_intensity_properties_per_channel": properties,
                "configurations": {"3d_fullres": configuration},
                "transpose_forward": [0, 1, 2],
            },
        }
        path = tmp_path / "vf_pretrained.pth"
        known = {key: value for key, value in (metadata | vf).items() if value is not None}
        torch.save({"network_weights": {}, "vf": known}, path)
        return path

    return write


def plans_of(plans_file: Path, name: str) -> dict:
    return json.loads(plans_file.with_name(f"{name}.json").read_text())


# Each measurement of PCT-Net takes a second, of FMUNet half of it.
ALWAYS_RUN = {"U-Net": {*TARGETS} - {"isotropic"}, "PCT-Net": {"anisotropic"}, "FMUNet": {"tiny", "large"}}


@pytest.mark.parametrize(
    ("network", "target"),
    [
        pytest.param(network, target, marks=[] if target in ALWAYS_RUN[network] else pytest.mark.slow)
        for network in NETWORKS
        for target in TARGETS
    ],
)
def test_the_plans_of_any_target_get_the_pretrained_network(empty_dataset, pretrained, capsys, network, target):
    plans_file = empty_dataset(*TARGETS[target])
    path = pretrained(network)
    main(["plan", "-d", "42", "--like", str(path), "-gpu_memory_target", "6"])
    name = {"U-Net": "VFPlans", "PCT-Net": "PCTNetPlans", "FMUNet": "FMUNetPlans"}[network]
    plans = plans_of(plans_file, name)
    divisor = patch_divisor(NETWORKS[network])
    three_dimensional = [c for c in plans["configurations"] if c in ("3d_fullres", "3d_lowres")]
    assert three_dimensional[-1] == "3d_fullres"
    assert ("3d_lowres" in three_dimensional) or target != "large"
    for configuration in three_dimensional:
        plan = plans["configurations"][configuration]
        assert plan["architecture"] == NETWORKS[network]
        assert all(side % d == 0 for side, d in zip(plan["patch_size"], divisor, strict=True))
        assert plan["estimated_training_memory_gb"] <= 0.9 * 6
        fresh = build_network(NETWORKS[network], 1, 5)
        assert (
            mismatched_tensors(
                fresh.state_dict(), build_network(load_target("42", name, configuration).architecture, 1, 3)
            )
            == []
        )
    assert list(PlansManager(plans).get_configuration("3d_fullres").spacing) == list(TARGETS[target][0])
    options = {"spacing": "target", "normalization": "pretrained"}  # both datasets are CT
    assert plans["volume_fusion_like"] == {"file": path.name, "hub": None, "dataset": None, **options}
    out = capsys.readouterr().out
    assert f"nnUNetv2_preprocess -d 42 -plans_name {name} -c 3d_fullres" in out
    assert f"nnUNetv2_train 42 3d_fullres 0 -p {name} -tr VFFinetuneTrainer -pretrained_weights {path}\n" in out


def test_a_unet_gets_about_the_patch_that_nnunet_plans(empty_dataset, pretrained):
    plans_file = empty_dataset(*TARGETS["isotropic"])
    plan_experiment_dataset("Dataset042_Made")
    stock = plans_of(plans_file, "nnUNetPlans")["configurations"]["3d_fullres"]
    main(["plan", "-d", "42", "--like", str(pretrained(architecture=stock["architecture"]))])
    ours = plans_of(plans_file, "VFPlans")["configurations"]["3d_fullres"]
    assert 0.7 < np.prod(ours["patch_size"]) / np.prod(stock["patch_size"]) < 1.4
    assert ours["batch_size"] == stock["batch_size"]


def test_everything_except_the_network_is_as_nnunet_plans_it(empty_dataset, pretrained):
    plans_file = empty_dataset(*TARGETS["anisotropic"])
    main(["plan", "-d", "42", "--like", str(pretrained()), "--normalization", "target"])
    plan_experiment_dataset("Dataset042_Made")
    ours, stock = (plans_of(plans_file, name) for name in ("VFPlans", "nnUNetPlans"))
    for key in ("transpose_forward", "foreground_intensity_properties_per_channel", "image_reader_writer"):
        assert ours[key] == stock[key]
    fullres = ours["configurations"]["3d_fullres"], stock["configurations"]["3d_fullres"]
    for key in ("spacing", "normalization_schemes", "use_mask_for_norm", "resampling_fn_data", "preprocessor_name"):
        assert fullres[0][key] == fullres[1][key]


@pytest.mark.parametrize(
    ("own", "expected"),
    [((5.0, 0.7, 0.7), [4.0, 0.9, 0.8]), ((0.7, 0.7, 5.0), [0.9, 0.8, 4.0]), ((0.7, 5.0, 0.7), [0.9, 4.0, 0.8])],
)
def test_the_coarsest_pretrained_spacing_is_used_along_the_targets_coarsest_axis(
    empty_dataset, pretrained, own, expected
):
    plans_file = empty_dataset(own, (100, 100, 100))
    main(["plan", "-d", "42", "--like", str(pretrained()), "--spacing", "pretrained"])
    plans = PlansManager(plans_of(plans_file, "VFPlans"))
    assert list(plans.get_configuration("3d_fullres").spacing) == [4.0, 0.9, 0.8]  # as the network sees it
    assert [expected[axis] for axis in plans.transpose_forward] == [4.0, 0.9, 0.8]  # as the images lie
    assert plans.transpose_forward[0] == int(np.argmax(own))


def test_the_largest_pretrained_spacing_is_that_of_the_slice_axis_wherever_it_is_recorded(empty_dataset, pretrained):
    plans_file = empty_dataset((0.7, 0.7, 5.0), (100, 100, 40))
    path = pretrained(spacing=(0.9, 0.8, 4.0))
    main(["plan", "-d", "42", "--like", str(path), "--spacing", "pretrained"])
    assert plans_of(plans_file, "VFPlans")["configurations"]["3d_fullres"]["spacing"] == [4.0, 0.9, 0.8]


def test_a_smaller_network_leaves_no_low_resolution_of_the_network_before(empty_dataset, pretrained):
    plans_file = empty_dataset(*TARGETS["large"])
    main(["plan", "-d", "42", "--like", str(pretrained()), "-gpu_memory_target", "1"])
    plans = plans_of(plans_file, "VFPlans")
    assert "3d_lowres" in plans["configurations"]
    plans["configurations"]["own"] = {"inherits_from": "3d_fullres", "batch_size": 1}
    plans_file.with_name("VFPlans.json").write_text(json.dumps(plans))
    main(["plan", "-d", "42", "--like", str(pretrained()), "-gpu_memory_target", "200"])
    assert [*plans_of(plans_file, "VFPlans")["configurations"]] == ["2d", "3d_fullres", "own"]


def test_options_that_the_file_does_not_allow_are_refused_before_a_fingerprint_is_made(copied_dataset, pretrained):
    (copied_dataset / "dataset_fingerprint.json").unlink()
    with pytest.raises(SystemExit, match="does not hold its spacing"):
        main(["plan", "-d", str(DATASET_ID), "--like", str(pretrained(spacing=None)), "--spacing", "pretrained"])
    assert not (copied_dataset / "dataset_fingerprint.json").exists()


def test_an_isotropic_pretrained_spacing_is_used(empty_dataset, pretrained):
    plans_file = empty_dataset((0.7, 0.7, 5.0), (100, 100, 100))
    path = pretrained(spacing=(1.0, 1.0, 1.0))
    main(["plan", "-d", "42", "--like", str(path), "--spacing", "pretrained"])
    assert plans_of(plans_file, "VFPlans")["configurations"]["3d_fullres"]["spacing"] == [1.0, 1.0, 1.0]


def test_the_pretrained_normalisation_comes_with_its_statistics(empty_dataset, pretrained, capsys):
    plans_file = empty_dataset(*TARGETS["tiny"], channels=("MR", "MR", "CT"))
    main(["plan", "-d", "42", "--like", str(pretrained()), "--normalization", "pretrained"])
    plans = plans_of(plans_file, "VFPlans")
    assert plans["configurations"]["3d_fullres"]["normalization_schemes"] == ["CTNormalization"] * 3
    assert plans["foreground_intensity_properties_per_channel"] == {"0": CT, "1": CT, "2": CT}
    out = capsys.readouterr().out
    assert "nnUNetv2_vf adapt" in out, "one input channel cannot become three by itself"
    assert "-pretrained_weights vf_pretrained_for_42.pth" in out


@pytest.mark.parametrize(
    ("channels", "vf", "expected"),
    [
        (("CT",), {}, "pretrained"),
        (("CT", "CT"), {}, "pretrained"),
        (("T1",), {}, "target"),
        (("CT",), {"plans": None}, "target"),  # the statistics are not recorded
        (("CT",), {"normalization_schemes": None}, "target"),
        (("CT",), {"schemes": ("CTNormalization", "NoNormalization")}, "target"),  # two channels cannot become one
        (("CT",), {"schemes": ("CTNormalization",) * 2}, "pretrained"),
        (("CT",), {"schemes": ("CTNormalization",) * 2, "means": (99.0, 9.0)}, "target"),  # nor can two statistics
        (("T1",), {"schemes": ("RescaleTo01Normalization",), "channel_names": {"0": "MR"}}, "target"),
        (("CT",), {"schemes": ("ZScoreNormalization",)}, "target"),
    ],
)
def test_the_normalisation_of_pretraining_is_the_default_for_ct(
    empty_dataset, pretrained, capsys, channels, vf, expected
):
    plans_file = empty_dataset(*TARGETS["tiny"], channels=channels)
    main(["plan", "-d", "42", "--like", str(pretrained(**vf))])
    plans = plans_of(plans_file, "VFPlans")
    assert plans["volume_fusion_like"]["normalization"] == expected
    schemes = plans["configurations"]["3d_fullres"]["normalization_schemes"]
    if expected == "pretrained":
        assert schemes == ["CTNormalization"] * len(channels)
        assert "and the normalisation of its pretraining" in capsys.readouterr().out
    else:
        assert schemes == ["CTNormalization" if channels == ("CT",) else "ZScoreNormalization"]
        assert "and nnU-Net's normalisation" in capsys.readouterr().out
    if "CTNormalization" in schemes:
        has_pretrained_statistics = plans["foreground_intensity_properties_per_channel"]["0"] == CT
        assert has_pretrained_statistics == (expected == "pretrained")


def test_the_difference_to_another_modality_is_printed(empty_dataset, pretrained, capsys):
    plans_file = empty_dataset(*TARGETS["tiny"], channels=("T1",))
    main(["plan", "-d", "42", "--like", str(pretrained())])
    assert plans_of(plans_file, "VFPlans")["configurations"]["3d_fullres"]["normalization_schemes"] == [
        "ZScoreNormalization"
    ]
    out = capsys.readouterr().out
    assert "normalisation: CTNormalization in pretraining, ZScoreNormalization here" in out
    assert "channels: CT in pretraining, T1 here" in out
    assert "spacing: 4 x 0.9 x 0.8 mm in pretraining, 1 x 1 x 1 mm here" in out


def test_weights_without_a_described_network_are_refused(empty_dataset, tmp_path):
    empty_dataset(*TARGETS["tiny"])
    torch.save({"network_weights": unet().state_dict()}, tmp_path / "bare.pth")
    with pytest.raises(SystemExit, match="does not record which network"):
        main(["plan", "-d", "42", "--like", str(tmp_path / "bare.pth")])


@pytest.mark.parametrize(
    ("vf", "arguments", "message"),
    [
        ({}, ["--like", "nowhere.pth"], "no file nowhere.pth"),
        ({"spacing": None}, ["--spacing", "pretrained"], "does not hold its spacing; legal: target"),
        (
            {"normalization_schemes": None},
            ["--normalization", "pretrained"],
            "does not hold its normalization_schemes; legal: target",
        ),
        ({"plans": None}, ["--normalization", "pretrained"], "does not hold its intensity statistics; legal: target"),
        ({"schemes": ("CTNormalization", "ZScoreNormalization")}, ["--normalization", "pretrained"], "2 channels"),
        ({}, ["--spacing", "pretrained", "-overwrite_target_spacing", "1", "1", "1"], "exclude each other"),
        ({}, ["-gpu_memory_target", "0.01"], "-gpu_memory_target 0.01 is too small for this network"),
        (
            {"architecture": {"network_class_name": PRIMUS, "arch_kwargs": {}, "_kw_requires_import": []}},
            [],
            "primus.Primus, which is two-dimensional or takes patches of one size",
        ),
        (
            {
                "architecture": {
                    "network_class_name": PRIMUS.replace("primus.Primus", "unet.PlainConvUNet"),
                    "arch_kwargs": {"strides": [[1, 1], [2, 2]]},
                    "_kw_requires_import": [],
                }
            },
            [],
            "PlainConvUNet, which is two-dimensional",
        ),
    ],
)
def test_errors_are_one_line_and_no_plans_are_written(empty_dataset, pretrained, vf, arguments, message):
    plans_file = empty_dataset(*TARGETS["tiny"])
    like = [] if "--like" in arguments else ["--like", str(pretrained(**vf))]
    with pytest.raises(SystemExit, match=f"^nnUNetv2_vf: error: .*{message}"):
        main(["plan", "-d", "42", *like, *arguments])
    assert not list(plans_file.parent.glob("*Plans.json"))


@pytest.mark.parametrize("option", ["--spacing", "--normalization"])
def test_pretrained_spacing_and_normalisation_need_like(empty_dataset, option):
    empty_dataset(*TARGETS["tiny"])
    with pytest.raises(SystemExit, match=f"{option} pretrained needs --like FILE"):
        main(["plan", "-d", "42", option, "pretrained"])
