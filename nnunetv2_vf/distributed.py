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
from nnunetv2.run.run_training import run_training_entry
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

from nnunetv2_vf.checkpoints import BEST, FINAL, LATEST
from nnunetv2_vf.errors import UserError, one_line_errors
from nnunetv2_vf.host import require_variables
from nnunetv2_vf.long_training import LongTraining
from nnunetv2_vf.target import dataset_name

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@one_line_errors()
def main() -> None:
    """Join the other ranks, then be nnU-Net's command.

    Raises:
        SystemExit: not started by torchrun, or with another trainer than ours.
    """
    missing = [name for name in _VARIABLES if name not in os.environ]
    if missing:
        raise UserError(
            f"{', '.join(missing)} are not set; start it with torchrun: torchrun --nproc-per-node 2 -m "
            "nnunetv2_vf.distributed DATASET CONFIGURATION FOLD -tr VFPretrainTrainer"
        )
    arguments = _parse(sys.argv[1:])
    rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    if rank > 0:
        os.environ.update(nnUNet_wandb_enabled="0")  # one run on the dashboard, not one of every rank
    if arguments.device == "cuda":
        torch.cuda.set_device(local_rank)
        dist.init_process_group("nccl", device_id=torch.device("cuda", local_rank))
    else:
        warnings.filterwarnings(
            "ignore", ".*GradScaler is enabled, but CUDA is not available"
        )  # nnU-Net's, of any rank
        dist.init_process_group("gloo")
    go_on = [_has_checkpoint(arguments)]
    dist.broadcast_object_list(go_on)  # machines may see a shared folder at different times
    if go_on[0] and not arguments.val:
        sys.argv = [*_without_weights(sys.argv), *([] if arguments.c else ["--c"])]
    run_training_entry()
    dist.destroy_process_group()


def _parse(command: list[str]) -> argparse.Namespace:
    """What of nnU-Net's flags has to be known here; nnU-Net reads them all."""
    parser = argparse.ArgumentParser("nnunetv2_vf.distributed", add_help=False, allow_abbrev=False)
    for name in ("dataset", "configuration", "fold"):
        parser.add_argument(name)
    parser.add_argument("-tr", default="nnUNetTrainer")
    parser.add_argument("-p", default="nnUNetPlans")
    parser.add_argument("-pretrained_weights")  # else it is taken for -p retrained_weights
    parser.add_argument("-device", default="cuda")
    parser.add_argument("-num_gpus", type=int, default=1)
    parser.add_argument("--c", action="store_true")
    parser.add_argument("--val", action="store_true")
    arguments, _ = parser.parse_known_args(command)
    require_variables(nnUNet_preprocessed, nnUNet_results)
    if arguments.num_gpus != 1:
        raise UserError("-num_gpus is nnUNetv2_train's; here torchrun says how many: --nproc-per-node")
    if arguments.device not in ("cuda", "cpu"):
        raise UserError(f"-device {arguments.device} has no collective operations; legal: cuda, cpu")
    if not _is_ours(arguments.tr):
        raise UserError(
            f"-tr {arguments.tr} is not made for several machines; legal: VFPretrainTrainer, VFFinetuneTrainer"
        )
    return arguments


def _is_ours(trainer: str) -> bool:
    """Whether it is one of our trainers, or made of one."""
    try:
        return issubclass(recursive_find_trainer_class_by_name(trainer), LongTraining)
    except RuntimeError as error:
        raise UserError(f"nnU-Net finds no trainer {trainer}: {error}; what is wrong: nnUNetv2_vf doctor") from error


def _has_checkpoint(arguments: argparse.Namespace) -> bool:
    """Whether there is something to go on from: torchrun does not tell a first start from one that follows."""
    run = f"{arguments.tr}__{arguments.p}__{arguments.configuration}"
    folder = Path(nnUNet_results) / dataset_name(arguments.dataset) / run / f"fold_{arguments.fold}"
    return any((folder / name).is_file() for name in (FINAL, LATEST, BEST))


def _without_weights(command: list[str]) -> list[str]:
    """nnU-Net refuses ``-pretrained_weights`` of a training that goes on, which has had them."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("-pretrained_weights")
    return parser.parse_known_args(command)[1]


if __name__ == "__main__":
    main()
