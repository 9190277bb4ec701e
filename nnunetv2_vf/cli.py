"""The command ``nnUNetv2_vf``: parse, call one function. Heavy imports stay inside the subcommands."""

from __future__ import annotations

import argparse
import json
import os
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

from nnunetv2_vf import __version__
from nnunetv2_vf.errors import one_line_errors
from nnunetv2_vf.host import TRAINER_VARIABLE, trainer_path


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

    plan = _add(commands, "plan", _plan, "nnU-Net's experiment planning, with PCT-Net in the 3D configurations")
    plan.description = (
        "nnU-Net's experiment planning with PCT-Net in the 3D configurations; needs nnUNetv2_extract_fingerprint. "
        "Writes PCTNetPlans.json where nnU-Net keeps its plans, and prints the commands that come next. The spacing "
        "decides the resolution mode: 0 if the slices are less than twice as far apart as the voxels within them, "
        "1 up to four times, 2 beyond; pretrained weights fit plans of their own mode."
    )
    plan.add_argument("-d", required=True, nargs="+", metavar="DATASET", help="dataset ids or names")
    plan.add_argument(
        "-gpu_memory_target",
        type=float,
        metavar="GB",
        help="memory of the GPU, a tenth of which is left free; default: 8",
    )
    plan.add_argument(
        "-preprocessor_name", default="DefaultPreprocessor", metavar="CLASS", help="nnU-Net's; default: %(default)s"
    )
    plan.add_argument(
        "-overwrite_target_spacing",
        type=float,
        nargs=3,
        metavar="MM",
        help="of 3d_fullres, slices first; default: nnU-Net's choice",
    )
    plan.add_argument("-overwrite_plans_name", metavar="PLANS", help="default: PCTNetPlans")

    preview = _add(commands, "preview", _preview, "draw what pretraining on a preprocessed dataset shows the network")
    preview.add_argument("-d", required=True, metavar="DATASET", help="dataset id or name")
    preview.add_argument("-c", default="3d_fullres", metavar="CONFIGURATION", help="default: %(default)s")
    preview.add_argument("-p", default="nnUNetPlans", metavar="PLANS", help="default: %(default)s")
    preview.add_argument(
        "-n", type=int, choices=range(1, 21), default=3, metavar="N", help="1 to 20 examples; default: %(default)s"
    )
    preview.add_argument("-o", type=Path, default=Path("preview.png"), metavar="PNG", help="default: %(default)s")

    convert = _add(commands, "convert", _convert, "make vf_pretrained.pth of a released MIS-FM checkpoint of PCT-Net")
    convert.add_argument("release", type=Path, metavar="RELEASE.pt")
    convert.add_argument("-o", type=Path, required=True, metavar="OUT.pth")
    convert.add_argument(
        "--mode", type=int, choices=(0, 1, 2), help="resolution mode; default: the one the release was trained with"
    )

    demo = _add(commands, "demo", _demo, "the whole journey on generated phantoms, in a few minutes")
    demo.add_argument(
        "--out", type=Path, metavar="FOLDER", help="where to keep everything; default: a new temporary one"
    )
    demo.add_argument("-device", choices=("cpu", "cuda", "mps"), help="default: cuda if there is one, else cpu")
    return parser


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

    from nnunetv2_vf.unlabelled import ImportSettings, import_volumes
    from nnunetv2_vf.volumes import Selection

    keep = tuple(sorted(filter(None, args.keep.split(","))))
    selection = Selection(args.min_size, args.max_spacing, args.min_range, keep, not args.no_split_4d)
    settings = ImportSettings(selection, not args.no_mask, args.link, args.file_ending)
    processes = default_num_processes if args.np is None else args.np
    import_volumes(args.d, args.n, args.paths, settings, args.channel, processes, args.num_parts, args.part_id)


def _plan(args: argparse.Namespace) -> None:
    from nnunetv2_vf.planners.pct_net_planner import plan

    plan(
        args.d,
        args.gpu_memory_target,
        args.preprocessor_name,
        args.overwrite_target_spacing,
        args.overwrite_plans_name,
    )


def _convert(args: argparse.Namespace) -> None:
    from nnunetv2_vf.convert import convert_file

    converted = convert_file(args.release, args.o, args.mode)
    print(f"wrote {args.o}: {converted}")
    print(
        "It fits plans of nnUNetv2_vf plan that have, in configurations / 3d_fullres / architecture / arch_kwargs:\n"
        f"  {json.dumps(converted.decisive)[1:-1]}\n"
        f"  nnUNetv2_train ID 3d_fullres 0 -p PLANS -tr VFFinetuneTrainer -pretrained_weights {args.o}"
    )


def _preview(args: argparse.Namespace) -> None:
    from nnunetv2_vf.preview import preview

    preview(args.d, args.c, args.p, args.n, args.o, os.environ)
    print(f"wrote {args.o}")


def _demo(args: argparse.Namespace) -> None:
    from nnunetv2_vf.demo import demo

    demo(args.out, args.device)
