"""Pretrain a U-Net of nnU-Net's plans with DKFZ's nnssl, for the comparison of pretexts.

    PYTHON benchmarks/nnssl_pretraining.py IMAGES PLANS --pretext masked --folder FOLDER
        [--epochs 80] [--iterations 50] [--mask-side 16] [--device cpu]

PYTHON is that of an environment with nnssl (Python 3.12 or newer). This package and nnU-Net need not be in it.
``label_efficiency.py --nnssl PYTHON`` runs this script and converts the weights with ``nnUNetv2_vf convert``.

IMAGES is a folder of NIfTI images, PLANS a plans file of nnU-Net. Everything comes from nnssl, with its own values:
preprocessing, loader, augmentation, loss and optimizer of BaseMAETrainer (masked) or VolumeFusionTrainer (fusion). Only
the network, the patch, the batch (all of the plans), the duration and the side of a hidden block are set here, because
nnssl's own trainers fix a ResEnc-L and a patch of 160x160x160.

Writes ``checkpoint_final.pth`` in FOLDER. A second run with the same FOLDER does nothing if this file is there.
Duration: 4000 iterations of the hippocampus experiment on one CPU core: 20 minutes. Needs: nnssl.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

DATASET, DATASET_ID = "Dataset001_Images", 1
CONFIGURATION = "median"  # nnssl's name for images at the median spacing of the dataset
CHECKPOINT = "checkpoint_final.pth"


@dataclass
class Training:
    """What this script sets in a trainer of nnssl."""

    architecture: dict[str, Any]  # an entry of nnU-Net's plans
    patch_size: tuple[int, int, int]
    batch_size: int
    epochs: int
    iterations: int  # of an epoch
    mask_side: int  # voxels


def main() -> None:
    args = parse_arguments()
    if (args.folder / CHECKPOINT).is_file():
        return
    args.folder.mkdir(parents=True, exist_ok=True)
    for name in ("raw", "preprocessed", "results"):  # before the first import of nnssl, which reads them
        os.environ[f"nnssl_{name}"] = str(args.folder / name)
    os.environ["nnUNet_n_proc_DA"] = "1"  # noqa: SIM112  with 0, nnssl fails after the last epoch
    for set_seed in (random.seed, np.random.seed, torch.manual_seed):
        set_seed(args.seed)
    configuration = json.loads(args.plans.read_text())["configurations"]["3d_fullres"]
    training = Training(
        configuration["architecture"],
        tuple(configuration["patch_size"]),
        configuration["batch_size"],
        args.epochs,
        args.iterations,
        args.mask_side,
    )
    plan, images = preprocess(sorted(args.images.glob("*.nii.gz")), args.folder)
    trainer = make_trainer_class(args.pretext, training)(plan, CONFIGURATION, "all", images, torch.device(args.device))
    trainer.run_training()
    shutil.copyfile(Path(trainer.output_folder) / CHECKPOINT, args.folder / CHECKPOINT)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path, metavar="IMAGES")
    parser.add_argument("plans", type=Path, metavar="PLANS")
    parser.add_argument("--pretext", choices=("masked", "fusion"), required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=80)
    parser.add_argument("--iterations", type=int, default=50, help="of an epoch")
    parser.add_argument("--mask-side", type=int, default=16, help="of a hidden block, in voxels")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    args = parser.parse_args()
    args.folder = args.folder.resolve()
    return args


def preprocess(images: list[Path], folder: Path) -> tuple[Any, dict[str, Any]]:
    """Run nnssl's fingerprint, planning and preprocessing; return its plan and its description of the images."""
    from nnssl.data.raw_dataset import Collection, Dataset, Image, Session, Subject
    from nnssl.experiment_planning import plan_and_preprocess_api as nnssl_commands
    from nnssl.experiment_planning.experiment_planners.plan import Plan

    subjects = {
        name: Subject(name, {"0": Session("0", images=[Image(file.name, str(file.resolve()), "unknown")])})
        for file in images
        for name in [file.name.removesuffix(".nii.gz")]
    }
    raw, preprocessed = folder / "raw" / DATASET, folder / "preprocessed" / DATASET
    raw.mkdir(parents=True, exist_ok=True)
    collection = Collection(DATASET_ID, DATASET, {"0": Dataset("0", subjects=subjects)})
    (raw / "pretrain_data.json").write_text(json.dumps(collection.to_dict()))
    nnssl_commands.extract_fingerprints([DATASET_ID], num_processes=1)
    nnssl_commands.plan_experiments([DATASET_ID])
    nnssl_commands.preprocess([DATASET_ID], configurations=[CONFIGURATION], num_processes=[1])
    plan = Plan.load_from_file(str(preprocessed / "nnsslPlans.json"))
    return plan, json.loads((preprocessed / f"pretrain_data__{CONFIGURATION}.json").read_text())


def make_trainer_class(pretext: str, training: Training) -> type:
    """Return nnssl's trainer of a pretext, with the network, patch, batch and duration of this script."""
    from nnssl.adaptation_planning.adaptation_plan import AdaptationPlan, ArchitecturePlans
    from nnssl.architectures.get_network_from_plan import get_network_from_plans
    from nnssl.training.nnsslTrainer.masked_image_modeling.BaseMAETrainer import BaseMAETrainer
    from nnssl.training.nnsslTrainer.volume_fusion.VolumeFusionTrainer import VolumeFusionTrainer

    architecture = training.architecture
    network_class, kwargs = architecture["network_class_name"], architecture["arch_kwargs"]
    imported = architecture["_kw_requires_import"]
    # nnssl's own class for these arguments does not know the arguments of a PlainConvUNet.
    described = SimpleNamespace(serialize=lambda: kwargs, get_kwargs_requiring_import=lambda: imported)

    class Trainer({"masked": BaseMAETrainer, "fusion": VolumeFusionTrainer}[pretext]):
        def __init__(self, *args: Any, **arguments: Any):
            super().__init__(*args, **arguments)
            self.config_plan.patch_size = training.patch_size
            self.vf_subpatch_size = [(8, int(0.625 * side) + 1) for side in training.patch_size]  # nnssl's shares
            self.total_batch_size = training.batch_size
            self.num_epochs, self.num_iterations_per_epoch = training.epochs, training.iterations
            self.num_val_iterations_per_epoch = 4

        def build_architecture_and_adaptation_plan(
            self, config_plan: Any, num_input_channels: int, num_output_channels: int
        ) -> tuple[Any, Any]:
            network = get_network_from_plans(
                network_class, kwargs, imported, num_input_channels, num_output_channels, deep_supervision=False
            )
            return network, AdaptationPlan(
                architecture_plans=ArchitecturePlans(network_class.rpartition(".")[2], described),
                pretrain_plan=self.plan,
                pretrain_num_input_channels=num_input_channels,
                recommended_downstream_patchsize=training.patch_size,
                key_to_encoder="encoder.stages",
                key_to_stem="encoder.stages.0",
                keys_to_in_proj=("encoder.stages.0.0.convs.0.conv", "encoder.stages.0.0.convs.0.all_modules.0"),
            )

        @staticmethod
        def verify_adaptation_plans(*_: Any) -> None:
            """nnssl would build the network from its own class of arguments here."""

        @staticmethod
        def mask_creation(*args: Any, **arguments: Any) -> torch.Tensor:
            return BaseMAETrainer.mask_creation(*args, **{"block_size": training.mask_side, **arguments})

    Trainer.__name__ = {"masked": "BaseMAETrainer", "fusion": "VolumeFusionTrainer"}[pretext]
    return Trainer


if __name__ == "__main__":
    main()
