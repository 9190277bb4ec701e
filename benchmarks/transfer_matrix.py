"""One pretrained weights file of each network on targets of every kind: transferred share, loss and time of a step.

    python benchmarks/transfer_matrix.py [--memory 3] [--networks U-Net ResEnc-M PCT-Net FMUNet]

Pretrains the default U-Net, ResEnc-M, PCT-Net and FMUNet for one step on generated phantoms. The targets have 1 or 4
channels, 1 mm or 5 x 1 x 1 mm voxels, and tiny or large volumes. For each target and network the script plans with the
pretrained network (``nnUNetv2_vf plan --like``), adapts the weights if the channels differ, and takes a step of
nnU-Net's training from the transferred weights. It also adapts the weights to the plans that the target gets without
pretraining. The rows of other networks than ``--networks`` stay in the result file.

Duration: 1 hour on 2 CPU cores. Needs: 6 GB of memory.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk  # noqa: N813
from common import RESULTS, by, make_parser, markdown_table, write_result

from nnunetv2_vf.demo.phantoms import write_dataset
from nnunetv2_vf.errors import one_line_errors
from nnunetv2_vf.nnunet_commands import Workspace

OWN_PLANS = {  # network -> planner and plans name without pretraining
    "U-Net": ("ExperimentPlanner", "nnUNetPlans"),
    "ResEnc-M": ("nnUNetPlannerResEncM", "nnUNetResEncUNetMPlans"),
    "PCT-Net": (None, "PCTNetPlans"),
    "FMUNet": (None, "FMUNetPlans"),
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
PRETRAINING = 1  # id of the dataset
CASES = 2


def main() -> None:
    parser = make_parser(__doc__, output=True)
    parser.add_argument("--memory", type=float, default=3, metavar="GB", help="-gpu_memory_target of every plan")
    parser.add_argument("--networks", nargs="+", default=[*OWN_PLANS], choices=[*OWN_PLANS])
    args = parser.parse_args()
    with one_line_errors(), tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        os.environ |= Workspace(folder, processes=1).environment | {  # nnU-Net reads its variables when it is imported
            "nnUNet_vf_num_epochs": "1",
            "nnUNet_vf_iterations_per_epoch": "1",
            "nnUNet_vf_val_iterations_per_epoch": "1",
        }
        rows = list(measure_matrix(folder, args.memory, args.networks))
    file = args.output or RESULTS / "transfer_matrix_cpu.json"
    earlier = json.loads(file.read_text()) if file.is_file() else []
    rows += [row for row in earlier if row["network"] not in args.networks]
    targets = [(channels, by(spacing), by(shape)) for channels, spacing, shape in TARGETS]
    networks = [*OWN_PLANS]
    rows.sort(
        key=lambda row: (
            targets.index((row["channels"], row["spacing, mm"], row["shape"])),
            networks.index(row["network"]),
        )
    )
    write_result(file, rows)
    print(f"\n{markdown_table(rows)}")


def measure_matrix(folder: Path, memory: float, networks: Sequence[str]) -> Iterator[dict[str, Any]]:
    write_dataset(folder / "raw" / f"Dataset{PRETRAINING:03d}_Phantoms", range(CASES), spacing=2.0)
    with quiet():
        extract(PRETRAINING)
        artifacts = {network: pretrain(network, folder, memory) for network in networks}
    for index, target in enumerate(TARGETS):
        dataset_id = PRETRAINING + 1 + index
        write_target(folder / "raw" / f"Dataset{dataset_id:03d}_Target", dataset_id, *target)
        with quiet():
            extract(dataset_id)
        for network, artifact in artifacts.items():
            with quiet():
                row = measure_cell(network, artifact, dataset_id, target, folder, memory)
            print(row, flush=True)
            yield row


def pretrain(network: str, folder: Path, memory: float) -> Path:
    """Pretrain for one step; return the weights file."""
    import torch
    from nnunetv2.experiment_planning.plan_and_preprocess_api import preprocess
    from nnunetv2.run.run_training import run_training

    plans = plan(network, PRETRAINING, memory)
    preprocess([PRETRAINING], plans, configurations=["3d_fullres"], num_processes=[1])
    run_training(str(PRETRAINING), "3d_fullres", "all", "VFPretrainTrainer", plans, device=torch.device("cpu"))
    fold = f"VFPretrainTrainer__{plans}__3d_fullres/fold_all"
    return folder / "results" / f"Dataset{PRETRAINING:03d}_Phantoms" / fold / "vf_pretrained.pth"


def extract(dataset_id: int) -> None:
    from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprints

    extract_fingerprints([dataset_id], num_processes=1)


def plan(network: str, dataset_id: int, memory: float) -> str:
    """Plan a dataset as without pretraining; return the name of the plans."""
    from nnunetv2.experiment_planning.plan_and_preprocess_api import plan_experiments

    from nnunetv2_vf.cli import main as command

    planner, plans = OWN_PLANS[network]
    if planner is None:
        name = plans.removesuffix("Plans")
        command(["plan", "-d", str(dataset_id), "--network", name, "-gpu_memory_target", str(memory)])
    else:
        plan_experiments([dataset_id], planner, gpu_memory_target_in_gb=memory, overwrite_plans_name=plans)
    return plans


def measure_cell(
    network: str, artifact: Path, dataset_id: int, target: Any, folder: Path, memory: float
) -> dict[str, Any]:
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
        "spacing, mm": by(spacing),
        "shape": by(shape),
        "patch": by(configuration.patch_size),
        "batch": configuration.batch_size,
        "transferred": f"{share:.1%}",
        "loss": f"{loss:.2f}",
        "step": f"{seconds:.1f} s",
        "transferred, own plans": f"{own_share:.1%}",
    }


def step(weights: Path, dataset_id: int, plans: str) -> tuple[Any, float, float]:
    """Start nnUNetv2_train with -pretrained_weights; return the configuration, loss and seconds of its first step."""
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
    """Write cases of noise with a brighter block, label 1."""
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


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress the messages of nnU-Net's and our own commands."""
    with Path(os.devnull).open("w") as null, contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
        yield


if __name__ == "__main__":
    main()
