"""Commands that messages of this package suggest, ready to be pasted into a shell."""

from __future__ import annotations

import shlex
from pathlib import Path

from nnunetv2_vf.transfer.target_plans import TargetPlans


def adapt_command(file: Path, target: TargetPlans) -> str:
    """Return the command that adapts a file of weights to the target's plans."""
    return (
        f"nnUNetv2_vf adapt {shlex.quote(str(file))} -d {target.dataset_id} -p {target.plans_manager.plans_name} "
        f"-c {target.configuration_name} -o {shlex.quote(adapted_file_name(file, target.dataset_id))}"
    )


def adapted_file_name(file: Path, dataset_id: int) -> str:
    """Return a name for adapted weights; it is never the name of the file that they are made from."""
    return f"{file.stem}_for_{dataset_id}.pth"


def convert_command(file: Path) -> str:
    """Return the command that makes an artifact from a checkpoint of another project, or from safetensors."""
    return f"nnUNetv2_vf convert {shlex.quote(str(file))} -o {shlex.quote(converted_file_name(file))}"


def converted_file_name(file: Path) -> str:
    """Return a name for converted weights."""
    return f"{file.stem}.pth"


def finetune_command(
    dataset: int | str, configuration_name: str, fold: int | str, plans_name: str, weights: Path | str
) -> str:
    """Return the command that fine-tunes from a file of weights."""
    return (
        f"nnUNetv2_train {dataset} {configuration_name} {fold} -p {plans_name} -tr VFFinetuneTrainer "
        f"-pretrained_weights {shlex.quote(str(weights))}"
    )


def plan_like_command(file: Path | str, target: TargetPlans) -> str:
    """Return the command that plans the target with the network of a file of weights."""
    return f"nnUNetv2_vf plan -d {target.dataset_id} --like {shlex.quote(str(file))}"
