"""The target of a transfer: a configuration of a dataset's plans in ``nnUNet_preprocessed``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from batchgenerators.utilities.file_and_folder_operations import load_json
from nnunetv2.utilities.dataset_name_id_conversion import convert_dataset_name_to_id
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from nnunetv2_vf.errors import UserError
from nnunetv2_vf.nnunet_folders import FOLDS, legal_configurations, plans_file
from nnunetv2_vf.transfer.architectures import canonical_architecture
from nnunetv2_vf.transfer.metadata import read_channel_names


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
        """The plans' entry ``architecture``; a known network has the name that nnU-Net's plans now give it."""
        return canonical_architecture(self.configuration.configuration["architecture"])

    @property
    def channel_names(self) -> dict[str, str]:
        return read_channel_names(self.dataset_json)

    @property
    def input_channels(self) -> int:
        return determine_num_input_channels(self.plans_manager, self.configuration, self.dataset_json)

    @property
    def num_classes(self) -> int:
        """Number of output channels of the network."""
        return self.plans_manager.get_label_manager(self.dataset_json).num_segmentation_heads

    @property
    def dataset_id(self) -> int:
        return convert_dataset_name_to_id(self.plans_manager.dataset_name)

    @property
    def first_fold(self) -> int | str:
        """The fold that suggested commands train: 0, or "all" with too few cases for nnU-Net's five folds."""
        return 0 if self.dataset_json.get("numTraining", FOLDS) >= FOLDS else "all"

    def __str__(self) -> str:
        return f"{self.configuration_name} of {self.plans_manager.plans_name} of {self.plans_manager.dataset_name}"


def load_target(dataset: str, plans_name: str, configuration_name: str) -> TargetPlans:
    """Read a dataset's plans.

    Args:
        dataset: id or name.

    Raises:
        UserError: the dataset, its plans or the configuration is missing or cannot be read; the plans state
            the name of other plans or of another dataset; or the configuration is 2D or the second stage of a cascade,
            whose additional input channels are no images.
    """
    path = plans_file(dataset, plans_name)
    try:
        plans_manager = PlansManager(path.as_posix())
        legal = legal_configurations(plans_manager)
        target = TargetPlans(plans_manager, configuration_name, load_json(path.with_name("dataset.json").as_posix()))
    except (OSError, ValueError, KeyError, TypeError) as error:  # ValueError: no JSON
        raise UserError(f"{path}, or dataset.json beside it, cannot be read: {error!r}; plan again") from error
    stated = _names(plans_manager.dataset_name, plans_manager.plans_name)
    expected = _names(path.parent.name, plans_name)
    if stated != expected:
        raise UserError(
            f"{path} states {stated}; nnU-Net would read the cases and write the results of those; write into it: "
            f"{expected}"
        )
    if configuration_name not in legal:
        raise UserError(
            f"configuration {configuration_name!r} of {path} cannot be used; legal: "
            f"{', '.join(legal) or 'none, the plans have no 3D configuration'}"
        )
    return target


def _names(dataset: str, plans: str) -> str:
    """Return the entries of a plans file that name its dataset and itself."""
    return f'"dataset_name": "{dataset}", "plans_name": "{plans}"'
