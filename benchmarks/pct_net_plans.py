"""What PCTNetPlanner makes of very different datasets, and whether a training step of each plan runs in the memory.

    python benchmarks/plans.py [--targets 3 8 24] [--device cpu|cuda] [--largest-step 3] [--jobs 1]

Plans made-up fingerprints with ``nnUNetv2_vf plan``, ``--jobs`` at the same time. Then builds the network of each plan
that is estimated to take at most ``--largest-step`` GB with nnU-Net's own function, and takes training steps with
nnU-Net's loss on random data. On CUDA it compares the peak of the allocated memory with the planner's estimate;
``--compile`` compiles, as nnU-Net does there. Prints a Markdown table; writes ``plans_DEVICE.json``, row by row.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import torch
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

from nnunetv2_vf.errors import one_line_errors
from nnunetv2_vf.nnunet_commands import Workspace
from nnunetv2_vf.pct_net import MODES

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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", type=float, nargs="+", default=[3, 8, 24], help="GB")
    parser.add_argument("--largest-step", type=float, default=3, help="GB")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--jobs", type=int, default=1, help="plans made at the same time")
    parser.add_argument("--docs", type=Path, default=Path(__file__).parent.parent / "docs")
    args = parser.parse_args()
    args.docs.mkdir(parents=True, exist_ok=True)
    with one_line_errors(), tempfile.TemporaryDirectory() as folder:
        host = Workspace(Path(folder), processes=1)
        for name in FINGERPRINTS:
            write_fingerprint(host, name)
        choices = list(itertools.product(FINGERPRINTS, args.targets))
        with ThreadPoolExecutor(args.jobs) as jobs:
            plans = list(jobs.map(lambda choice: make_plan(host, *choice), choices))
        rows: list[dict[str, object]] = []
        for (name, target), (plan, seconds) in zip(choices, plans, strict=True):
            rows.append(row(name, target, plan, seconds, args))
            (args.docs / f"plans_{args.device}.json").write_text(json.dumps(rows, indent=2) + "\n")
    print("\n| " + " | ".join(rows[0]) + " |\n" + "|---" * len(rows[0]) + "|")
    for each in rows:
        print("| " + " | ".join(map(str, each.values())) + " |")


def make_plan(host: Workspace, name: str, target: float) -> tuple[dict, float]:
    """Plan one fingerprint; returns the configuration and how many seconds it took."""
    start, plans_name = time.monotonic(), f"For{target:g}GB"
    host.run(
        "nnUNetv2_vf", "plan", "-d", dataset(name), "-gpu_memory_target", target, "-overwrite_plans_name", plans_name
    )
    seconds = time.monotonic() - start
    plans = json.loads((host.preprocessed / dataset(name) / f"{plans_name}.json").read_text())
    return plans["configurations"]["3d_fullres"], seconds


def row(name: str, target: float, plan: dict, seconds: float, args: argparse.Namespace) -> dict[str, object]:
    """A plan, and training steps with it."""
    strides = tuple(map(tuple, plan["architecture"]["arch_kwargs"]["strides"]))
    estimate = plan["estimated_training_memory_gb"]
    return {
        "fingerprint": name,
        "spacing, mm": by(f"{mm:g}" for mm in plan["spacing"]),
        "median shape": by(map(str, FINGERPRINTS[name][1])),
        "target, GB": f"{target:g}",
        "mode": str(MODES.index(strides)),
        "patch": by(map(str, plan["patch_size"])),
        "batch": plan["batch_size"],
        "estimate, GB": estimate,
        "planned in": f"{seconds:.0f} s",
        **training_steps(plan, args.device, args.compile, run=estimate <= args.largest_step),
    }


def by(sides: Iterable[str]) -> str:
    return " x ".join(sides)


def dataset(name: str) -> str:
    return f"Dataset{100 + list(FINGERPRINTS).index(name)}_{name.title().replace(' ', '')}"


def write_fingerprint(host: Workspace, name: str) -> None:
    """A dataset without images: all that planning reads."""
    spacing, shape, cases = FINGERPRINTS[name]
    raw, preprocessed = host.raw / dataset(name), host.preprocessed / dataset(name)
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


def training_steps(plan: dict, device: str, compiled: bool, run: bool) -> dict[str, object]:
    """Time, and on CUDA peak memory, of the last of a few steps as nnU-Net takes them."""
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
            torch.cuda.synchronize()
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
            torch.cuda.synchronize()
    result: dict[str, object] = {"loss": f"{float(value.detach()):.2f}", "step": f"{time.monotonic() - start:.3g} s"}
    if device == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**30
        estimate = plan["estimated_training_memory_gb"]
        result |= {"peak, GB": f"{peak:.2f}", "estimate / peak": f"{estimate / peak:.2f}"}
    return result


if __name__ == "__main__":
    main()
