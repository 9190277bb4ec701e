"""Checkpoints of small networks, in the formats of MIS-FM and nnssl."""

from __future__ import annotations

import re

import torch
from networks import unet

from nnunetv2_vf.five_level_network import MODES
from nnunetv2_vf.fmunet import FMUNet
from nnunetv2_vf.pct_net import PCTNet

FEATURES = (4, 8, 8, 16, 32)
WINDOWS = (3, 3, 2)
RELEASED_NAMES = [  # PCTNet's names -> the release's; {m} is the resolution mode
    (r"^encoder\.stem", "embeddings.{m}.proj"),
    (r"^encoder\.stages\.([01])", r"embeddings.{m}.conv\1.conv_conv"),
    (r"^encoder\.downs\.0", "embeddings.{m}.down1"),
    (r"^encoder\.downs\.1", "embeddings.{m}.down2"),
    (r"^encoder\.downs\.2", "pyramid_ct.down3"),
    (r"^encoder\.downs\.3", "pyramid_ct.down4"),
    (r"^encoder\.stages\.([234])", r"pyramid_ct.convtrans_e\1"),
    (r"^decoder\.stages\.0", "pyramid_ct.convtrans_d3"),
    (r"^decoder\.stages\.1", "pyramid_ct.convtrans_d2"),
    (r"^decoder\.stages\.2", "pred_heads.{m}.conv1.conv_conv"),
    (r"^decoder\.stages\.3", "pred_heads.{m}.conv0.conv_conv"),
    (r"^decoder\.ups\.0", "pyramid_ct.up4"),
    (r"^decoder\.ups\.1", "pyramid_ct.up3"),
    (r"^decoder\.ups\.2", "pred_heads.{m}.up2"),
    (r"^decoder\.ups\.3", "pred_heads.{m}.up1"),
    (r"^decoder\.seg_layers\.0", "pyramid_ct.out_conv3.conv"),
    (r"^decoder\.seg_layers\.1", "pyramid_ct.out_conv2.conv"),
    (r"^decoder\.seg_layers\.2", "pred_heads.{m}.out_conv1.conv"),
    (r"^decoder\.seg_layers\.3", "pred_heads.{m}.out_conv0.conv"),
    (r"\.attention\.(\d)\.", r".trans.blocks.\1."),
    (r"\.attention\.position_bias", ".attn.relative_position_bias_table"),
    (r"\.attention\.qkv", ".attn.qkv"),
    (r"\.attention\.projection", ".attn.proj"),
    (r"\.mlp\.0", ".mlp.fc1"),
    (r"\.mlp\.3", ".mlp.fc2"),
    (r"\.convolution", ".conv.conv_conv"),
]


def misfm_network(mode: int, **kwargs) -> PCTNet:
    return PCTNet(2, FEATURES, MODES[mode], 3, window_sizes=WINDOWS, **kwargs)


def released_index(w: int) -> torch.Tensor:
    """Return the row of the bias table for each pair of tokens, as the code of the release computes it."""
    tokens = torch.cartesian_prod(*[torch.arange(w)] * 3)
    offset = tokens[:, None] - tokens[None] + w - 1
    return offset[..., 0] * (3 * w - 1) + offset[..., 1] * (2 * w - 1) + offset[..., 2]


def misfm_release(trained_mode: int) -> dict[str, torch.Tensor]:
    """Return random weights in the format of a release, including the modules that a release never uses."""
    torch.manual_seed(0)
    released = {}
    for mode in (0, 1, 2):
        for name, value in misfm_network(mode).state_dict().items():
            for pattern, released_name in RELEASED_NAMES:
                name = re.sub(pattern, released_name.replace("{m}", str(mode)), name)
            if value.is_floating_point():
                value = torch.randn(value.shape).half()
            elif mode == trained_mode:
                value = torch.tensor(7)
            released[name] = value
            if name.endswith("relative_position_bias_table"):
                w = (round(len(value) ** (1 / 3)) + 1) // 2
                released[name.replace("bias_table", "index")] = released_index(w)
    for level in ("e2", "e3", "e4", "d2", "d3"):
        released[f"pyramid_ct.convtrans_{level}.norm_layer.weight"] = torch.ones(8)
    return released


FMUNET_NAMES = [  # FMUNet's names -> the release's
    (r"^encoder\.stem", "project"),
    (r"^encoder\.stages\.(\d)\.convs", r"encoder.en_conv\1.conv_list"),
    (r"^encoder\.downs\.(\d)\.3", r"encoder.down\1.down.2"),
    (r"^encoder\.downs\.(\d)", r"encoder.down\1.down"),
    (r"^decoder\.bottom\.convs", "decoder.de_conv4.conv_list"),
    *((rf"^decoder\.stages\.{3 - level}\.convs", f"decoder.de_conv{level}.conv_list") for level in range(4)),
    *((rf"^decoder\.ups\.{3 - level}\.up\.0", f"decoder.upcat{level}.up") for level in range(4)),
    *((rf"^decoder\.ups\.{3 - level}\.conv", f"decoder.upcat{level}.conv") for level in range(4)),
    *((rf"^decoder\.seg_layers\.{3 - level}", f"out_layers.{level}") for level in range(4)),
    (r"^(decoder\.upcat.\.(?:up|conv)|out_layers\..)\.3\.", r"\1.2."),
]


def fmunet_release(mode: int, depth: int = 2) -> dict[str, torch.Tensor]:
    """Return random weights in the format of MIS-FM's FMUNet."""
    torch.manual_seed(0)
    released = {}
    for name, value in FMUNet(2, FEATURES, MODES[mode], 3, depth=depth).state_dict().items():
        for pattern, released_name in FMUNET_NAMES:
            name = re.sub(pattern, released_name, name)
        released[name] = torch.randn(value.shape).half()
    return released


NNSSL_RESENC = {  # a residual encoder U-Net in nnssl's plans, smaller than ResEnc-L
    "n_stages": 3,
    "features_per_stage": [4, 4, 4],
    "conv_op": "torch.nn.modules.conv.Conv3d",
    "kernel_sizes": [[3, 3, 3]] * 3,
    "strides": [[1, 1, 1], [2, 2, 2], [2, 2, 2]],
    "n_blocks_per_stage": [2, 2, 2],
    "n_conv_per_stage_decoder": [1, 1],
    "conv_bias": True,
    "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
    "norm_op_kwargs": {"eps": 1e-5, "affine": True},
    "dropout_op": None,
    "dropout_op_kwargs": None,
    "nonlin": "torch.nn.LeakyReLU",
    "nonlin_kwargs": None,
}
NNSSL_UNET = {("n_conv_per_stage" if name == "n_blocks_per_stage" else name): v for name, v in NNSSL_RESENC.items()}


def nnssl_checkpoint(arch_class_name="ResidualEncoderUNet", weights=None, patch=(32, 32, 32), classes=5) -> dict:
    """Return a checkpoint as nnssl's AbstractBaseTrainer.save_checkpoint and AdaptationPlan.serialize write it."""
    residual, dynamic = arch_class_name.endswith("ResidualEncoderUNet"), arch_class_name.endswith("UNet")
    configuration = {
        "data_identifier": "nnsslPlans_onemmiso",
        "preprocessor_name": "DefaultPreprocessor",
        "spacing_style": "onemmiso",
        "normalization_schemes": ["ZScoreNormalization"],
        "use_mask_for_norm": False,
        "resampling_fn_data": "resample_data_or_seg_to_shape",
        "resampling_fn_data_kwargs": {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None},
        "resampling_fn_mask": "resample_data_or_seg_to_shape",
        "resampling_fn_mask_kwargs": {"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": None},
        "spacing": [1, 1, 1],
        "patch_size": patch,
    }
    plan = {
        "architecture_plans": {
            "arch_class_name": arch_class_name,
            "arch_kwargs": NNSSL_RESENC if residual else NNSSL_UNET if dynamic else None,
            "arch_kwargs_requiring_import": ["conv_op", "norm_op", "nonlin", "dropout_op"] if dynamic else None,
        },
        "pretrain_plan": {
            "dataset_name": "Dataset745_OpenMind",
            "plans_name": "nnsslPlans",
            "original_median_spacing_after_transp": [1.0, 1.0, 1.0],
            "image_reader_writer": "SimpleITKIO",
            "transpose_forward": [0, 1, 2],
            "transpose_backward": [0, 1, 2],
            "configurations": {"onemmiso": configuration},
            "experiment_planner_used": "ExperimentPlanner",
        },
        "pretrain_num_input_channels": 1,
        "recommended_downstream_patchsize": [160, 160, 160],
        "key_to_encoder": "encoder.stages",
        "key_to_stem": "encoder.stem",
        "keys_to_in_proj": ("encoder.stem.convs.0.conv", "encoder.stem.convs.0.all_modules.0"),
        "key_to_lpe": None,
    }
    return {
        "network_weights": unet(residual=residual, classes=classes).state_dict() if weights is None else weights,
        "optimizer_state": {},
        "grad_scaler_state": None,
        "logging": {"train_losses": [1.0]},
        "_best_ema": 0.5,
        "current_epoch": 1000,
        "init_args": {"fold": "all", "configuration_name": "onemmiso"},
        "trainer_name": "VolumeFusionTrainer_BS8",
        "nnssl_adaptation_plan": plan,
    }
