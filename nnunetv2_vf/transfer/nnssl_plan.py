"""The entry ``nnssl_adaptation_plan`` of an artifact, by which nnU-Net's nnssl commands accept it.

Sources: MIC-DKFZ/nnssl, ``adaptation_planning/adaptation_plan.py`` (names and meaning of the fields);
MIC-DKFZ/nnUNet, ``experiment_planning/like_nnssl.py`` and ``training/nnUNetTrainer/pretraining`` (the readers).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_vf.transfer.architectures import build_network

NNSSL_PLAN_KEY = "nnssl_adaptation_plan"
# Trainings do not need all of them, so plans that were written by hand may lack some.
_ENTRIES_OF_PLANS = (
    *("dataset_name", "plans_name", "original_median_spacing_after_transp", "image_reader_writer"),
    *("transpose_forward", "transpose_backward", "experiment_planner_used"),
)
_PACKAGE = "dynamic_network_architectures.architectures."


def make_nnssl_plan(metadata: Mapping[str, Any]) -> dict[str, Any] | None:
    """Make the plan from an artifact's metadata; None without complete plans, or if the weights were adapted."""
    plans = metadata.get("plans", {})
    if "adapted" in metadata or not plans.keys() >= {*_ENTRIES_OF_PLANS}:
        return None
    architecture = metadata["architecture"]
    configuration = PlansManager(plans).get_configuration(metadata["configuration"]).configuration
    network = build_network(architecture, metadata["num_input_channels"], metadata["num_classes"])
    class_name = architecture["network_class_name"]
    return {
        "architecture_plans": {
            # nnssl and nnU-Net search bare names in dynamic_network_architectures and import dotted paths.
            "arch_class_name": class_name.rpartition(".")[2] if class_name.startswith(_PACKAGE) else class_name,
            "arch_kwargs": architecture["arch_kwargs"],
            "arch_kwargs_requiring_import": architecture["_kw_requires_import"],
        },
        "pretrain_plan": {
            **{name: plans[name] for name in _ENTRIES_OF_PLANS},
            "configurations": {
                "median": {  # nnssl's name for the way in which nnU-Net chooses a spacing
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
        },
        "pretrain_num_input_channels": metadata["num_input_channels"],
        "recommended_downstream_patchsize": metadata["patch_size"],
        "key_to_encoder": getattr(network, "key_to_encoder", "encoder"),
        "key_to_stem": getattr(network, "key_to_stem", "encoder"),
        "keys_to_in_proj": list(getattr(network, "keys_to_in_proj", ())),
        "key_to_lpe": None,
    }


def architecture_of_nnssl_plan(plan: Mapping[str, Any]) -> dict[str, Any]:
    """Return the network that a plan names, in the form of an entry ``architecture``."""
    network = plan["architecture_plans"]
    return {
        "network_class_name": network["arch_class_name"],
        "arch_kwargs": network["arch_kwargs"],
        "_kw_requires_import": network["arch_kwargs_requiring_import"],
    }
