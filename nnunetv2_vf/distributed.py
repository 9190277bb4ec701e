"""``torchrun --nnodes N --nproc-per-node G -m nnunetv2_vf.distributed DATASET CONFIGURATION FOLD -tr TRAINER [flags]``

``nnUNetv2_train`` in every one of torchrun's processes, on one machine or several, on GPUs or (``-device cpu``) CPUs.
The flags are nnU-Net's. A launch goes on where the checkpoints of its folder end, so that whatever restarts it
(torchrun's ``--max-restarts``, a cluster that requeues the job) loses nothing; to train anew, move the folder away.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from nnunetv2.paths import nnUNet_preprocessed, nnUNet_results
from nnunetv2.run.run_training import run_training
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

from nnunetv2_vf.errors import UserError, one_line_errors
from nnunetv2_vf.nnunet_folders import dataset_name, require_variables
from nnunetv2_vf.training.checkpoints import BEST, FINAL, LATEST
from nnunetv2_vf.training.ranks import join
from nnunetv2_vf.training.resumable_trainer import ResumableTrainer

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@one_line_errors()
def main() -> None:
    """Join the other ranks, then train as nnU-Net's command does.

    Raises:
        SystemExit: not started by torchrun, or with another trainer than ours.
    """
    arguments = _parse(sys.argv[1:])
    missing = [name for name in _VARIABLES if name not in os.environ]
    if missing:
        raise UserError(
            f"{', '.join(missing)} are not set; start it with torchrun: torchrun --nproc-per-node 2 -m "
            "nnunetv2_vf.distributed DATASET CONFIGURATION FOLD -tr VFPretrainTrainer"
        )
    _check(arguments)
    if int(os.environ["RANK"]) > 0:
        os.environ.update(nnUNet_wandb_enabled="0")  # one run on the dashboard, not one of every rank
    if arguments.device == "cuda":
        gpu = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(gpu)
        torch.set_num_threads(1)  # as nnU-Net's command does
        join("nccl", device_id=gpu)
    else:
        warnings.filterwarnings(
            "ignore", ".*GradScaler is enabled, but CUDA is not available"
        )  # nnU-Net's, of any rank
        join("gloo")
    goes_on = [_has_checkpoint(arguments) and not arguments.val]
    dist.broadcast_object_list(goes_on)  # machines may see a shared folder at different times
    run_training(
        arguments.dataset_name_or_id,
        arguments.configuration,
        arguments.fold,
        arguments.tr,
        arguments.p,
        export_validation_probabilities=arguments.npz,
        continue_training=goes_on[0],  # without a checkpoint there is nothing that --c could mean
        only_run_validation=arguments.val,
        disable_checkpointing=arguments.disable_checkpointing,
        val_with_best=arguments.val_best,
        device=torch.device(arguments.device),
    )
    dist.destroy_process_group()


def _parse(command: list[str]) -> argparse.Namespace:
    """The flags of nnUNetv2_train, whose own parser has them all in one function with what it does."""
    parser = argparse.ArgumentParser("python -m nnunetv2_vf.distributed", allow_abbrev=False)
    for name in ("dataset_name_or_id", "configuration", "fold"):
        parser.add_argument(name)
    parser.add_argument("-tr", default="nnUNetTrainer", help="VFPretrainTrainer or VFFinetuneTrainer")
    parser.add_argument("-p", default="nnUNetPlans", help="plans")
    parser.add_argument("-pretrained_weights", help="of a training that begins; the trainers read it themselves")
    parser.add_argument("-num_gpus", type=int, default=1, help="not here: torchrun says how many processes")
    parser.add_argument("-device", default="cuda", help="cuda or cpu")
    for flag, about in {
        "--npz": "save the probabilities of the final validation",
        "--c": "continue; a launch that finds checkpoints does so in any case",
        "--val": "validate only",
        "--val_best": "validate with the best checkpoint",
        "--disable_checkpointing": "write no checkpoints",
    }.items():
        parser.add_argument(flag, action="store_true", help=about)
    return parser.parse_args(command)


def _check(arguments: argparse.Namespace) -> None:
    require_variables(nnUNet_preprocessed, nnUNet_results)
    if arguments.num_gpus != 1:
        raise UserError("-num_gpus is nnUNetv2_train's; here torchrun says how many: --nproc-per-node")
    if arguments.device not in ("cuda", "cpu"):
        raise UserError(f"-device {arguments.device} has no collective operations; legal: cuda, cpu")
    if not _is_ours(arguments.tr):
        raise UserError(
            f"-tr {arguments.tr} is not made for several machines; legal: VFPretrainTrainer, VFFinetuneTrainer"
        )


def _is_ours(trainer: str) -> bool:
    """Whether it is one of our trainers, or made of one."""
    try:
        return issubclass(recursive_find_trainer_class_by_name(trainer), ResumableTrainer)
    except RuntimeError as error:
        raise UserError(f"nnU-Net finds no trainer {trainer}: {error}; what is wrong: nnUNetv2_vf doctor") from error


def _has_checkpoint(arguments: argparse.Namespace) -> bool:
    """Whether there is something to go on from: torchrun does not tell a first start from one that follows."""
    run = f"{arguments.tr}__{arguments.p}__{arguments.configuration}"
    folder = Path(nnUNet_results) / dataset_name(arguments.dataset_name_or_id) / run / f"fold_{arguments.fold}"
    return any((folder / name).is_file() for name in (FINAL, LATEST, BEST))


if __name__ == "__main__":
    main()
