"""Which normalisation should ``nnUNetv2_vf plan --like`` choose: that of pretraining or that of the target?

    python benchmarks/normalization.py phantoms --work FOLDER [--seeds 0 1 2]
    python benchmarks/normalization.py left_atrium --data DATA --work FOLDER [--seeds 0 1 2]

- phantoms: CT. 24 imported phantoms, whose HU statistics are those of the body; 4 labelled ones, whose statistics are
  those of the organs. Both use CTNormalization.
- left_atrium: MR, at 2 mm. DATA is ``Dataset101_LeftAtrium`` in nnU-Net's raw format, with its ``split.json``. 40
  training cases without labels are pretrained with RescaleTo01Normalization; 4 of the labelled ones are the target,
  for which nnU-Net chooses ZScoreNormalization.

For each seed (of the pretraining, and of the choice of labelled cases) one pretraining and four fine-tunings: both
normalisations, each from pretrained weights and from scratch. The arms from scratch show what the normalisation changes
without pretraining. No score is of a test case: phantoms are generated for this comparison, and for the left atrium
training cases are held out, because the result decides a default.

Writes ``normalization_TASK.json``. A step whose result is in FOLDER is not run again.

Duration: 40 minutes for each task on one CPU core.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import RESULTS, make_parser, markdown_table, write_result

from nnunetv2_vf.demo.journey import shrink_plans
from nnunetv2_vf.demo.phantoms import write_dataset, write_images, write_labels
from nnunetv2_vf.errors import UserError, one_line_errors
from nnunetv2_vf.nnunet_commands import Workspace

UNLABELLED_ID, UNLABELLED = 1, "Dataset001_Unlabelled"
NORMALIZATIONS = ("target", "pretrained")
ARMS = ("pretrained", "scratch")
LABELLED, HELD_OUT = 4, 16  # numbers of cases
GPU_MEMORY_GB = 0.033  # gives the small network a patch of about 32 voxels per side
SPACING_MM = 2.0  # of the left atrium
PRETRAINING = {"num_epochs": 40, "iterations_per_epoch": 25, "val_iterations_per_epoch": 4}
AUGMENTATION = {  # the phantoms' organs differ mainly in their HU, which these would hide
    "phantoms": {"contrast_probability": 0, "gamma": "1,1", "invert_probability": 0},
    "left_atrium": {},
}
FINETUNING = {
    "num_epochs": 8,
    "iterations_per_epoch": 25,
    "val_iterations_per_epoch": 1,
    "optimizer": "adam",
    "initial_lr": 0.001,
}


def main() -> None:
    parser = make_parser(__doc__, output=True, work=True)
    parser.add_argument("task", choices=("phantoms", "left_atrium"))
    parser.add_argument("--data", type=Path, metavar="DATA", help="for left_atrium")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    with one_line_errors():
        rows = [row for seed in args.seeds for row in compare(args, seed)]
    write_result(args.output or RESULTS / f"normalization_{args.task}.json", rows)
    print(f"\n{markdown_table(rows)}")


def compare(args: argparse.Namespace, seed: int) -> list[dict[str, Any]]:
    """Pretrain once; fine-tune with both normalisations, from pretrained weights and from scratch."""
    workspace = Workspace(args.work / f"{args.task}_{seed}", processes=1)
    if not (workspace.folder / "written").exists():
        write_phantoms(workspace, seed) if args.task == "phantoms" else copy_left_atrium(workspace, args.data, seed)
        (workspace.folder / "written").touch()
    artifact = pretrain(workspace, args.task, seed)
    rows = []
    for normalization in NORMALIZATIONS:
        plans = plan_target(workspace, artifact, args.task, normalization)
        for arm in ARMS:
            dice = finetune(workspace, plans, arm, artifact if arm == "pretrained" else None)
            rows.append({"seed": seed, "normalization": normalization, "weights": arm, "dice": round(dice, 4)})
            print(rows[-1], flush=True)
    return rows


# ---------------------------------------------------------------- data


def write_phantoms(workspace: Workspace, seed: int) -> None:
    first = 10_000 + 1000 * seed  # no phantom of the demo or of another seed
    write_images(workspace.folder / "unlabelled", range(first, first + 24))
    write_dataset(workspace.raw / "Dataset002_Target", range(first + 100, first + 100 + LABELLED))
    held_out = range(first + 200, first + 200 + HELD_OUT)
    write_images(workspace.folder / "held_out_images", held_out)
    write_labels(workspace.folder / "held_out_labels", held_out)


def copy_left_atrium(workspace: Workspace, data: Path | None, seed: int) -> None:
    if data is None or not (data / "split.json").is_file():
        raise UserError("left_atrium needs --data with Dataset101_LeftAtrium and its split.json")
    cases = json.loads((data / "split.json").read_text())["train"]
    random.Random(seed).shuffle(cases)
    unlabelled, held_out = cases[:40], cases[40 : 40 + HELD_OUT]
    raw = workspace.raw / "Dataset002_Target"
    copy_cases(data / "imagesTr", unlabelled, "_0000.nii.gz", workspace.folder / "unlabelled")
    copy_cases(data / "imagesTr", unlabelled[:LABELLED], "_0000.nii.gz", raw / "imagesTr")
    copy_cases(data / "labelsTr", unlabelled[:LABELLED], ".nii.gz", raw / "labelsTr")
    copy_cases(data / "imagesTr", held_out, "_0000.nii.gz", workspace.folder / "held_out_images")
    copy_cases(data / "labelsTr", held_out, ".nii.gz", workspace.folder / "held_out_labels")
    description = json.loads((data / "dataset.json").read_text())
    changes = {"channel_names": {"0": "MR"}, "numTraining": LABELLED}
    (raw / "dataset.json").write_text(json.dumps({**description, **changes}))


def copy_cases(source: Path, cases: Sequence[str], ending: str, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for case in cases:
        shutil.copyfile(source / f"{case}{ending}", folder / f"{case}{ending}")


# ---------------------------------------------------------------- trainings


def pretrain(workspace: Workspace, task: str, seed: int) -> Path:
    """Import, plan with a small network, preprocess and pretrain; return the artifact."""
    artifact = workspace.fold_folder(UNLABELLED, "VFPretrainTrainer", "all") / "vf_pretrained.pth"
    if artifact.with_name("pretext_report.json").is_file():
        return artifact
    spacing = spacing_flags(task)
    channel = "CT" if task == "phantoms" else "MR"
    workspace.run("nnUNetv2_vf", "import", "-d", UNLABELLED_ID, "-n", "Unlabelled", workspace.folder / "unlabelled",
                  "-np", 1, "--channel", channel)  # fmt: skip
    workspace.run("nnUNetv2_extract_fingerprint", "-d", UNLABELLED_ID, "-np", 1)
    workspace.run("nnUNetv2_plan_experiment", "-d", UNLABELLED_ID, *spacing)
    plans = workspace.preprocessed / UNLABELLED / "nnUNetPlans.json"
    shrink_plans(plans)
    if task == "left_atrium":
        change_normalization(plans)
    workspace.run("nnUNetv2_preprocess", "-d", UNLABELLED_ID, "-c", "3d_fullres", "-np", 1)
    settings = {**PRETRAINING, **AUGMENTATION[task], "seed": seed}
    workspace.run(
        "nnUNetv2_train", UNLABELLED_ID, "3d_fullres", "all", "-tr", "VFPretrainTrainer", "-device", "cpu",
        **{f"nnUNet_vf_{name}": value for name, value in settings.items()},
    )  # fmt: skip
    return artifact


def spacing_flags(task: str) -> list[object]:
    return ["-overwrite_target_spacing", *[SPACING_MM] * 3] if task == "left_atrium" else []


def change_normalization(file: Path) -> None:
    plans = json.loads(file.read_text())
    plans["configurations"]["3d_fullres"]["normalization_schemes"] = ["RescaleTo01Normalization"]
    file.write_text(json.dumps(plans, indent=2))


def plan_target(workspace: Workspace, artifact: Path, task: str, normalization: str) -> str:
    """Plan and preprocess the labelled cases; return the name of the plans."""
    plans = f"{normalization.capitalize()}Plans"
    folder = workspace.preprocessed / "Dataset002_Target"
    if (folder / f"{plans}.done").exists():
        return plans
    workspace.run("nnUNetv2_extract_fingerprint", "-d", 2, "-np", 1)
    workspace.run(
        "nnUNetv2_vf", "plan", "-d", 2, "--like", artifact, "--normalization", normalization,
        "-gpu_memory_target", GPU_MEMORY_GB, "-overwrite_plans_name", plans, *spacing_flags(task),
    )  # fmt: skip
    workspace.run("nnUNetv2_preprocess", "-d", 2, "-plans_name", plans, "-c", "3d_fullres", "-np", 1)
    (folder / f"{plans}.done").touch()
    return plans


def finetune(workspace: Workspace, plans: str, arm: str, weights: Path | None) -> float:
    """Fine-tune on the labelled cases; return the mean Dice of the held-out ones."""
    results = workspace.folder / f"results_{arm}"
    fold = workspace.fold_folder("Dataset002_Target", "VFFinetuneTrainer", "all", results, plans)
    common = ("-p", plans, "-tr", "VFFinetuneTrainer", "-device", "cpu")
    if not (fold / "checkpoint_final.pth").is_file():
        variables = {f"nnUNet_vf_finetune_{name}": value for name, value in FINETUNING.items()}
        flags = ("-pretrained_weights", weights) if weights else ()
        workspace.run("nnUNetv2_train", 2, "3d_fullres", "all", *common, *flags, nnUNet_results=results, **variables)
    predictions = fold / "held_out"
    if not (predictions / "summary.json").is_file():
        workspace.run(
            "nnUNetv2_predict", "-d", 2, "-c", "3d_fullres", *common, "-f", "all", "-npp", 1, "-nps", 1,
            "-i", workspace.folder / "held_out_images", "-o", predictions, "--disable_tta", nnUNet_results=results,
        )  # fmt: skip
    return workspace.evaluate(workspace.folder / "held_out_labels", predictions)["mean"]


if __name__ == "__main__":
    main()
