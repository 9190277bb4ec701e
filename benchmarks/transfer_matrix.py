"""Pretrain once, fine-tune anywhere: one artifact of each network on targets of every kind, at full width.

    python benchmarks/anywhere.py [--memory 3] [--out FOLDER]

Pretrains the default U-Net, ResEnc-M and PCT-Net for one step on generated phantoms. For targets with 1 and 4
channels, of 1 mm and of 5 x 1 x 1 mm, tiny and large, it then plans with the topology of each artifact (``nnUNetv2_vf
plan --like``), adapts it where the channels differ, and takes a step of nnU-Net's training from the transferred
weights. It also adapts each artifact to the plans that the target would have got by itself. Prints a Markdown table;
writes ``docs/anywhere_cpu.json``.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk  # noqa: N813

from nnunetv2_vf.demo.phantoms import write_dataset
from nnunetv2_vf.errors import one_line_errors
from nnunetv2_vf.nnunet_commands import TRAINER_VARIABLE, trainer_path

STOCK = {  # the planner, and the plans that it makes
    "U-Net": ("ExperimentPlanner", "nnUNetPlans"),
    "ResEnc-M": ("nnUNetPlannerResEncM", "nnUNetResEncUNetMPlans"),
    "PCT-Net": (None, "PCTNetPlans"),
}
TARGETS = [
    (channels, spacing, shape)
    for channels in (1, 4)
    for spacing, shapes in (
        ((1.0, 1.0, 1.0), ((20, 24, 20), (128, 160, 144))),
        ((5.0, 1.0, 1.0), ((6, 48, 48), (24, 256, 256))),
    )
    for shape in shapes
]
PRETRAINING = 1  # its dataset's id
CASES = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", type=float, default=3, metavar="GB", help="-gpu_memory_target of every plan")
    parser.add_argument("--out", type=Path, help="where to keep everything; default: a temporary folder")
    parser.add_argument("--docs", type=Path, default=Path(__file__).parent.parent / "docs")
    args = parser.parse_args()
    with one_line_errors(), tempfile.TemporaryDirectory() as temporary:
        folder = args.out or Path(temporary)
        prepare(folder)
        rows = list(matrix(folder, args.memory))
    (args.docs / "anywhere_cpu.json").write_text(json.dumps(rows, indent=2) + "\n")
    print("\n| " + " | ".join(rows[0]) + " |\n" + "|---" * len(rows[0]) + "|")
    for row in rows:
        print("| " + " | ".join(map(str, row.values())) + " |")


def prepare(folder: Path) -> None:
    """Folders and variables of nnU-Net, which it reads when it is imported."""
    for name in ("raw", "preprocessed", "results"):
        (folder / name).mkdir(parents=True)
        os.environ[f"nnUNet_{name}"] = str(folder / name)
    schedule = {f"nnUNet_vf_{name}epoch": "1" for name in ("iterations_per_", "val_iterations_per_")}
    os.environ.update(schedule, nnUNet_vf_num_epochs="1", nnUNet_n_proc_DA="1", nnUNet_def_n_proc="1")
    os.environ[TRAINER_VARIABLE] = trainer_path("")


def matrix(folder: Path, memory: float) -> Iterator[dict[str, Any]]:
    write_dataset(folder / "raw" / f"Dataset{PRETRAINING:03d}_Phantoms", range(CASES), spacing=2.0)
    with quiet():
        artifacts = {network: pretrain(network, folder, memory) for network in STOCK}
    for index, target in enumerate(TARGETS):
        dataset_id = PRETRAINING + 1 + index
        write_target(folder / "raw" / f"Dataset{dataset_id:03d}_Target", dataset_id, *target)
        with quiet():
            extract(dataset_id)
        for network, artifact in artifacts.items():
            with quiet():
                row = cell(network, artifact, dataset_id, target, folder, memory)
            print(row, flush=True)
            yield row


def pretrain(network: str, folder: Path, memory: float) -> Path:
    """The artifact of one step of pretraining."""
    import torch
    from nnunetv2.experiment_planning.plan_and_preprocess_api import preprocess
    from nnunetv2.run.run_training import run_training

    if network == "U-Net":
        extract(PRETRAINING)
    plans = plan(network, PRETRAINING, memory)
    if network != "ResEnc-M":  # which takes the default plans' preprocessed data
        preprocess([PRETRAINING], plans, configurations=["3d_fullres"], num_processes=[1])
    run_training(str(PRETRAINING), "3d_fullres", "all", "VFPretrainTrainer", plans, device=torch.device("cpu"))
    fold = f"VFPretrainTrainer__{plans}__3d_fullres/fold_all"
    return folder / "results" / f"Dataset{PRETRAINING:03d}_Phantoms" / fold / "vf_pretrained.pth"


def extract(dataset_id: int) -> None:
    from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprints

    extract_fingerprints([dataset_id], num_processes=1)


def plan(network: str, dataset_id: int, memory: float) -> str:
    """Plan a dataset as it would be by itself; returns the plans' name."""
    from nnunetv2.experiment_planning.plan_and_preprocess_api import plan_experiments

    from nnunetv2_vf.cli import main as command

    planner, plans = STOCK[network]
    if planner is None:
        command(["plan", "-d", str(dataset_id), "-gpu_memory_target", str(memory)])
    else:
        plan_experiments([dataset_id], planner, gpu_memory_target_in_gb=memory, overwrite_plans_name=plans)
    return plans


def cell(network: str, artifact: Path, dataset_id: int, target: Any, folder: Path, memory: float) -> dict[str, Any]:
    from nnunetv2.experiment_planning.plan_and_preprocess_api import preprocess

    from nnunetv2_vf.cli import main as command
    from nnunetv2_vf.transfer.artifact import read_artifact

    channels, spacing, shape = target
    like = f"Like{network}Plans"
    common = ["-d", str(dataset_id)]
    command(
        ["plan", *common, "--like", str(artifact), "-overwrite_plans_name", like, "-gpu_memory_target", str(memory)]
    )
    preprocess([dataset_id], like, configurations=["3d_fullres"], num_processes=[1])
    weights, share = artifact, 1.0
    if channels != 1:
        weights = folder / "adapted.pth"
        command(["adapt", str(artifact), *common, "-p", like, "-o", str(weights)])
        share = read_artifact(weights)["vf"]["adapted"]["transferred_share"]
    configuration, loss, seconds = step(weights, dataset_id, like)
    own = folder / "own.pth"
    own_plans = plan(network, dataset_id, memory)
    command(["adapt", str(artifact), *common, "-p", own_plans, "-o", str(own)])
    own_share = read_artifact(own)["vf"]["adapted"]["transferred_share"]
    return {
        "network": network,
        "channels": channels,
        "spacing, mm": by(f"{mm:g}" for mm in spacing),
        "shape": by(map(str, shape)),
        "patch": by(map(str, configuration.patch_size)),
        "batch": configuration.batch_size,
        "transferred": f"{share:.1%}",
        "loss": f"{loss:.2f}",
        "step": f"{seconds:.1f} s",
        "transferred, own plans": f"{own_share:.1%}",
    }


def step(weights: Path, dataset_id: int, plans: str) -> tuple[Any, float, float]:
    """nnUNetv2_train with -pretrained_weights up to its first step: configuration, loss, seconds of the step."""
    import torch
    from nnunetv2.run.run_training import get_trainer_from_args, maybe_load_checkpoint

    sys.argv = ["nnUNetv2_train", "-pretrained_weights", str(weights)]
    device = torch.device("cpu")
    trainer = get_trainer_from_args(str(dataset_id), "3d_fullres", "all", "VFFinetuneTrainer", plans, device=device)
    maybe_load_checkpoint(trainer, False, False, str(weights))
    trainer.on_train_start()
    batch = next(trainer.dataloader_train)
    start = time.monotonic()
    loss = float(trainer.train_step(batch)["loss"])
    seconds = time.monotonic() - start
    trainer.disable_checkpointing = True
    trainer.on_train_end()
    return trainer.configuration_manager, loss, seconds


def write_target(folder: Path, seed: int, channels: int, spacing: tuple[float, ...], shape: tuple[int, ...]) -> None:
    """Cases of noise with a brighter block, label 1."""
    rng = np.random.default_rng(seed)
    for kind in ("imagesTr", "labelsTr"):
        (folder / kind).mkdir(parents=True)
    for case in range(CASES):
        labels = np.zeros(shape, dtype=np.uint8)
        labels[tuple(slice(side // 4, side // 2 + 1) for side in shape)] = 1
        write(labels, spacing, folder / "labelsTr" / f"case{case}.nii.gz")
        for channel in range(channels):
            image = rng.normal(size=shape).astype(np.float32) + 2 * labels
            write(image, spacing, folder / "imagesTr" / f"case{case}_{channel:04d}.nii.gz")
    description = {
        "channel_names": {str(channel): f"MR{channel}" for channel in range(channels)},
        "labels": {"background": 0, "block": 1},
        "numTraining": CASES,
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(description))


def write(array: np.ndarray, spacing: tuple[float, ...], path: Path) -> None:
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing[::-1])
    sitk.WriteImage(image, path)


def by(sides: Any) -> str:
    return " x ".join(sides)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """nnU-Net's and our own reports are not this script's."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


if __name__ == "__main__":
    main()
