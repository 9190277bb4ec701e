"""The command ``nnUNetv2_vf``.

Each subcommand has two functions here, one below the other: ``_add_x`` declares its arguments, ``_run_x`` runs it.

Heavy imports (torch, nnU-Net) stay inside the ``_run_x`` functions, so that ``--help``, ``env`` and errors in the
arguments appear at once.
"""

from __future__ import annotations

import argparse
import io
import os
import shlex
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from nnunetv2_vf import __version__
from nnunetv2_vf.errors import OneLineArgumentParser, UserError, one_line_errors
from nnunetv2_vf.nnunet_commands import TRAINER_VARIABLE, trainer_path

_Commands = argparse._SubParsersAction
_HUB_FILES = "or hf://USER/NAME"  # wherever a command reads weights


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the arguments and run one subcommand."""
    parser = make_parser()
    if "_ARGCOMPLETE" in os.environ:  # set by the shell: it asks how a command line can go on
        import argcomplete

        argcomplete.autocomplete(parser)
    args = parser.parse_args(arguments)
    _accept_all_file_names()
    with one_line_errors():
        _require_numbers_of_processes(os.environ)
        try:
            args.run(args)
        except OSError as error:
            raise UserError(f"cannot read or write: {error}") from error
        except KeyboardInterrupt:
            raise SystemExit(128 + signal.SIGINT) from None  # the status of shells after Ctrl-C


def _accept_all_file_names() -> None:
    """Let print write file names that are not UTF-8 byte by byte, as the shell takes them, instead of failing."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")


def _require_numbers_of_processes(environment: Mapping[str, str]) -> None:
    """Raise UserError for a number of processes that nnU-Net could not parse."""
    for name in ("nnUNet_def_n_proc", "nnUNet_n_proc_DA"):
        value = environment.get(name, "0")
        if not value.strip().isdecimal():
            raise UserError(f"{name} = {value!r} is not a whole number; set it: export {name}=8, or: unset {name}")


def make_parser() -> argparse.ArgumentParser:
    """Return the parser with all subcommands."""
    parser = OneLineArgumentParser(
        prog="nnUNetv2_vf",
        description="Volume Fusion pretraining for nnU-Net v2. Training and prediction are nnU-Net's own commands: "
        "nnUNetv2_train ... -tr VFPretrainTrainer pretrains, nnUNetv2_train ... -tr VFFinetuneTrainer "
        "-pretrained_weights vf_pretrained.pth fine-tunes.",
    )
    parser.add_argument("--version", action="version", version=f"nnunetv2-vf {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_env(commands)
    _add_import(commands)
    _add_fingerprint(commands)
    _add_plan(commands)
    _add_preprocess(commands)
    _add_preview(commands)
    _add_convert(commands)
    _add_adapt(commands)
    _add_push(commands)
    _add_pull(commands)
    _add_info(commands)
    _add_doctor(commands)
    _add_demo(commands)
    return parser


def _add_command(
    commands: _Commands, name: str, run: Callable[[argparse.Namespace], None], summary: str, description: str = ""
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=summary, description=description or summary)
    parser.set_defaults(run=run)
    return parser


def _add_plans_arguments(parser: argparse.ArgumentParser, dataset_required: bool = True) -> None:
    """Add the arguments that name a planned dataset: -d, -p and -c, as in nnU-Net."""
    parser.add_argument("-d", required=dataset_required, metavar="DATASET", help="dataset id or name")
    parser.add_argument("-p", default="nnUNetPlans", metavar="PLANS", help="name of the plans; default: %(default)s")
    parser.add_argument(
        "-c",
        default="3d_fullres",
        metavar="CONFIGURATION",
        help="configuration of the plans; default: %(default)s",
    )


def _add_parts_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that divide work among processes and machines: -np, -num_parts, -part_id, as in nnU-Net."""
    parser.add_argument(
        "-np",
        type=int,
        metavar="N",
        help="number of processes, each of which holds one case in memory; default: nnUNet_def_n_proc, else 8",
    )
    parser.add_argument(
        "--num_parts",
        "-num_parts",
        type=int,
        default=1,
        metavar="N",
        help="number of parts, which can run at the same time, also on different machines; default: %(default)s",
    )
    parser.add_argument(
        "--part_id",
        "-part_id",
        type=int,
        default=0,
        metavar="I",
        help="the part to work on, 0 to N - 1; default: %(default)s",
    )


def _processes(args: argparse.Namespace) -> int:
    """Return the number of processes: -np, or nnU-Net's default."""
    from nnunetv2.configuration import default_num_processes

    return int(default_num_processes if args.np is None else args.np)


# ---------------------------------------------------------------- env

_ASSIGNMENTS: dict[str, Callable[[str, str], str]] = {
    "sh": lambda name, value: f"export {name}={shlex.quote(value)}",
    "fish": lambda name, value: f"set -gx {name} '" + value.replace("\\", "\\\\").replace("'", "\\'") + "'",
    "powershell": lambda name, value: f"$env:{name} = '" + value.replace("'", "''") + "'",
}


def _add_env(commands: _Commands) -> None:
    parser = _add_command(
        commands,
        "env",
        _run_env,
        f"print the shell command that sets {TRAINER_VARIABLE}, so that nnU-Net finds VF's trainers",
    )
    parser.add_argument(
        "--shell",
        choices=sorted(_ASSIGNMENTS),
        default="sh",
        help="shell that will run the command; default: sh (also for bash, zsh, dash)",
    )


def _run_env(args: argparse.Namespace) -> None:
    print(_ASSIGNMENTS[args.shell](TRAINER_VARIABLE, trainer_path(os.environ.get(TRAINER_VARIABLE, ""))))


# ---------------------------------------------------------------- import


def _add_import(commands: _Commands) -> None:
    parser = _add_command(
        commands,
        "import",
        _run_import,
        "make an nnU-Net dataset from unlabelled volumes",
        "Make nnUNet_raw/DatasetXXX_NAME from unlabelled volumes: NIfTI, NRRD and MetaImage files and DICOM series. "
        "Folders are searched recursively. Label 1 marks the body, because nnU-Net computes its intensity statistics "
        "on labelled voxels. import_report.csv lists every volume and, for a rejected one, the reason. Run the same "
        "command again to continue an interrupted import or to add new volumes. Files named CASE_0000, CASE_0001, ... "
        "in one folder are the channels of one case.",
    )
    parser.add_argument("-d", type=int, required=True, metavar="ID", help="id of the new dataset, 1 to 999")
    parser.add_argument("-n", required=True, metavar="NAME", help="name of the new dataset")
    parser.add_argument("paths", type=Path, nargs="+", metavar="PATH", help="folders and files")
    parser.add_argument(
        "--channel",
        default="auto",
        metavar="CT|MR|...",
        help="name of the channel, or names separated by commas; default: auto, which is CT if the intensities look "
        "like HU, else MR",
    )
    parser.add_argument(
        "--select",
        default="",
        metavar="PATTERN,...",
        help="import only volumes with one of these in their path below PATH, such as T1w or _flair; * and ? stand for "
        "any characters",
    )
    parser.add_argument("--no-mask", action="store_true", help="label 1 marks the whole volume instead of the body")
    parser.add_argument(
        "--link", action="store_true", help="link to the files that nnU-Net can read itself, instead of copying them"
    )
    parser.add_argument(
        "--file-ending",
        metavar="ENDING",
        default=".nii.gz",
        help="file ending of the written images: .nii.gz, .nii, .nrrd or .mha; default: %(default)s",
    )
    checks = parser.add_argument_group(
        "rejected volumes",
        "Unreadable, truncated and constant volumes are always rejected.",
    )
    checks.add_argument(
        "--no-split-4d", action="store_true", help="reject 4D files; default: each of their volumes becomes a case"
    )
    checks.add_argument(
        "--min-size",
        type=int,
        default=16,
        metavar="VOXELS",
        help="reject volumes with a side shorter than this; default: %(default)s",
    )
    checks.add_argument(
        "--max-spacing",
        type=float,
        default=20.0,
        metavar="MM",
        help="reject volumes with a spacing above this; default: %(default)s",
    )
    checks.add_argument(
        "--min-range",
        type=float,
        default=0.0,
        metavar="X",
        help="reject volumes whose intensities differ by no more than this; default: %(default)s",
    )
    checks.add_argument(
        "--keep",
        default="",
        metavar="CHECK,...",
        help="do not reject but import: duplicates, nonfinite (NaN and infinity become the minimum), direction (axes "
        "are made orthonormal), slices (a DICOM series with missing or unevenly spaced slices), labels (volumes "
        "that look like a segmentation, and files with names of labels)",
    )
    _add_parts_arguments(parser)


def _run_import(args: argparse.Namespace) -> None:
    from nnunetv2_vf.importing.pipeline import import_volumes
    from nnunetv2_vf.importing.settings import ImportSettings, Selection

    keep, select = (tuple(sorted(filter(None, map(str.strip, value.split(","))))) for value in (args.keep, args.select))
    selection = Selection(args.min_size, args.max_spacing, args.min_range, keep, not args.no_split_4d)
    settings = ImportSettings(selection, not args.no_mask, args.link, args.file_ending)
    import_volumes(
        args.d, args.n, args.paths, settings, args.channel, select, _processes(args), args.num_parts, args.part_id
    )


# ---------------------------------------------------------------- fingerprint


def _add_fingerprint(commands: _Commands) -> None:
    parser = _add_command(
        commands,
        "fingerprint",
        _run_fingerprint,
        "make nnU-Net's dataset fingerprint on several machines, or from a sample of the cases",
        "Make the same dataset_fingerprint.json as nnUNetv2_extract_fingerprint. Several machines can share the work, "
        "an interrupted command continues if you run it again, and a random sample of the cases can stand for all.",
    )
    parser.add_argument("-d", required=True, metavar="DATASET", help="dataset id or name")
    parser.add_argument(
        "--sample", type=int, metavar="N", help="analyze N cases, chosen at random; the file says so; default: all"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the random sample; default: %(default)s")
    parser.add_argument("--clean", action="store_true", help="make a new fingerprint even if there is one")
    _add_parts_arguments(parser)


def _run_fingerprint(args: argparse.Namespace) -> None:
    from nnunetv2_vf.preparation.fingerprint import extract_fingerprint

    parts = (args.num_parts, args.part_id)
    print(extract_fingerprint(args.d, args.sample, args.seed, _processes(args), *parts, args.clean))


# ---------------------------------------------------------------- plan


def _add_plan(commands: _Commands) -> None:
    parser = _add_command(
        commands,
        "plan",
        _run_plan,
        "run nnU-Net's experiment planning with PCT-Net, FMUNet or the network of pretrained weights",
        "Run nnU-Net's experiment planning. A dataset without a fingerprint first gets one. The 3D configurations "
        "get PCT-Net, FMUNet or, with --like, the network of pretrained weights, which then fit without adaptation. "
        "Patch and batch size follow from the dataset and the GPU memory. Writes the plans where nnU-Net keeps them "
        "and prints the next commands. The resolution mode of PCT-Net and FMUNet follows from the ratio of slice "
        "distance to voxel size within the slices: mode 0 below 2, mode 1 below 4, else mode 2.",
    )
    parser.add_argument("-d", required=True, nargs="+", metavar="DATASET", help="dataset ids or names")
    parser.add_argument(
        "-gpu_memory_target",
        type=float,
        metavar="GB",
        help="memory of the GPU; a tenth of it is left free; default: 8",
    )
    parser.add_argument(
        "-preprocessor_name",
        default="DefaultPreprocessor",
        metavar="CLASS",
        help="nnU-Net's preprocessor; default: %(default)s",
    )
    parser.add_argument(
        "-overwrite_target_spacing",
        type=float,
        nargs=3,
        metavar="MM",
        help="spacing of 3d_fullres, in the axis order of the image arrays (z y x for NIfTI files); default: nnU-Net's "
        "choice",
    )
    parser.add_argument(
        "-overwrite_plans_name",
        metavar="PLANS",
        help="name of the new plans; default: PCTNetPlans, FMUNetPlans, or VFPlans for other networks",
    )
    parser.add_argument("--network", choices=("PCTNet", "FMUNet"), help="network of the plans; default: PCTNet")
    like = parser.add_argument_group("plans for pretrained weights")
    like.add_argument("--like", metavar="FILE", help=f"vf_pretrained.pth, or a checkpoint of nnU-Net; {_HUB_FILES}")
    like.add_argument(
        "--spacing",
        choices=("target", "pretrained"),
        default="target",
        help="target: nnU-Net's choice for this dataset (default); pretrained: the spacing of the pretraining",
    )
    like.add_argument(
        "--normalization",
        choices=("auto", "target", "pretrained"),
        default="auto",
        help="target: nnU-Net's choice for this dataset; pretrained: the intensity normalisation of the pretraining; "
        "auto (default): that of the pretraining if both datasets are CT, else nnU-Net's choice",
    )


def _run_plan(args: argparse.Namespace) -> None:
    from nnunetv2.configuration import default_num_processes

    from nnunetv2_vf.planners.five_level_planner import plan_network
    from nnunetv2_vf.planners.fmunet_planner import FMUNetPlanner
    from nnunetv2_vf.planners.like_planner import plan_like, read_for_planning
    from nnunetv2_vf.planners.pct_net_planner import PCTNetPlanner
    from nnunetv2_vf.planners.topology_planner import check_options
    from nnunetv2_vf.preparation.fingerprint import make_missing_fingerprint
    from nnunetv2_vf.transfer.hub import local_file

    options = {
        "gpu_memory_target": args.gpu_memory_target,
        "preprocessor_name": args.preprocessor_name,
        "target_spacing": args.overwrite_target_spacing,
        "plans_name": args.overwrite_plans_name,
    }
    if args.like is not None and args.network is not None:
        raise UserError("--network and --like exclude each other: --like takes the network of the file; leave one out")
    for option in ("spacing", "normalization"):
        if args.like is None and getattr(args, option) == "pretrained":
            raise UserError(f"--{option} pretrained needs --like FILE, the pretrained weights")
    like = None if args.like is None else local_file(args.like)
    # Raise errors before a fingerprint is made, which may take hours.
    if like is not None:
        read_for_planning(like, args.spacing, args.normalization, args.overwrite_target_spacing)
    check_options(args.gpu_memory_target, args.overwrite_target_spacing, args.overwrite_plans_name)
    for dataset in args.d:
        make_missing_fingerprint(dataset, default_num_processes)
    if like is not None:
        reports = plan_like(args.d, like, args.spacing, args.normalization, **options)
    else:
        planners = {"PCTNet": PCTNetPlanner, "FMUNet": FMUNetPlanner}
        reports = plan_network(args.d, planners[args.network or "PCTNet"], **options)
    for report in reports:
        print(report)


# ---------------------------------------------------------------- preprocess


def _add_preprocess(commands: _Commands) -> None:
    parser = _add_command(
        commands,
        "preprocess",
        _run_preprocess,
        "preprocess a dataset on several machines, and only the cases that are not done",
        "Make the same preprocessed cases as nnUNetv2_preprocess. Several machines can share the work. Cases that are "
        "done are skipped, so that an interrupted command continues if you run it again. A case that fails is left "
        "out and named at the end, with exit status 1.",
    )
    parser.add_argument("-d", required=True, metavar="DATASET", help="dataset id or name")
    parser.add_argument(
        "-plans_name", default="nnUNetPlans", metavar="PLANS", help="name of the plans; default: %(default)s"
    )
    parser.add_argument(
        "-c",
        nargs="+",
        default=["3d_fullres"],
        metavar="CONFIGURATION",
        help="configurations of the plans; default: 3d_fullres",
    )
    _add_parts_arguments(parser)


def _run_preprocess(args: argparse.Namespace) -> None:
    from nnunetv2_vf.preparation.preprocess import preprocess_dataset

    preprocess_dataset(args.d, args.plans_name, args.c, _processes(args), args.num_parts, args.part_id)


# ---------------------------------------------------------------- preview


def _add_preview(commands: _Commands) -> None:
    parser = _add_command(
        commands,
        "preview",
        _run_preview,
        "draw samples as pretraining shows them to the network (its validation samples)",
    )
    _add_plans_arguments(parser)
    parser.add_argument(
        "-n", type=int, choices=range(1, 21), default=3, metavar="N", help="1 to 20 samples; default: %(default)s"
    )
    parser.add_argument(
        "-o", type=Path, default=Path("preview.png"), metavar="PNG", help="file to write; default: %(default)s"
    )


def _run_preview(args: argparse.Namespace) -> None:
    from nnunetv2_vf.preview import preview

    preview(args.d, args.c, args.p, args.n, args.o, os.environ)
    print(f"wrote {args.o}")


# ---------------------------------------------------------------- convert


def _add_convert(commands: _Commands) -> None:
    parser = _add_command(
        commands,
        "convert",
        _run_convert,
        "make vf_pretrained.pth from a checkpoint of MIS-FM or nnssl, or from model.safetensors",
        "Make a vf_pretrained.pth from weights of other projects: MIS-FM's released PCT-Net and FMUNet; nnssl's "
        "U-Nets (Volume Fusion or masked autoencoder) and Primus-M (Volume Fusion). Or from model.safetensors, as "
        "nnUNetv2_vf push uploads it.",
    )
    parser.add_argument("release", type=Path, metavar="CHECKPOINT", help="checkpoint of MIS-FM or nnssl")
    parser.add_argument("-o", type=Path, required=True, metavar="OUT.pth", help="file to write")
    parser.add_argument(
        "--mode",
        type=int,
        choices=(0, 1, 2),
        help="resolution mode of MIS-FM's network; default: the mode that the release was trained with",
    )


def _run_convert(args: argparse.Namespace) -> None:
    from nnunetv2_vf.transfer.architectures import can_be_planned
    from nnunetv2_vf.transfer.artifact import read_artifact
    from nnunetv2_vf.transfer.convert import convert_file

    description = convert_file(args.release, args.o, args.mode)
    out = shlex.quote(str(args.o))
    next_commands = [f"nnUNetv2_vf info {out}"]
    if can_be_planned(read_artifact(args.o)["vf"]["architecture"]):
        next_commands.append(f"nnUNetv2_vf plan -d ID --like {out}")
    print(f"wrote {args.o}: {description}\nNext: {'; '.join(next_commands)}")


# ---------------------------------------------------------------- adapt


def _add_adapt(commands: _Commands) -> None:
    parser = _add_command(
        commands,
        "adapt",
        _run_adapt,
        "change pretrained weights so that they fit other plans",
        "Write a copy of pretrained weights that fits a target's plans. Input channels, kernels, number of stages, "
        "resolution mode and attention windows may differ; other numbers of features are refused. Prints which "
        "weights were transferred, adapted or left at random. Plans made with nnUNetv2_vf plan --like need this only "
        "if the number of input channels differs.",
    )
    parser.add_argument("file", metavar="FILE", help=f"vf_pretrained.pth, or a checkpoint of nnU-Net; {_HUB_FILES}")
    _add_plans_arguments(parser)
    parser.add_argument("-o", type=Path, required=True, metavar="OUT.pth", help="file to write")
    parser.add_argument(
        "--partial", action="store_true", help="leave weights that do not fit at random, e.g. other features"
    )
    parser.add_argument("--encoder-only", action="store_true", help="leave the decoder at random, as nnssl does")


def _run_adapt(args: argparse.Namespace) -> None:
    from nnunetv2_vf.transfer.adapt import adapt_file
    from nnunetv2_vf.transfer.artifact import read_artifact
    from nnunetv2_vf.transfer.differences import describe_differences
    from nnunetv2_vf.transfer.hub import local_file
    from nnunetv2_vf.transfer.suggested_commands import finetune_command
    from nnunetv2_vf.transfer.target_plans import load_target

    target = load_target(args.d, args.p, args.c)
    print(adapt_file(local_file(args.file), target, args.o, args.partial, args.encoder_only))
    print("\n  ".join(["Pretraining and these plans:", *describe_differences(read_artifact(args.o)["vf"], target)]))
    print(f"wrote {args.o}\nNext: {finetune_command(target.dataset_id, args.c, target.first_fold, args.p, args.o)}")


# ---------------------------------------------------------------- push


def _add_push(commands: _Commands) -> None:
    parser = _add_command(
        commands,
        "push",
        _run_push,
        "upload pretrained weights and their model card to the Hugging Face Hub",
        "Upload pretrained weights to the Hugging Face Hub: as safetensors, with their metadata, MODEL_CARD.md and the "
        "pictures beside them. preview.png and pretext_report.png show slices of the images: --no-pictures leaves them "
        "out. The repository is created if it does not exist. Log in first: hf auth login. Needs: "
        "pip install 'nnunetv2-vf[hub]'.",
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="vf_pretrained.pth, with MODEL_CARD.md beside it")
    parser.add_argument("name", metavar="USER/NAME[@BRANCH]", help="repository on the Hub")
    parser.add_argument("--private", action="store_true", help="only you may see the repository")
    parser.add_argument("--no-pictures", action="store_true", help="leave out the pictures, which show parts of images")


def _run_push(args: argparse.Namespace) -> None:
    from nnunetv2_vf.transfer.hub_push import push

    address = push(args.file, args.name, args.private, not args.no_pictures)
    print(f"uploaded: {address}\nNext: nnUNetv2_vf pull {args.name} -o FOLDER")


# ---------------------------------------------------------------- pull


def _add_pull(commands: _Commands) -> None:
    parser = _add_command(
        commands,
        "pull",
        _run_pull,
        "download pretrained weights from the Hugging Face Hub",
        "Download pretrained weights that nnUNetv2_vf push uploaded to the Hugging Face Hub; write vf_pretrained.pth, "
        "MODEL_CARD.md and pictures. No code in the files is run. For a private repository log in first: hf auth "
        "login. Needs: pip install 'nnunetv2-vf[hub]'.",
    )
    parser.add_argument("name", metavar="USER/NAME[@REVISION]", help="repository, and branch, tag or commit")
    parser.add_argument("-o", type=Path, required=True, metavar="FOLDER", help="folder for the files")


def _run_pull(args: argparse.Namespace) -> None:
    from nnunetv2_vf.transfer.hub import pull
    from nnunetv2_vf.transfer.info import describe_file

    weights, *others = pull(args.name, args.o)
    print("\n".join(f"wrote {file}" for file in [weights, *others]))
    print(describe_file(weights))


# ---------------------------------------------------------------- info


def _add_info(commands: _Commands) -> None:
    parser = _add_command(
        commands, "info", _run_info, "describe a file of weights, without running any code that the file may hold"
    )
    parser.add_argument("file", metavar="FILE", help=f"vf_pretrained.pth or any other file of weights; {_HUB_FILES}")


def _run_info(args: argparse.Namespace) -> None:
    from nnunetv2_vf.transfer.hub import local_file
    from nnunetv2_vf.transfer.info import describe_file

    print(describe_file(local_file(args.file)))


# ---------------------------------------------------------------- doctor


def _add_doctor(commands: _Commands) -> None:
    parser = _add_command(commands, "doctor", _run_doctor, "check the installation, a dataset, its plans and weights")
    _add_plans_arguments(parser, dataset_required=False)
    parser.add_argument(
        "-w",
        metavar="FILE",
        help=f"pretrained weights; with -d they are checked against its plans; {_HUB_FILES}",
    )


def _run_doctor(args: argparse.Namespace) -> None:
    from nnunetv2_vf.doctor import FAIL, examine

    failed = False
    for finding in examine(args.d, args.p, args.c, args.w):
        print(finding, flush=True)
        failed |= finding.state == FAIL
    if failed:
        raise SystemExit(1)


# ---------------------------------------------------------------- demo


def _add_demo(commands: _Commands) -> None:
    parser = _add_command(
        commands, "demo", _run_demo, "pretrain, fine-tune and predict on generated phantoms, in a few minutes"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="keep all files here; default: a new temporary folder"
    )
    parser.add_argument("-device", choices=("cpu", "cuda", "mps"), help="default: cuda if available, else cpu")


def _run_demo(args: argparse.Namespace) -> None:
    from nnunetv2_vf.demo.journey import demo

    demo(args.out, args.device)
