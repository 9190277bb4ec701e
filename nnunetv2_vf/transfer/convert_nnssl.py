"""DKFZ's nnssl: the plan by which nnU-Net's nnssl commands adopt an artifact, and nnssl's own checkpoints.

Sources: MIC-DKFZ/nnssl, ``adaptation_planning/adaptation_plan.py`` (names and meaning of the plan's entries),
``architectures/architecture_registry.py`` (ResEnc-L), ``training/nnsslTrainer/volume_fusion`` (Primus-M);
MIC-DKFZ/nnUNet, ``experiment_planning/like_nnssl.py`` and ``training/nnUNetTrainer/pretraining`` (who reads it).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import Tensor

from nnunetv2_vf.errors import UserError
from nnunetv2_vf.transfer.safe_loading import require_known_architecture
from nnunetv2_vf.transfer.target_plans import build_network

PLAN_KEY = "nnssl_adaptation_plan"
_ARCHITECTURES = "dynamic_network_architectures.architectures."
_STAGES = 6
# What nnssl calls ResEncL, as a plan's entry.
_RES_ENC_L: dict[str, Any] = {
    "network_class_name": _ARCHITECTURES + "unet.ResidualEncoderUNet",
    "arch_kwargs": {
        "n_stages": _STAGES,
        "features_per_stage": [32, 64, 128, 256, 320, 320],
        "conv_op": "torch.nn.modules.conv.Conv3d",
        "kernel_sizes": [[3, 3, 3]] * _STAGES,
        "strides": [[1, 1, 1]] + [[2, 2, 2]] * (_STAGES - 1),
        "n_blocks_per_stage": [1, 3, 4, 6, 6, 6],
        "n_conv_per_stage_decoder": [1] * (_STAGES - 1),
        "conv_bias": True,
        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    },
    "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
}
# ... and PrimusM, but for the input shape. nnssl trains it as "EvaMAE", whose modules have Primus's names.
_PRIMUS_M: dict[str, Any] = {
    "embed_dim": 864,
    "patch_embed_size": [8, 8, 8],
    "eva_depth": 16,
    "eva_numheads": 12,
    "drop_path_rate": 0.2,
    "init_values": 0.1,
    "scale_attn_inner": True,
}


def adaptation_plan(metadata: Mapping[str, Any]) -> dict[str, Any] | None:
    """The ``nnssl_adaptation_plan`` of an artifact, from its ``vf`` metadata; None without plans of its own."""
    if "plans" not in metadata or "adapted" in metadata:  # adapted weights are for one target, and have its shapes
        return None
    plans, architecture = metadata["plans"], metadata["architecture"]
    configuration = PlansManager(plans).get_configuration(metadata["configuration"]).configuration
    network = build_network(architecture, metadata["num_input_channels"], metadata["num_classes"])
    class_name = architecture["network_class_name"]
    return {
        "architecture_plans": {
            # nnssl and nnU-Net look up bare names among dynamic_network_architectures, others by their path
            "arch_class_name": class_name.rpartition(".")[2] if class_name.startswith(_ARCHITECTURES) else class_name,
            "arch_kwargs": architecture["arch_kwargs"],
            "arch_kwargs_requiring_import": architecture["_kw_requires_import"],
        },
        "pretrain_plan": {
            "dataset_name": plans["dataset_name"],
            "plans_name": plans["plans_name"],
            "original_median_spacing_after_transp": plans["original_median_spacing_after_transp"],
            "image_reader_writer": plans["image_reader_writer"],
            "transpose_forward": plans["transpose_forward"],
            "transpose_backward": plans["transpose_backward"],
            "configurations": {
                "median": {  # nnssl's name for nnU-Net's choice of a spacing
                    "data_identifier": configuration["data_identifier"],
                    "preprocessor_name": configuration["preprocessor_name"],
                    "spacing_style": "median",
                    "normalization_schemes": configuration["normalization_schemes"],
                    "use_mask_for_norm": configuration["use_mask_for_norm"],
                    "resampling_fn_data": configuration["resampling_fn_data"],
                    "resampling_fn_data_kwargs": configuration["resampling_fn_data_kwargs"],
                    "resampling_fn_mask": configuration["resampling_fn_seg"],
                    "resampling_fn_mask_kwargs": configuration["resampling_fn_seg_kwargs"],
                    "spacing": metadata["spacing"],
                    "patch_size": metadata["patch_size"],
                }
            },
            "experiment_planner_used": plans["experiment_planner_used"],
        },
        "pretrain_num_input_channels": metadata["num_input_channels"],
        "recommended_downstream_patchsize": metadata["patch_size"],
        "key_to_encoder": getattr(network, "key_to_encoder", "encoder"),
        "key_to_stem": getattr(network, "key_to_stem", "encoder"),
        "keys_to_in_proj": list(getattr(network, "keys_to_in_proj", ())),
        "key_to_lpe": None,
    }


def is_checkpoint(content: Mapping[str, Any]) -> bool:
    """Whether a file's content is a checkpoint of nnssl."""
    return "network_weights" in content and PLAN_KEY in content and "vf" not in content


def convert_checkpoint(checkpoint: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """nnssl's ResEnc-L, ResEnc U-Nets of other sizes and Primus-M: the weights, and the artifact's metadata.

    The weights keep their names: nnssl builds its networks of the classes that nnU-Net builds.

    Raises:
        UserError: it is another network, or its weights are not what its plan says.
    """
    plan, weights = checkpoint[PLAN_KEY], checkpoint["network_weights"]
    (pretrained,) = plan["pretrain_plan"]["configurations"].values()
    architecture = _architecture(plan["architecture_plans"], pretrained["patch_size"])
    is_primus = "patch_embed_size" in architecture["arch_kwargs"]
    heads = ("up_projection.", "bias") if is_primus else ("decoder.seg_layers.", "bias")
    biases = [w for name, w in weights.items() if name.startswith(heads[0]) and name.endswith(heads[1])]
    metadata = {
        "architecture": architecture,
        "num_input_channels": plan["pretrain_num_input_channels"],
        "num_classes": biases[-1].shape[0] if biases else 0,
        "normalization_schemes": pretrained["normalization_schemes"],
        "spacing": pretrained["spacing"],
        "patch_size": list(pretrained["patch_size"]),
        "dataset": plan["pretrain_plan"]["dataset_name"],
        "converted_from": {"project": "nnssl", "trainer": checkpoint.get("trainer_name")},
    }
    _check_complete(weights, metadata, deep_supervision=None if is_primus else True)
    return weights, metadata


def _architecture(described: Mapping[str, Any], patch_size: list[int]) -> dict[str, Any]:
    name = described["arch_class_name"]
    if name == "ResEncL":
        return _RES_ENC_L
    if name == "PrimusM":
        kwargs = {**_PRIMUS_M, "input_shape": list(patch_size)}
        return {
            "network_class_name": _ARCHITECTURES + "primus.Primus",
            "arch_kwargs": kwargs,
            "_kw_requires_import": [],
        }
    if name == "ResidualEncoderUNet" and described["arch_kwargs"]:
        architecture = {
            "network_class_name": _RES_ENC_L["network_class_name"],
            "arch_kwargs": described["arch_kwargs"],
            "_kw_requires_import": described["arch_kwargs_requiring_import"] or [],
        }
        require_known_architecture(architecture, "the checkpoint")
        return architecture
    raise UserError(f"nnssl's network {name} cannot be converted; legal: ResEncL, ResidualEncoderUNet, PrimusM")


def _check_complete(weights: Mapping[str, Tensor], metadata: Mapping[str, Any], deep_supervision: bool | None) -> None:
    network = build_network(
        metadata["architecture"],
        metadata["num_input_channels"],
        metadata["num_classes"],
        deep_supervision=deep_supervision,
    )
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    wrong = sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name))
    if wrong:
        name = wrong[0]
        raise UserError(
            f"the checkpoint's weights are not those of its network: {len(wrong)} tensors differ, {name} for one: "
            f"{found.get(name, 'missing')} (expected {expected.get(name, 'nothing')})"
        )
