"""A training sample of Volume Fusion, side by side with PyMIC and nnssl: from a volume in memory to what is learnt.

    python benchmarks/fusion.py [--pymic PATH] [--nnssl PATH] [--device cpu|cuda] [--repeats 40]

PATH is a checkout of HiLab-git/PyMIC (which also needs pip install imops h5py fastremap edt) or MIC-DKFZ/nnssl; without
them ours runs alone. On the CPU: one core, counted in its own time. Three tasks, each with a patch of 64x128x128:

- rescaled: two crops at random scales, resized, contrast, gamma, flips, inversion, map, fusion (the paper's recipe);
- not rescaled: the same with crops of the patch's size; nnssl with the augmentations of its VolumeFusionTrainer;
- fusion: map and fusion of two arrays alone.

On CUDA, what runs there: augmentation and fusion of a batch that lies in pinned memory, per sample.
Prints Markdown tables; writes ``docs/fusion_DEVICE.json``.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import random
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from side_by_side import DOCS, alternate, machine, ratio, report, summary

from nnunetv2_vf.pretext.fusion import draw_fusion_map, fuse, fuse_batch
from nnunetv2_vf.pretext.sampling import TRAINING, FusionDataset, collate
from nnunetv2_vf.settings import VFSettings

PATCH = (64, 128, 128)
VOLUME = (128, 256, 256)
GPU_BATCH = 4
UNSCALED = VFSettings(crop_scale=(1, 1))
Contenders = dict[str, Callable[[], Any]]


class VolumeInMemory:
    """A dataset of one preprocessed case, as nnU-Net's datasets offer it."""

    def __init__(self, volume: np.ndarray):
        self.identifiers = ["case"]
        self.volume = volume[None]  # C, D, H, W

    def load_case(self, identifier: str) -> tuple[np.ndarray]:
        return (self.volume,)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pymic", type=Path, metavar="PATH")
    parser.add_argument("--nnssl", type=Path, metavar="PATH")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--docs", type=Path, default=DOCS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device(args.device)
    volume = smooth_noise(VOLUME)
    if device.type == "cuda":
        seconds = {"on the GPU": {"ours": on_gpu(volume, device, args.repeats)}}
    else:
        seconds = {
            task: alternate(contenders, args.repeats, clock=time.process_time, warm_up=3)
            for task, contenders in tasks(volume, args.pymic, args.nnssl).items()
        }
    rows = [
        {"task": task, "": name, "ms per sample": summary(runs), "ours / this": f"{ratio(of_task['ours'], runs):.3f}"}
        for task, of_task in seconds.items()
        for name, runs in of_task.items()
    ]
    report(f"fusion_{device.type}", f"{machine(device)}: median (range)", rows, args.docs, seconds=seconds)


def tasks(volume: np.ndarray, pymic: Path | None, nnssl: Path | None) -> dict[str, Contenders]:
    """What each contender does for one sample of each task."""
    foreground, background = (volume[i : i + PATCH[0], : PATCH[1], : PATCH[2]].copy() for i in (0, 32))
    rescaled: Contenders = {"ours": ours(volume, VFSettings())}
    unscaled: Contenders = {"ours": ours(volume, UNSCALED)}
    fusion: Contenders = {"ours": ours_fusion(foreground, background)}
    if pymic is not None:
        crop, fuse_them = pymic_transforms(pymic)
        rescaled["PyMIC"] = lambda: fuse_them({"image": crop({"image": volume[None].copy()})["image"]})
        fusion["PyMIC"] = lambda: fuse_them({"image": (foreground[None], background[None])})
    if nnssl is not None:
        augment, mix = nnssl_transforms(nnssl)
        unscaled["nnssl"] = lambda: augment(data=two_crops(volume))
        both = np.stack([foreground, background])[:, None]
        fusion["nnssl"] = lambda: mix(data=both)
    return {"rescaled": rescaled, "not rescaled": unscaled, "fusion": fusion}


def ours(volume: np.ndarray, settings: VFSettings) -> Callable[[], Any]:
    """What a worker and the training step on a CPU do, but for collating: nobody's is measured."""
    dataset = FusionDataset(VolumeInMemory(volume), PATCH, settings, TRAINING)
    index = itertools.count()
    cpu = torch.device("cpu")

    def run() -> Any:
        sample = dataset[next(index)]
        batch_of_one = {name: x[None] for name, x in sample.items() if isinstance(x, torch.Tensor)}
        return fuse_batch(batch_of_one, settings.coefficient_steps, cpu)

    return run


def ours_fusion(foreground: np.ndarray, background: np.ndarray) -> Callable[[], Any]:
    settings, rng = VFSettings(), np.random.default_rng(0)
    pair = [torch.from_numpy(x)[None, None] for x in (foreground, background)]

    def run() -> Any:
        fusion_map = draw_fusion_map(PATCH, settings, rng)[None]
        return fuse(*pair, fusion_map, settings.coefficient_steps), fusion_map

    return run


def on_gpu(volume: np.ndarray, device: torch.device, repeats: int) -> list[float]:
    """Seconds per sample of what the training step adds to nnU-Net's, copying from pinned memory included."""
    dataset = FusionDataset(VolumeInMemory(volume), PATCH, VFSettings(), TRAINING)
    batch = collate([dataset[i] for i in range(GPU_BATCH)])["tensors"]
    batch = {name: tensor.pin_memory() for name, tensor in batch.items()}
    seconds = []
    for _ in range(repeats + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        fuse_batch(batch, VFSettings().coefficient_steps, device)
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3 / GPU_BATCH)
    return seconds[3:]


def smooth_noise(shape: tuple[int, ...]) -> np.ndarray:
    """Structures of several voxels, mean 0, standard deviation 1."""
    coarse = torch.from_numpy(np.random.default_rng(0).normal(size=[side // 8 for side in shape])).float()
    fine = torch.nn.functional.interpolate(coarse[None, None], shape, mode="trilinear", align_corners=False)[0, 0]
    return ((fine - fine.mean()) / fine.std()).numpy()


def two_crops(volume: np.ndarray) -> np.ndarray:
    """(2, 1, D, H, W), as nnssl's loader hands them on."""
    starts = [[random.randint(0, side - patch) for side, patch in zip(VOLUME, PATCH, strict=True)] for _ in range(2)]
    return np.stack([volume[z : z + PATCH[0], y : y + PATCH[1], x : x + PATCH[2]] for z, y, x in starts])[:, None]


# ------------------------------------------------------------------ peers


def pymic_transforms(checkout: Path) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Its Crop4VolumeFusion and VolumeFusion with their defaults, which are the paper's."""
    sys.path.insert(0, str(checkout))
    warnings.simplefilter("ignore")  # it calls names that scipy deprecates
    from pymic.transform.crop4vf import Crop4VolumeFusion, VolumeFusion

    parameters = {"task": "seg", "crop4volumefusion_output_size": PATCH}
    return Crop4VolumeFusion(parameters), VolumeFusion(parameters)


def nnssl_transforms(checkout: Path) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The transforms of its VolumeFusionTrainer with that trainer's values, and the last of them, the fusion, alone.

    All but the fusion are batchgenerators'. (The trainer itself asks for Python 3.12 and for packages that this does
    without.)
    """
    from batchgenerators.transforms.abstract_transforms import Compose
    from batchgenerators.transforms.color_transforms import (
        BrightnessMultiplicativeTransform,
        ContrastAugmentationTransform,
        GammaTransform,
    )
    from batchgenerators.transforms.noise_transforms import GaussianBlurTransform, GaussianNoiseTransform
    from batchgenerators.transforms.resample_transforms import SimulateLowResolutionTransform
    from batchgenerators.transforms.spatial_transforms import MirrorTransform
    from batchgenerators.transforms.utility_transforms import NumpyToTensor

    source = checkout / "src/nnssl/ssl_data/dataloading/volume_fusion_transform.py"
    sides = [(8, int(0.625 * side) + 1) for side in PATCH]
    mix = load_module(source).VolumeFusionTransform(np.linspace(0, 1, 5), (10, 40), sides)
    augment = Compose(
        [
            GaussianNoiseTransform(p_per_sample=0.1),
            GaussianBlurTransform((0.5, 1.0), different_sigma_per_channel=True, p_per_sample=0.2, p_per_channel=0.5),
            BrightnessMultiplicativeTransform(multiplier_range=(0.75, 1.25), p_per_sample=0.15),
            ContrastAugmentationTransform(p_per_sample=0.15),
            SimulateLowResolutionTransform(
                zoom_range=(0.5, 1), per_channel=True, p_per_channel=0.5, order_downsample=0, order_upsample=3,
                p_per_sample=0.25, ignore_axes=None,
            ),
            GammaTransform((0.7, 1.5), True, True, retain_stats=True, p_per_sample=0.1),
            GammaTransform((0.7, 1.5), False, True, retain_stats=True, p_per_sample=0.3),
            MirrorTransform((0, 1, 2)),
            mix,
            NumpyToTensor(["input", "target"], "float"),
        ]
    )  # fmt: skip
    return augment, mix


def load_module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise FileNotFoundError(path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    main()
