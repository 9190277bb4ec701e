"""``nnUNetv2_vf preview``: draw samples as pretraining shows them to the network."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path

import torch
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class

from nnunetv2_vf.errors import UserError
from nnunetv2_vf.pretext.dataset import VALIDATION, PretextDataset
from nnunetv2_vf.pretext.loader import collate
from nnunetv2_vf.pretext.pictures import draw_examples, make_examples, view_names
from nnunetv2_vf.settings import VFSettings
from nnunetv2_vf.training.preflight import (
    check_patch,
    preprocessed_cases,
    preprocessed_folder,
    pretraining_configuration,
)
from nnunetv2_vf.transfer.target_plans import load_target


def preview(
    dataset: str,
    configuration_name: str,
    plans_name: str,
    num_samples: int,
    path: Path,
    environment: Mapping[str, str],
) -> None:
    """Draw the first validation samples of a pretraining with fold 'all'.

    Args:
        dataset: nnU-Net's dataset id or name.
        configuration_name: for example 3d_fullres.
        plans_name: name of the plans file, without ``.json``.
        num_samples: number of samples to draw.
        path: the PNG file to write.
        environment: environment variables, with the settings ``nnUNet_vf_<field>``.

    Raises:
        UserError: the folder of ``path``, an environment variable, the dataset, its plans or its preprocessed cases are
            missing, a setting is not legal, or no case can be used.
    """
    if not path.parent.is_dir():
        raise UserError(f"the folder {path.parent} does not exist; make it: mkdir -p {shlex.quote(str(path.parent))}")
    target = load_target(dataset, plans_name, configuration_name)
    plans_manager = target.plans_manager
    settings = VFSettings.resolve(plans_manager.plans, environment)
    configuration = pretraining_configuration(plans_manager, configuration_name)
    for warning in check_patch(configuration, settings):
        print(warning)
    names = preprocessed_cases(plans_manager, configuration_name)

    folder = preprocessed_folder(plans_manager, configuration)
    cases = infer_dataset_class(str(folder))(str(folder), names)
    samples = PretextDataset(cases, configuration.patch_size, settings, VALIDATION, target.input_channels)
    batch = collate([samples[index] for index in range(num_samples)])
    for rejected in dict.fromkeys(batch["rejected"]):
        print(f"skipped case {rejected.case}: it {rejected.reason}")
    if "tensors" not in batch:
        first = batch["rejected"][0].case
        raise UserError(f"no usable sub-volume found in {folder}; check the images, for example of {first}")
    examples = make_examples(batch, settings, torch.device("cpu"))
    draw_examples(examples, view_names(plans_manager.transpose_forward), settings, path)
