"""Plans that ``nnUNetv2_vf plan`` makes for different datasets, and the memory of a training step with each.

    python benchmarks/network_plans.py PCT-Net|FMUNet|U-Net [--fingerprints isotropic ...] [--targets 3 8 24]
        [--device cpu|cuda] [--largest-step 3] [--compile]

Plans made-up fingerprints with the network for several values of ``-gpu_memory_target``. Where the plan's estimate is
at most ``--largest-step`` GB, builds its network as nnU-Net does and takes training steps with nnU-Net's loss on random
data. On CUDA the peak of the allocated memory is compared with the estimate. The result file is written after each
plan. nnU-Net's own plans (U-Net) hold no estimate; the target counts as such.

Duration: 10 minutes on 2 CPU cores. Needs: memory for ``--largest-step``; with ``--device cuda`` a GPU.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from common import NETWORK_PLANS, RESULTS, by, make_parser, markdown_table, wait_for_device, write_result
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

from nnunetv2_vf.errors import one_line_errors
from nnunetv2_vf.five_level_network import MODES
from nnunetv2_vf.nnunet_commands import Workspace

FINGERPRINTS = {  # spacing in mm, median shape in voxels, slices first; cases
    "anisotropic": ((5.0, 0.7, 0.7), (24, 320, 320), 40),
    "in between": ((2.5, 1.0, 1.0), (60, 256, 256), 40),
    "isotropic": ((1.0, 1.0, 1.0), (160, 200, 180), 100),
    "tiny": ((1.0, 1.0, 1.0), (35, 50, 35), 130),
    "large": ((1.5, 0.8, 0.8), (300, 512, 512), 100),
}
CLASSES = 3
STEPS = 3


def main() -> None:
    parser = make_parser(__doc__, device=True, output=True)
    parser.add_argument("network", choices=("PCT-Net", "FMUNet", "U-Net"))
    parser.add_argument("--fingerprints", nargs="+", choices=FINGERPRINTS, default=[*FINGERPRINTS])
    parser.add_argument("--targets", type=float, nargs="+", default=[3, 8, 24], help="values of -gpu_memory_target, GB")
    parser.add_argument("--largest-step", type=float, default=3, metavar="GB", help="take steps up to this estimate")
    parser.add_argument("--compile", action="store_true", help="with torch.compile, as nnU-Net does on CUDA")
    args = parser.parse_args()
    rows: list[dict[str, object]] = []
    with one_line_errors(), tempfile.TemporaryDirectory() as folder:
        workspace = Workspace(Path(folder), processes=1)
        for name in args.fingerprints:
            write_fingerprint(workspace, name)
        for name, target in itertools.product(args.fingerprints, args.targets):
            plan, seconds = make_plan(workspace, args.network, name, target)
            rows.append(make_row(name, target, plan, seconds, args))
            network = args.network.replace("-", "")
            write_result(args.output or RESULTS / f"network_plans_{network}_{args.device}.json", rows)
    print(f"\n{markdown_table(rows)}")


def make_plan(workspace: Workspace, network: str, name: str, target: float) -> tuple[dict, float]:
    """Plan one fingerprint; return the 3d_fullres configuration and the seconds that it took."""
    start, plans_name = time.monotonic(), f"For{target:g}GB"
    planning, _ = NETWORK_PLANS[network]
    workspace.run(*planning, "-d", dataset(name), "-gpu_memory_target", target, "-overwrite_plans_name", plans_name)
    seconds = time.monotonic() - start
    plans = json.loads((workspace.preprocessed / dataset(name) / f"{plans_name}.json").read_text())
    return plans["configurations"]["3d_fullres"], seconds


def make_row(name: str, target: float, plan: dict, seconds: float, args: argparse.Namespace) -> dict[str, object]:
    """Return the plan and the measurements of training steps with it."""
    strides = tuple(map(tuple, plan["architecture"]["arch_kwargs"]["strides"]))
    estimate = plan.get("estimated_training_memory_gb", target)
    return {
        "fingerprint": name,
        "spacing, mm": by(plan["spacing"]),
        "median shape": by(FINGERPRINTS[name][1]),
        "target, GB": f"{target:g}",
        "mode": str(MODES.index(strides)) if strides in MODES else "",
        "patch": by(plan["patch_size"]),
        "batch": plan["batch_size"],
        "estimate, GB": estimate,
        "planned in": f"{seconds:.0f} s",
        **training_steps(plan, estimate, args.device, args.compile, run=estimate <= args.largest_step),
    }


def dataset(name: str) -> str:
    return f"Dataset{100 + list(FINGERPRINTS).index(name)}_{name.title().replace(' ', '')}"


def write_fingerprint(workspace: Workspace, name: str) -> None:
    """Write the files that planning reads: a dataset with empty images and its fingerprint."""
    spacing, shape, cases = FINGERPRINTS[name]
    raw, preprocessed = workspace.raw / dataset(name), workspace.preprocessed / dataset(name)
    for folder in (raw / "imagesTr", raw / "labelsTr", preprocessed):
        folder.mkdir(parents=True)
    (raw / "imagesTr" / "a_0000.nii.gz").touch()
    (raw / "labelsTr" / "a.nii.gz").touch()
    description = {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, **{f"label {i}": i for i in range(1, CLASSES)}},
        "numTraining": cases,
        "file_ending": ".nii.gz",
        "overwrite_image_reader_writer": "SimpleITKIO",
    }
    (raw / "dataset.json").write_text(json.dumps(description))
    fingerprint = {
        "spacings": [spacing],
        "shapes_after_crop": [shape],
        "foreground_intensity_properties_per_channel": {"0": {}},
        "median_relative_size_after_cropping": 1.0,
    }
    (preprocessed / "dataset_fingerprint.json").write_text(json.dumps(fingerprint))


def training_steps(plan: dict, estimate: float, device: str, compiled: bool, run: bool) -> dict[str, object]:
    """Return the loss, the time and, on CUDA, the peak memory of the last of a few steps as nnU-Net takes them."""
    if not run:
        return {"loss": "", "step": ""} | ({"peak, GB": "", "estimate / peak": ""} if device == "cuda" else {})
    architecture = plan["architecture"]
    network = get_network_from_plans(
        architecture["network_class_name"],
        architecture["arch_kwargs"],
        architecture["_kw_requires_import"],
        1,
        CLASSES,
        deep_supervision=True,
    ).to(device)
    torch.backends.cudnn.benchmark = True  # as nnU-Net
    if compiled:
        torch.compiler.reset()  # else torch would compile the second plan for patches of any size
        network = torch.compile(network)
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    scaler = torch.amp.GradScaler("cuda") if device == "cuda" else None
    loss = DC_and_CE_loss(
        {"batch_dice": True, "do_bg": False, "smooth": 1e-5, "ddp": False}, {}, dice_class=MemoryEfficientSoftDiceLoss
    )
    data = torch.randn(plan["batch_size"], 1, *plan["patch_size"], device=device)
    steps = STEPS if device == "cuda" else 1
    for _ in range(steps):
        if device == "cuda":
            wait_for_device(device)
            torch.cuda.reset_peak_memory_stats()
        start = time.monotonic()
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda") if device == "cuda" else nullcontext():
            outputs = network(data)
            value = sum(
                loss(output, torch.randint(CLASSES, (len(data), 1, *output.shape[2:]), device=device))
                for output in outputs
            )
        if scaler is None:
            value.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 12)
            optimizer.step()
        else:
            scaler.scale(value).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(network.parameters(), 12)
            scaler.step(optimizer)
            scaler.update()
            wait_for_device(device)
    result: dict[str, object] = {"loss": f"{float(value.detach()):.2f}", "step": f"{time.monotonic() - start:.3g} s"}
    if device == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**30
        result |= {"peak, GB": f"{peak:.2f}", "estimate / peak": f"{estimate / peak:.2f}"}
    return result


if __name__ == "__main__":
    main()
