"""Train on several GPUs, machines or CPUs: torchrun starts this module in each process; it runs nnUNetv2_train there.

::

    torchrun --nnodes N --nproc-per-node G -m nnunetv2_vf.distributed DATASET CONFIGURATION FOLD -tr TRAINER [flags]

The flags are those of nnUNetv2_train. A launch continues from the checkpoints in the fold's folder, if there are any.
A restart (torchrun's ``--max-restarts``, or a cluster that requeues the job) therefore loses nothing. To start from
the beginning, move the folder away.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from nnunetv2.paths import nnUNet_preprocessed, nnUNet_results
from nnunetv2.run.run_training import run_training
from nnunetv2.utilities.file_path_utilities import get_output_folder
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

from nnunetv2_vf.errors import OneLineArgumentParser, UserError, one_line_errors
from nnunetv2_vf.nnunet_folders import dataset_name, require_variables
from nnunetv2_vf.training.checkpoints import BEST, FINAL, LATEST
from nnunetv2_vf.training.preflight import require_gpu
from nnunetv2_vf.training.ranks import join_process_group
from nnunetv2_vf.training.resumable_trainer import ResumableTrainer

_CHECKPOINT_WAIT_S = 120
_TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@one_line_errors()
def main() -> None:
    """Join the other ranks, then train as nnUNetv2_train does."""
    args = parse_arguments(sys.argv[1:])
    _require_torchrun()
    _require_legal_arguments(args)
    if int(os.environ["RANK"]) > 0:
        os.environ.update(nnUNet_wandb_enabled="0")  # one run on the dashboard, not one per rank
    _join_ranks(args.device)
    run_training(
        args.dataset_name_or_id,
        args.configuration,
        args.fold,
        args.tr,
        args.p,
        export_validation_probabilities=args.npz,
        continue_training=_is_continued(args),
        only_run_validation=args.val,
        disable_checkpointing=args.disable_checkpointing,
        val_with_best=args.val_best,
        device=torch.device(args.device),
    )
    dist.destroy_process_group()


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the flags of nnUNetv2_train, whose own parser cannot be called without starting a training."""
    parser = OneLineArgumentParser(
        "python -m nnunetv2_vf.distributed",
        description="Run nnUNetv2_train in each process of torchrun. A launch continues from the checkpoints in the "
        "folder of the fold, if there are any.",
        allow_abbrev=False,
    )
    parser.add_argument("dataset_name_or_id", help="dataset id or name")
    parser.add_argument("configuration", help="for example 3d_fullres")
    parser.add_argument("fold", type=_fold, help="0 to 4, or all")
    parser.add_argument("-tr", required=True, help="VFPretrainTrainer or VFFinetuneTrainer")
    parser.add_argument("-p", default="nnUNetPlans", help="name of the plans; default: %(default)s")
    parser.add_argument("-pretrained_weights", help="weights to start from; a training that continues refuses others")
    parser.add_argument("-num_gpus", type=int, default=1, help="must be 1: torchrun sets the number of processes")
    parser.add_argument("-device", default="cuda", choices=("cuda", "cpu"), help="where to train; default: %(default)s")
    parser.add_argument("--npz", action="store_true", help="save the probabilities of the final validation")
    parser.add_argument("--c", action="store_true", help="ignored: a launch that finds checkpoints always continues")
    parser.add_argument("--val", action="store_true", help="run only the final validation")
    parser.add_argument("--val_best", action="store_true", help="validate with the best checkpoint")
    parser.add_argument("--disable_checkpointing", action="store_true", help="write no checkpoints")
    return parser.parse_args(arguments)


def _fold(text: str) -> str:
    """Return a fold as nnU-Net names its folder: 00, as ``seq -w`` writes it, is 0."""
    if text != "all" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no fold; legal: 0 to 4, or all")
    return text if text == "all" else str(int(text))


def _require_torchrun() -> None:
    missing = [name for name in _TORCHRUN_VARIABLES if name not in os.environ]
    if missing:
        raise UserError(
            f"{', '.join(missing)} are not set; start it with torchrun: torchrun --nproc-per-node 2 -m "
            "nnunetv2_vf.distributed DATASET CONFIGURATION FOLD -tr VFPretrainTrainer"
        )


def _require_legal_arguments(args: argparse.Namespace) -> None:
    require_variables(nnUNet_preprocessed, nnUNet_results)
    if args.num_gpus != 1:
        raise UserError(f"-num_gpus {args.num_gpus} has no effect with torchrun; use torchrun's --nproc-per-node")
    try:
        trainer = recursive_find_trainer_class_by_name(args.tr)
    except RuntimeError as error:
        raise UserError(f"nnU-Net finds no trainer {args.tr}: {error}; to find out why: nnUNetv2_vf doctor") from error
    if not issubclass(trainer, ResumableTrainer):
        raise UserError(f"-tr {args.tr} cannot train on several machines; legal: VFPretrainTrainer, VFFinetuneTrainer")
    require_gpu(torch.device(args.device))
    gpus, local_rank = torch.cuda.device_count(), int(os.environ["LOCAL_RANK"])
    if args.device == "cuda" and local_rank >= gpus:
        raise UserError(f"this machine has {gpus} GPUs, too few for local rank {local_rank}: --nproc-per-node {gpus}")


def _join_ranks(device: str) -> None:
    if device == "cuda":
        gpu = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(gpu)
        torch.set_num_threads(1)  # as nnUNetv2_train does
        join_process_group("nccl", device_id=gpu)
    else:
        # nnU-Net makes a GradScaler on CPUs too, and every rank would print torch's warning about it
        warnings.filterwarnings("ignore", ".*GradScaler is enabled, but CUDA is not available")
        join_process_group("gloo")


def _is_continued(args: argparse.Namespace) -> bool:
    """Return on all ranks whether rank 0 finds checkpoints; then wait until this rank finds them too.

    torchrun does not tell whether a start is the first one. A shared folder may show new files to other machines later.

    Raises:
        UserError: this rank still does not find them after two minutes.
    """
    found = [[] if args.val else _checkpoints(args)]
    dist.broadcast_object_list(found)
    deadline = time.monotonic() + _CHECKPOINT_WAIT_S
    while missing := {*found[0]} - {*_checkpoints(args)}:
        if time.monotonic() > deadline:
            raise UserError(
                f"rank {os.environ['RANK']} does not find {', '.join(sorted(missing))}, which rank 0 finds in "
                f"{_fold_folder(args)}; nnUNet_results has to be the same folder on all machines"
            )
        time.sleep(1)
    return bool(found[0])


def _checkpoints(args: argparse.Namespace) -> list[str]:
    """Return the names of the checkpoints in the fold's folder."""
    return [name for name in (FINAL, LATEST, BEST) if (_fold_folder(args) / name).is_file()]


def _fold_folder(args: argparse.Namespace) -> Path:
    name = dataset_name(args.dataset_name_or_id)
    return Path(get_output_folder(name, args.tr, args.p, args.configuration, args.fold))


if __name__ == "__main__":
    main()
