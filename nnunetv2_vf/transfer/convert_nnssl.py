"""Convert checkpoints of DKFZ's nnssl: U-Nets (Volume Fusion or masked autoencoder) and Primus-M (Volume Fusion).

Sources: MIC-DKFZ/nnssl, ``architectures/architecture_registry.py`` (ResEnc-L), ``training/nnsslTrainer/volume_fusion``
(Primus-M) and ``training/nnsslTrainer/masked_image_modeling/BaseMAETrainer.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from nnunetv2_vf.errors import UserError
from nnunetv2_vf.transfer.architectures import (
    PLAIN_UNET,
    build_network,
    canonical_network,
    require_known_architecture,
)
from nnunetv2_vf.transfer.nnssl_plan import NNSSL_PLAN_KEY

_STAGES = 6
# The network that nnssl calls ResEncL, as an entry ``architecture``.
RES_ENC_L: dict[str, Any] = {
    "network_class_name": "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet",
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
# The arguments of the network that nnssl calls PrimusM. nnssl trains "EvaMAE", whose modules have the same names.
_PRIMUS_M: dict[str, Any] = {
    "embed_dim": 864,
    "patch_embed_size": [8, 8, 8],
    "eva_depth": 16,
    "eva_numheads": 12,
    "drop_path_rate": 0.2,
    "init_values": 0.1,
    "scale_attn_inner": True,
}


def is_nnssl_checkpoint(content: Mapping[str, Any]) -> bool:
    """Return True if a file's content is a checkpoint of nnssl."""
    return "network_weights" in content and NNSSL_PLAN_KEY in content and "vf" not in content


def convert_nnssl_checkpoint(checkpoint: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Convert a ResEnc-L, a residual encoder U-Net of another size, a plain U-Net, or a Primus-M.

    Returns:
        the weights, whose names do not change since nnssl and nnU-Net build the same classes; and the metadata of the
        artifact.

    Raises:
        UserError: the checkpoint is of another network, or its weights do not fit the network that it names.
    """
    plan, weights = checkpoint[NNSSL_PLAN_KEY], checkpoint["network_weights"]
    (configuration,) = plan["pretrain_plan"]["configurations"].values()
    architecture = _convert_architecture(plan["architecture_plans"], configuration["patch_size"])
    is_primus = "patch_embed_size" in architecture["arch_kwargs"]
    head = "up_projection." if is_primus else "decoder.seg_layers."
    head_biases = [tensor for name, tensor in weights.items() if name.startswith(head) and name.endswith("bias")]
    metadata = {
        "architecture": architecture,
        "num_input_channels": plan["pretrain_num_input_channels"],
        "num_classes": head_biases[-1].shape[0] if head_biases else 0,
        "normalization_schemes": configuration["normalization_schemes"],
        "spacing": configuration["spacing"],
        "patch_size": list(configuration["patch_size"]),
        "dataset": plan["pretrain_plan"]["dataset_name"],
        "converted_from": {"project": "nnssl", "trainer": checkpoint.get("trainer_name")},
    }
    _require_matching_weights(weights, metadata, deep_supervision=None if is_primus else True)
    return weights, metadata


def _convert_architecture(nnssl_architecture: Mapping[str, Any], patch_size: list[int]) -> dict[str, Any]:
    """Return the entry ``architecture`` for a network of nnssl."""
    name = nnssl_architecture["arch_class_name"]
    if name == "ResEncL":
        return RES_ENC_L
    if name == "PrimusM":
        return primus_m(patch_size)
    network = canonical_network(name)
    if network in (RES_ENC_L["network_class_name"], PLAIN_UNET) and nnssl_architecture["arch_kwargs"]:
        architecture = {
            "network_class_name": network,
            "arch_kwargs": nnssl_architecture["arch_kwargs"],
            "_kw_requires_import": nnssl_architecture["arch_kwargs_requiring_import"] or [],
        }
        require_known_architecture(architecture, "the checkpoint")
        return architecture
    raise UserError(
        f"nnssl's network {name} cannot be converted; legal: ResEncL, ResidualEncoderUNet, PlainConvUNet, PrimusM"
    )


def primus_m(patch_size: list[int]) -> dict[str, Any]:
    """Return the entry ``architecture`` of the network that nnssl calls PrimusM."""
    return {
        "network_class_name": "dynamic_network_architectures.architectures.primus.Primus",
        "arch_kwargs": {**_PRIMUS_M, "input_shape": list(patch_size)},
        "_kw_requires_import": [],
    }


def _require_matching_weights(
    weights: Mapping[str, Tensor], metadata: Mapping[str, Any], deep_supervision: bool | None
) -> None:
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
        first = wrong[0]
        raise UserError(
            f"the weights of the checkpoint do not fit its network: {len(wrong)} tensors differ, for example {first}: "
            f"{found.get(first, 'missing')} (expected {expected.get(first, 'nothing')})"
        )
