"""What a network is fine-tuned for: a configuration of a dataset's plans, where nnU-Net keeps them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from batchgenerators.utilities.file_and_folder_operations import load_json
from nnunetv2.utilities.dataset_name_id_conversion import convert_dataset_name_to_id
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn

from nnunetv2_vf.errors import UserError
from nnunetv2_vf.nnunet_folders import plans_file


@dataclass(frozen=True)
class TargetPlans:
    """A configuration of a dataset's plans."""

    plans_manager: PlansManager
    configuration_name: str
    dataset_json: Mapping[str, Any]

    @property
    def configuration(self) -> ConfigurationManager:
        return self.plans_manager.get_configuration(self.configuration_name)

    @property
    def architecture(self) -> dict[str, Any]:
        entry: dict[str, Any] = self.configuration.configuration["architecture"]
        return entry

    @property
    def channel_names(self) -> dict[str, str]:
        names: dict[str, str] = self.dataset_json.get("channel_names", self.dataset_json.get("modality"))
        return names

    @property
    def input_channels(self) -> int:
        channels: int = determine_num_input_channels(self.plans_manager, self.configuration, self.dataset_json)
        return channels

    @property
    def num_classes(self) -> int:
        heads: int = self.plans_manager.get_label_manager(self.dataset_json).num_segmentation_heads
        return heads

    @property
    def dataset_id(self) -> int:
        number: int = convert_dataset_name_to_id(self.plans_manager.dataset_name)
        return number

    def __str__(self) -> str:
        return f"{self.configuration_name} of {self.plans_manager.plans_name} of {self.plans_manager.dataset_name}"


def build_network(
    architecture: Mapping[str, Any],
    channels: int,
    classes: int,
    device: str = "meta",
    deep_supervision: bool | None = True,
) -> nn.Module:
    """The network of a plan's entry ``architecture``; on "meta" it has shapes, but no weights.

    Args:
        deep_supervision: None for networks that know no such thing.

    Raises:
        UserError: there is no such network, or it does not take these arguments.
    """
    try:
        with torch.device(device):
            network: nn.Module = get_network_from_plans(
                architecture["network_class_name"],
                architecture["arch_kwargs"],
                architecture["_kw_requires_import"],
                channels,
                classes,
                allow_init=device != "meta",
                deep_supervision=deep_supervision,
            )
    except (ImportError, TypeError, ValueError, AssertionError) as error:
        raise UserError(f"cannot build the network {architecture['network_class_name']}: {error}") from error
    return network


def load_target(dataset: str, plans_name: str, configuration_name: str) -> TargetPlans:
    """Read a dataset's plans.

    Raises:
        UserError: the dataset, its plans or their configuration is missing or cannot be read, or the configuration
            is 2D, or the second stage of a cascade, whose further channels are no images.
    """
    path = plans_file(dataset, plans_name)
    try:
        plans_manager = PlansManager(path.as_posix())
        available = plans_manager.available_configurations
        target = TargetPlans(plans_manager, configuration_name, load_json(path.with_name("dataset.json").as_posix()))
    except (OSError, ValueError, KeyError, TypeError) as error:  # ValueError: no JSON
        raise UserError(f"{path}, or dataset.json beside it, cannot be read: {error!r}; plan again") from error
    legal = [name for name in available if name.startswith("3d") and "cascade" not in name]
    if configuration_name not in legal:
        raise UserError(
            f"configuration {configuration_name!r} of {path} cannot be used; legal: "
            f"{', '.join(legal) or 'none, it has no 3D ones'}"
        )
    return target
