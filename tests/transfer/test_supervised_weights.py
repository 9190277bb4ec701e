"""Published weights that were trained with labels: nnU-Net models such as TotalSegmentator's, and those of others."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import DATASET_ID
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from torch import nn
from trainings import make_trainer

from nnunetv2_vf.cli import main
from nnunetv2_vf.errors import UserError
from nnunetv2_vf.transfer.artifact import read_pretrained
from nnunetv2_vf.transfer.network_fit import require_fit
from nnunetv2_vf.transfer.target_plans import load_target

STAGES = 6
pytestmark = pytest.mark.filterwarnings("ignore:Detected old nnU-Net plans format")


@pytest.fixture
def total_segmentator(tmp_path):
    """A checkpoint with the entries, plans and names of TotalSegmentator 2's models, but with 4 features."""
    kernels, strides = [[3, 3, 3]] * STAGES, [[1, 1, 1]] + [[2, 2, 2]] * (STAGES - 1)
    configuration = {
        "data_identifier": "nnUNetPlans_3d_fullres",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": [128, 128, 128],
        "median_image_size_in_voxels": [228.0, 228.0, 242.0],
        "spacing": [1.5, 1.5, 1.5],
        "normalization_schemes": ["CTNormalization"],
        "use_mask_for_norm": [False],
        "UNet_class_name": "PlainConvUNet",
        "UNet_base_num_features": 4,
        "n_conv_per_stage_encoder": [2] * STAGES,
        "n_conv_per_stage_decoder": [2] * (STAGES - 1),
        "num_pool_per_axis": [STAGES - 1] * 3,
        "pool_op_kernel_sizes": strides,
        "conv_kernel_sizes": kernels,
        "unet_max_num_features": 4,
        "resampling_fn_data": "resample_data_or_seg_to_shape",
        "resampling_fn_seg": "resample_data_or_seg_to_shape",
        "resampling_fn_data_kwargs": {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None},
        "resampling_fn_seg_kwargs": {"is_seg": True, "order": 1, "order_z": 0, "force_separate_z": None},
        "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
        "resampling_fn_probabilities_kwargs": {"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": None},
        "batch_dice": False,
    }
    intensities = {"mean": -50.0, "std": 150.0, "min": -1024.0, "max": 3000.0, "median": 0.0}
    plans = {
        "dataset_name": "Dataset291_TotalSegmentator_part1_organs_1559subj",
        "plans_name": "nnUNetPlans",
        "original_median_spacing_after_transp": [1.5, 1.5, 1.5],
        "original_median_shape_after_transp": [231, 231, 242],
        "image_reader_writer": "NibabelIOWithReorient",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "configurations": {"3d_fullres": configuration},
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {
            "0": {**intensities, "percentile_00_5": -1004.0, "percentile_99_5": 1588.0}
        },
    }
    labels = {"background": 0, **{f"organ_{i}": i for i in range(1, 25)}}
    dataset_json = {"channel_names": {"0": "CT"}, "labels": labels, "numTraining": 1559, "file_ending": ".nii.gz"}
    norm = {"norm_op": nn.InstanceNorm3d, "norm_op_kwargs": {"eps": 1e-5, "affine": True}}
    network = PlainConvUNet(
        *(1, STAGES, (4,) * STAGES, nn.Conv3d, kernels, strides, 2, len(labels), 2),
        **{"conv_bias": True, **norm, "nonlin": nn.LeakyReLU, "deep_supervision": True},
    )
    checkpoint = {
        "network_weights": network.state_dict(),
        "optimizer_state": {},
        "grad_scaler_state": None,
        "logging": {"train_losses": [0.1]},
        "_best_ema": 0.9,
        "current_epoch": 4000,
        "init_args": {
            "plans": plans,
            "configuration": "3d_fullres",
            "fold": 0,
            "dataset_json": dataset_json,
            "unpack_dataset": True,
            "device": torch.device("cuda"),
        },
        "trainer_name": "nnUNetTrainer_4000epochs_NoMirroring",
        "inference_allowed_mirroring_axes": None,
    }
    torch.save(checkpoint, tmp_path / "checkpoint_final.pth")
    return tmp_path / "checkpoint_final.pth"


def test_weights_of_total_segmentator_start_a_fine_tuning(
    total_segmentator, copied_dataset, tmp_path, monkeypatch, capsys
):
    main(["info", str(total_segmentator)])
    described = capsys.readouterr().out
    assert "Dataset291_TotalSegmentator" in described
    assert "25 output channels" in described
    monkeypatch.setenv("nnUNet_n_proc_DA", "1")  # planning divides by it
    main(["plan", "-d", str(DATASET_ID), "--like", str(total_segmentator), "-overwrite_plans_name", "TotalPlans"])
    assert f"-pretrained_weights {total_segmentator}" in capsys.readouterr().out
    plans = json.loads((copied_dataset / "TotalPlans.json").read_text())
    assert plans["foreground_intensity_properties_per_channel"]["0"]["percentile_99_5"] == 1588

    main(["preprocess", "-d", str(DATASET_ID), "-plans_name", "TotalPlans", "-np", "1"])
    trainer = make_trainer("VFFinetuneTrainer", "TotalPlans")
    trainer.initialize()
    load_pretrained_weights(trainer.network, str(total_segmentator))
    pretrained = torch.load(total_segmentator, weights_only=False)["network_weights"]
    for name, tensor in trainer.network.state_dict().items():
        if ".seg_layers." not in name:
            torch.testing.assert_close(tensor, pretrained[name], rtol=0, atol=0)


def test_the_second_stage_of_a_cascade_is_no_source_of_weights(total_segmentator, copied_dataset):
    checkpoint = torch.load(total_segmentator, weights_only=False)
    arguments = checkpoint["init_args"]
    cascade = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}
    arguments["plans"]["configurations"]["3d_cascade_fullres"] = cascade
    arguments["configuration"] = "3d_cascade_fullres"
    torch.save(checkpoint, total_segmentator)
    problem = "is the second stage of a cascade.*legal: the checkpoint of 3d_lowres or of 3d_fullres"
    for command in ("plan", "--like"), ("adapt", "-o", "out.pth"):
        with pytest.raises(SystemExit, match=f"^nnUNetv2_vf: error: .* {problem}"):
            main([*command, str(total_segmentator), "-d", str(DATASET_ID)])
    with pytest.raises(UserError, match=problem):
        require_fit(
            total_segmentator, read_pretrained(total_segmentator), load_target("7", "nnUNetPlans", "3d_fullres")
        )


def test_a_checkpoint_of_another_network_than_that_of_its_plans_is_refused(total_segmentator, copied_dataset):
    """nnUNetTrainerBN trains batch norms, but its plans name instance norms."""
    checkpoint = torch.load(total_segmentator, weights_only=False)
    checkpoint["network_weights"]["encoder.stages.0.0.convs.0.norm.running_mean"] = torch.zeros(4)
    checkpoint["trainer_name"] = "nnUNetTrainerBN"
    torch.save(checkpoint, total_segmentator)
    with pytest.raises(SystemExit, match=r"has 1 tensors .*running_mean: nnUNetTrainerBN trained another network"):
        main(["plan", "-d", str(DATASET_ID), "--like", str(total_segmentator)])


@pytest.mark.parametrize(
    ("project", "content"),
    [
        ("nnU-Net 1", {"state_dict": {"conv_blocks_context.0.blocks.0.conv.weight": torch.ones(1)}, "epoch": 1}),
        ("STU-Net", {"state_dict": {"conv_blocks_context.0.0.conv1.weight": torch.ones(1)}, "plot_stuff": []}),
        ("SuPreM", {"net": {"module.backbone.down_tr64.ops.0.conv1.weight": torch.ones(1)}, "epoch": 2100}),
    ],
)
def test_weights_of_other_networks_are_refused_with_one_line(project, content, tmp_path, capsys):
    file = tmp_path / "model.pth"
    torch.save(content, file)
    main(["info", str(file)])
    assert "unknown kind of file" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="has no 'network_weights'; see what it holds: nnUNetv2_vf info"):
        main(["plan", "-d", str(DATASET_ID), "--like", str(file)])
