"""The command ``nnUNetv2_vf``: parse, call one function. Heavy imports stay inside the subcommands."""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nnunetv2_vf import __version__
from nnunetv2_vf.errors import UserError, one_line_errors
from nnunetv2_vf.nnunet_commands import TRAINER_VARIABLE, trainer_path


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one subcommand."""
    args = _parser().parse_args(arguments)
    with one_line_errors():
        args.run(args)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nnUNetv2_vf",
        description="Volume Fusion pretraining for nnU-Net v2. Training and prediction are nnU-Net's own commands: "
        "nnUNetv2_train ... -tr VFPretrainTrainer, then nnUNetv2_train ... -pretrained_weights vf_pretrained.pth.",
    )
    parser.add_argument("--version", action="version", version=f"nnunetv2-vf {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    env = _add(commands, "env", _env, f"print the line that sets {TRAINER_VARIABLE}, for nnU-Net to find the trainers")
    env.add_argument("--shell", choices=sorted(_EXPORT), default="sh", help="default: sh (bash, zsh, dash)")

    _add_import(commands)

    _add_plan(commands)

    preview = _add(commands, "preview", _preview, "draw what pretraining on a preprocessed dataset shows the network")
    preview.add_argument("-d", required=True, metavar="DATASET", help="dataset id or name")
    preview.add_argument("-c", default="3d_fullres", metavar="CONFIGURATION", help="default: %(default)s")
    preview.add_argument("-p", default="nnUNetPlans", metavar="PLANS", help="default: %(default)s")
    preview.add_argument(
        "-n", type=int, choices=range(1, 21), default=3, metavar="N", help="1 to 20 examples; default: %(default)s"
    )
    preview.add_argument("-o", type=Path, default=Path("preview.png"), metavar="PNG", help="default: %(default)s")

    convert = _add(commands, "convert", _convert, "make vf_pretrained.pth of a checkpoint of MIS-FM or nnssl")
    convert.description = (
        "Make a vf_pretrained.pth of weights of other projects' Volume Fusion: MIS-FM's released PCT-Net, "
        "nnssl's ResEnc-L, other residual encoder U-Nets, and Primus-M."
    )
    convert.add_argument("release", type=Path, metavar="CHECKPOINT")
    convert.add_argument("-o", type=Path, required=True, metavar="OUT.pth")
    convert.add_argument(
        "--mode",
        type=int,
        choices=(0, 1, 2),
        help="resolution mode of MIS-FM's PCT-Net; default: the one the release was trained with",
    )

    _add_adapt(commands)

    info = _add(commands, "info", _info, "what a file of weights is, without running anything it may hold")
    info.add_argument("file", type=Path, metavar="FILE")

    doctor = _add(commands, "doctor", _doctor, "whether installation, dataset, plans and weights are all in place")
    doctor.add_argument("-d", metavar="DATASET", help="dataset id or name")
    doctor.add_argument("-p", default="nnUNetPlans", metavar="PLANS", help="default: %(default)s")
    doctor.add_argument("-c", default="3d_fullres", metavar="CONFIGURATION", help="default: %(default)s")
    doctor.add_argument("-w", type=Path, metavar="FILE", help="pretrained weights for these plans")

    demo = _add(commands, "demo", _demo, "the whole journey on generated phantoms, in a few minutes")
    demo.add_argument(
        "--out", type=Path, metavar="FOLDER", help="where to keep everything; default: a new temporary one"
    )
    demo.add_argument("-device", choices=("cpu", "cuda", "mps"), help="default: cuda if there is one, else cpu")
    return parser


def _add_plan(commands: argparse._SubParsersAction) -> None:
    parser = _add(commands, "plan", _plan, "nnU-Net's experiment planning, with PCT-Net or the network of your weights")
    parser.description = (
        "nnU-Net's experiment planning; needs nnUNetv2_extract_fingerprint. The 3D configurations get PCT-Net or, "
        "with --like, the network of pretrained weights, which then fit. Patch and batch size follow from the "
        "dataset and the memory. Writes the plans where nnU-Net keeps them, and prints the commands that come next. "
        "PCT-Net's resolution mode follows from the spacing: 0 if the slices are less than twice as far apart as the "
        "voxels within them, 1 up to four times, 2 beyond."
    )
    parser.add_argument("-d", required=True, nargs="+", metavar="DATASET", help="dataset ids or names")
    parser.add_argument(
        "-gpu_memory_target",
        type=float,
        metavar="GB",
        help="memory of the GPU, a tenth of which is left free; default: 8",
    )
    parser.add_argument(
        "-preprocessor_name", default="DefaultPreprocessor", metavar="CLASS", help="nnU-Net's; default: %(default)s"
    )
    parser.add_argument(
        "-overwrite_target_spacing",
        type=float,
        nargs=3,
        metavar="MM",
        help="of 3d_fullres, slices first; default: nnU-Net's choice",
    )
    parser.add_argument(
        "-overwrite_plans_name",
        metavar="PLANS",
        help="default: PCTNetPlans; VFPlans where --like has another network",
    )
    like = parser.add_argument_group("plans for pretrained weights")
    like.add_argument("--like", type=Path, metavar="FILE", help="vf_pretrained.pth, or a checkpoint of nnU-Net")
    choices = ("target", "pretrained")
    like.add_argument("--spacing", choices=choices, help="nnU-Net's choice for the dataset (default), or pretraining's")
    like.add_argument("--normalization", choices=choices, help="the same for the normalisation of intensities")


def _add_adapt(commands: argparse._SubParsersAction) -> None:
    parser = _add(commands, "adapt", _adapt, "pretrained weights in the form that other plans need")
    parser.description = (
        "Write pretrained weights in the form that a target's plans need: other input channels, kernels, stages, "
        "resolution mode and attention windows; other features are refused. Prints what was transferred, adapted "
        "and left at random. Plans made with nnUNetv2_vf plan --like need this for other input channels only."
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="vf_pretrained.pth, or a checkpoint of nnU-Net")
    parser.add_argument("-d", required=True, metavar="DATASET", help="dataset id or name")
    parser.add_argument("-p", default="nnUNetPlans", metavar="PLANS", help="default: %(default)s")
    parser.add_argument("-c", default="3d_fullres", metavar="CONFIGURATION", help="default: %(default)s")
    parser.add_argument("-o", type=Path, required=True, metavar="OUT.pth")
    parser.add_argument("--partial", action="store_true", help="leave at random what does not fit, e.g. other features")
    parser.add_argument("--encoder-only", action="store_true", help="leave the decoder at random, as nnssl does")


def _add_import(commands: argparse._SubParsersAction) -> None:
    parser = _add(commands, "import", _import, "make an nnU-Net dataset of unlabelled volumes, in any format")
    parser.description = (
        "Make nnUNet_raw/DatasetXXX_NAME of unlabelled volumes: NIfTI, NRRD, MetaImage and DICOM series, in folders "
        "searched recursively. Label 1 is the body, which nnU-Net needs for its statistics. Nothing is dropped in "
        "silence: import_report.csv tells what became of every volume. The same command goes on where it was "
        "interrupted, and adds what is new. A case of several channels is CASE_0000, CASE_0001, ... in one folder."
    )
    parser.add_argument("-d", type=int, required=True, metavar="ID", help="the dataset's id, 1 to 999")
    parser.add_argument("-n", required=True, metavar="NAME", help="the dataset's name")
    parser.add_argument("paths", type=Path, nargs="+", metavar="PATH", help="folders and files")
    parser.add_argument(
        "--channel",
        default="auto",
        metavar="CT|MR|...",
        help="what the volumes are, commas between channels; default: auto, CT if intensities look like HU, else MR",
    )
    parser.add_argument("--no-mask", action="store_true", help="label 1 is all of a volume, not the body")
    parser.add_argument(
        "--link", action="store_true", help="link to files that nnU-Net reads as they are, instead of copying them"
    )
    parser.add_argument(
        "--file-ending", metavar="ENDING", default=".nii.gz", help=".nii.gz, .nii, .nrrd or .mha; default: %(default)s"
    )
    select = parser.add_argument_group("which volumes are rejected, besides unreadable, truncated and constant ones")
    select.add_argument("--no-split-4d", action="store_true", help="4D files; default: each of its volumes is a case")
    select.add_argument(
        "--min-size", type=int, default=16, metavar="VOXELS", help="fewer on a side; default: %(default)s"
    )
    select.add_argument("--max-spacing", type=float, default=20.0, metavar="MM", help="more; default: %(default)s")
    select.add_argument(
        "--min-range", type=float, default=0.0, metavar="X", help="intensities within X; default: %(default)s"
    )
    select.add_argument(
        "--keep",
        default="",
        metavar="CHECK,...",
        help="do not reject, but mend: duplicates, nonfinite (NaN becomes the minimum), direction (made orthonormal), "
        "slices (missing or unevenly spaced ones of a DICOM series)",
    )
    parser.add_argument(
        "-np", type=int, metavar="N", help="processes, each with one file in memory; default: nnUNet_def_n_proc, else 8"
    )
    parser.add_argument(
        "--num_parts", "-num_parts", type=int, default=1, metavar="N", help="as in nnUNetv2_predict: ..."
    )
    parser.add_argument(
        "--part_id", "-part_id", type=int, default=0, metavar="I", help="... import part I, from 0, of N"
    )


def _add(
    commands: argparse._SubParsersAction, name: str, run: Callable[[argparse.Namespace], None], about: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=about, description=about)
    parser.set_defaults(run=run)
    return parser


def _env(args: argparse.Namespace) -> None:
    print(_EXPORT[args.shell](TRAINER_VARIABLE, trainer_path(os.environ.get(TRAINER_VARIABLE, ""))))


_EXPORT: dict[str, Callable[[str, str], str]] = {
    "sh": lambda name, value: f"export {name}={shlex.quote(value)}",
    "fish": lambda name, value: f"set -gx {name} '" + value.replace("\\", "\\\\").replace("'", "\\'") + "'",
    "powershell": lambda name, value: f"$env:{name} = '" + value.replace("'", "''") + "'",
}


def _import(args: argparse.Namespace) -> None:
    from nnunetv2.configuration import default_num_processes

    from nnunetv2_vf.importing.dataset import import_volumes
    from nnunetv2_vf.importing.volumes import Selection
    from nnunetv2_vf.importing.worker import ImportSettings

    keep = tuple(sorted(filter(None, args.keep.split(","))))
    selection = Selection(args.min_size, args.max_spacing, args.min_range, keep, not args.no_split_4d)
    settings = ImportSettings(selection, not args.no_mask, args.link, args.file_ending)
    processes = default_num_processes if args.np is None else args.np
    import_volumes(args.d, args.n, args.paths, settings, args.channel, processes, args.num_parts, args.part_id)


def _plan(args: argparse.Namespace) -> None:
    if args.like is None:
        for name in ("spacing", "normalization"):
            if getattr(args, name) is not None:
                raise UserError(f"--{name} {getattr(args, name)} is for plans made with --like FILE; leave it out")
        _plan_pct_net(args)
    else:
        _plan_like(args)


def _plan_pct_net(args: argparse.Namespace) -> None:
    from nnunetv2_vf.planners.memory_fitting import plan_datasets
    from nnunetv2_vf.planners.pct_net_planner import PCTNetPlanner, next_steps

    for plans, name in plan_datasets(args.d, PCTNetPlanner, *_stock_arguments(args)):
        print(next_steps(plans, name))


def _plan_like(args: argparse.Namespace) -> None:
    import functools

    from nnunetv2_vf.planners.like_planner import LikePlanner, next_steps
    from nnunetv2_vf.planners.memory_fitting import plan_datasets
    from nnunetv2_vf.transfer.artifact import read_described
    from nnunetv2_vf.transfer.compatibility import describe_fit
    from nnunetv2_vf.transfer.target_plans import load_target

    if args.spacing == "pretrained" and args.overwrite_target_spacing is not None:
        raise UserError("--spacing pretrained and -overwrite_target_spacing exclude each other; leave one out")
    pretrained = read_described(args.like)["vf"]
    planner = functools.partial(
        LikePlanner,
        pretrained=pretrained,
        like=args.like,
        spacing=args.spacing or "target",
        normalization=args.normalization or "target",
    )
    for plans, name in plan_datasets(args.d, planner, *_stock_arguments(args)):
        print(next_steps(plans, name, pretrained, args.like))
        if "3d_fullres" in plans["configurations"]:
            compared = describe_fit(pretrained, load_target(plans["dataset_name"], name, "3d_fullres"))
            print("\n  ".join(["Pretraining and these plans:", *compared]))


def _stock_arguments(args: argparse.Namespace) -> tuple[Any, ...]:
    return args.gpu_memory_target, args.preprocessor_name, args.overwrite_target_spacing, args.overwrite_plans_name


def _convert(args: argparse.Namespace) -> None:
    from nnunetv2_vf.transfer.artifact import read_artifact
    from nnunetv2_vf.transfer.convert_misfm import convert_file
    from nnunetv2_vf.transfer.safe_loading import can_be_planned

    about = convert_file(args.release, args.o, args.mode)
    written = shlex.quote(str(args.o))
    print(f"wrote {args.o}: {about}\nNext: nnUNetv2_vf info {written}", end="")
    plannable = can_be_planned(read_artifact(args.o)["vf"]["architecture"])
    print(f"; nnUNetv2_vf plan -d ID --like {written}" if plannable else "")


def _adapt(args: argparse.Namespace) -> None:
    from nnunetv2_vf.transfer.adapt import adapt_file
    from nnunetv2_vf.transfer.artifact import read_artifact
    from nnunetv2_vf.transfer.compatibility import describe_fit
    from nnunetv2_vf.transfer.target_plans import load_target

    target = load_target(args.d, args.p, args.c)
    print(adapt_file(args.file, target, args.o, args.partial, args.encoder_only))
    print("\n  ".join(["Pretraining and these plans:", *describe_fit(read_artifact(args.o)["vf"], target)]))
    print(
        f"wrote {args.o}\nNext: nnUNetv2_train {target.dataset_id} {args.c} 0 -p {args.p} -tr VFFinetuneTrainer "
        f"-pretrained_weights {shlex.quote(str(args.o))}"
    )


def _info(args: argparse.Namespace) -> None:
    from nnunetv2_vf.transfer.info import describe_file

    print(describe_file(args.file))


def _doctor(args: argparse.Namespace) -> None:
    from nnunetv2_vf.doctor import FAIL, examine

    failed = 0
    for finding in examine(args.d, args.p, args.c, args.w):
        print(finding, flush=True)
        failed += finding.state == FAIL
    if failed:
        raise SystemExit(1)


def _preview(args: argparse.Namespace) -> None:
    from nnunetv2_vf.preview import preview

    preview(args.d, args.c, args.p, args.n, args.o, os.environ)
    print(f"wrote {args.o}")


def _demo(args: argparse.Namespace) -> None:
    from nnunetv2_vf.demo.journey import demo

    demo(args.out, args.device)
