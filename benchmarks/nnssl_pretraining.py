"""Pretrain the network of nnU-Net's plans with DKFZ's nnssl, for the comparison of pretexts.

    PYTHON benchmarks/nnssl_pretraining.py IMAGES PLANS --pretext masked --mask-side 8 --folder FOLDER
        [--epochs 80] [--iterations 50] [--seed 0] [--device cpu]

PYTHON is that of an environment with nnssl (Python 3.12 or newer). This package and nnU-Net need not be in it.
``label_efficiency.py --nnssl PYTHON`` runs this script and converts the weights with ``nnUNetv2_vf convert``.

IMAGES is a folder of NIfTI images with one channel, PLANS a plans file of nnU-Net. Preprocessing, augmentation, loss
and optimizer are those of nnssl's BaseMAETrainer (masked) or VolumeFusionTrainer (fusion), with its own values. Set
here, because nnssl's trainers are made for a ResEnc-L and patches of 160x160x160:

- network, spacing, patch and batch of the plans; the number of iterations; the side of a hidden block;
- VolumeFusionTrainer takes crops from anywhere, not only from the centre: a small patch would never see the rest;
- all images are used for training: nnssl would hold five out for a validation loss, which nothing depends on.

Writes ``checkpoint_final.pth`` in FOLDER and does nothing if it is there. Duration: 4000 iterations of the hippocampus
experiment with one thread: 17 minutes. Needs: nnssl.
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
CONFIGURATION = "median"  # of nnssl; it would have the median spacing of the images, and gets that of the plans
CHECKPOINT = "checkpoint_final.pth"


@dataclass
class Training:
    """What this script sets in a trainer of nnssl."""

    architecture: dict[str, Any]  # an entry of nnU-Net's plans
    patch_size: tuple[int, int, int]
    batch_size: int
    epochs: int
    iterations: int  # of an epoch
    mask_side: int | None  # voxels


def main() -> None:
    args = parse_arguments()
    if (args.folder / CHECKPOINT).is_file():
        return
    planned = json.loads(args.plans.read_text())["configurations"]["3d_fullres"]
    training = Training(
        planned["architecture"],
        tuple(planned["patch_size"]),
        planned["batch_size"],
        args.epochs,
        args.iterations,
        args.mask_side,
    )
    if args.pretext == "masked" and (not args.mask_side or any(side % args.mask_side for side in training.patch_size)):
        raise SystemExit(f"--mask-side {args.mask_side} does not divide the patch {training.patch_size}")
    args.folder.mkdir(parents=True, exist_ok=True)
    for name in ("raw", "preprocessed", "results"):  # nnssl reads these variables when it is imported
        os.environ[f"nnssl_{name}"] = str(args.folder / name)
    os.environ["nnUNet_n_proc_DA"] = "0"  # noqa: SIM112  samples are drawn in this process, whose seed is set here
    for set_seed in (random.seed, np.random.seed, torch.manual_seed):
        set_seed(args.seed)
    plan, images = preprocess(sorted(args.images.glob("*.nii.gz")), args.folder, planned["spacing"])
    require_same_normalization(plan.configurations[CONFIGURATION], planned)
    trainer_class = {"masked": make_masked_trainer, "fusion": make_fusion_trainer}[args.pretext](training)
    trainer = trainer_class(plan, CONFIGURATION, "all", images, torch.device(args.device))
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
    parser.add_argument("--mask-side", type=int, help="of a hidden block, in voxels; masked only")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    args = parser.parse_args()
    args.folder = args.folder.resolve()
    return args


# ---------------------------------------------------------------- images


def preprocess(files: list[Path], folder: Path, spacing: list[float]) -> tuple[Any, dict[str, Any]]:
    """Run nnssl's fingerprint, planning and preprocessing; return its plan and its description of the images.

    Args:
        spacing: in mm, in the axis order of the plans.
    """
    from nnssl.data.raw_dataset import Collection, Dataset, Image, Session, Subject
    from nnssl.experiment_planning import plan_and_preprocess_api as nnssl_commands

    names = {file.name.removesuffix("_0000.nii.gz"): file.resolve() for file in files}
    if not files or any(not file.name.endswith("_0000.nii.gz") for file in files):
        raise SystemExit(f"the folder must hold images CASE_0000.nii.gz and no other channels; found {len(files)}")
    subjects = {
        name: Subject(name, {"0": Session("0", images=[Image(file.name, str(file), "unknown")])})
        for name, file in names.items()
    }
    raw, preprocessed = folder / "raw" / DATASET, folder / "preprocessed" / DATASET
    raw.mkdir(parents=True, exist_ok=True)
    collection = Collection(DATASET_ID, DATASET, {"0": Dataset("0", subjects=subjects)})
    (raw / "pretrain_data.json").write_text(json.dumps(collection.to_dict()))
    nnssl_commands.extract_fingerprints([DATASET_ID], num_processes=1)
    (plan,) = nnssl_commands.plan_experiments([DATASET_ID])
    plan.configurations[CONFIGURATION].spacing = spacing
    plan.save_to_file(overwrite=True)
    nnssl_commands.preprocess([DATASET_ID], configurations=[CONFIGURATION], num_processes=[1])
    usable = len(json.loads((preprocessed / "valid_imgs.json").read_text()))
    if usable < len(files):  # nnssl only prints which ones
        raise SystemExit(f"nnssl could preprocess {usable} of {len(files)} images; its messages are above")
    everything = [f"{DATASET}__0__{name}" for name in names]
    (preprocessed / "splits_final.json").write_text(json.dumps({"train": everything, "val": everything[:5]}))
    return plan, json.loads((preprocessed / f"pretrain_data__{CONFIGURATION}.json").read_text())


def require_same_normalization(configuration: Any, planned: dict[str, Any]) -> None:
    """Exit unless nnssl and the plans normalize the images alike."""
    own, of_plans = configuration.normalization_schemes, planned["normalization_schemes"]
    if list(own) != list(of_plans):
        raise SystemExit(f"nnssl normalizes by {own}, the plans by {of_plans}; such images cannot be compared")


# ---------------------------------------------------------------- trainers


def make_masked_trainer(training: Training) -> type:
    """Return nnssl's masked autoencoder with the network, patch, batch, duration and blocks of a training."""
    from nnssl.training.nnsslTrainer.masked_image_modeling.BaseMAETrainer import BaseMAETrainer

    class MaskedTrainer(make_mixin(training), BaseMAETrainer):  # type: ignore[misc]
        @staticmethod
        def mask_creation(*args: Any, **arguments: Any) -> torch.Tensor:
            return BaseMAETrainer.mask_creation(*args, **arguments, block_size=training.mask_side)

    return MaskedTrainer


def make_fusion_trainer(training: Training) -> type:
    """Return nnssl's Volume Fusion with the network, patch, batch and duration of a training, and moving crops."""
    from nnssl.training.nnsslTrainer.volume_fusion.VolumeFusionTrainer import VolumeFusionTrainer

    class FusionTrainer(make_mixin(training), VolumeFusionTrainer):  # type: ignore[misc]
        def __init__(self, *args: Any, **arguments: Any):
            super().__init__(*args, **arguments)
            # As in nnssl: from 8 voxels to 62.5 % of the patch.
            self.vf_subpatch_size = [(8, int(0.625 * side) + 1) for side in training.patch_size]

        def get_centercrop_dataloaders_with_doubled_batch_size(self) -> tuple[Any, Any]:
            return self.get_plain_dataloaders(self.config_plan.patch_size)

    return FusionTrainer


def make_mixin(training: Training) -> type:
    """Return a class that gives a trainer of nnssl the network, patch, batch and duration of a training."""
    from nnssl.adaptation_planning.adaptation_plan import AdaptationPlan, ArchitecturePlans
    from nnssl.architectures.get_network_from_plan import get_network_from_plans

    network_class, arguments, imported = (
        training.architecture[key] for key in ("network_class_name", "arch_kwargs", "_kw_requires_import")
    )
    # nnssl's own class for the arguments of a network does not know those of a PlainConvUNet.
    arguments_for_nnssl = SimpleNamespace(serialize=lambda: arguments, get_kwargs_requiring_import=lambda: imported)

    class Mixin:
        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **kwargs)
            self.config_plan.patch_size = training.patch_size
            self.total_batch_size = training.batch_size
            self.num_epochs, self.num_iterations_per_epoch = training.epochs, training.iterations
            self.num_val_iterations_per_epoch = 4

        def build_architecture_and_adaptation_plan(
            self, config_plan: Any, num_input_channels: int, num_output_channels: int
        ) -> tuple[Any, Any]:
            network = get_network_from_plans(
                network_class, arguments, imported, num_input_channels, num_output_channels, deep_supervision=False
            )
            return network, AdaptationPlan(
                architecture_plans=ArchitecturePlans(network_class.rpartition(".")[2], arguments_for_nnssl),
                pretrain_plan=self.plan,
                pretrain_num_input_channels=num_input_channels,
                recommended_downstream_patchsize=training.patch_size,
                key_to_encoder=network.key_to_encoder,
                key_to_stem=network.key_to_stem,
                keys_to_in_proj=network.keys_to_in_proj,
            )

        @staticmethod
        def verify_adaptation_plans(*_: Any) -> None:
            """nnssl would build the network from its own class of arguments here."""

        def on_train_end(self) -> None:
            # nnssl would end the workers of these loaders, but there are none.
            self.dataloader_train = self.dataloader_val = None
            super().on_train_end()

    return Mixin


if __name__ == "__main__":
    main()
