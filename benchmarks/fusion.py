"""Time to make one Volume Fusion training sample, beside PyMIC and nnssl.

    python benchmarks/fusion.py [--peers FOLDER] [--device cpu|cuda] [--repeats 40]

On the CPU three tasks are timed on one core, in processor time. Patch: 64x128x128 voxels, from a volume in memory.

- rescaled: two crops at random scales, resized, contrast, gamma, flips, inversion, fusion map, fusion (the paper's
  recipe);
- not rescaled: the same with crops of the patch's size; nnssl runs the augmentations of its VolumeFusionTrainer;
- fusion: fusion map and fusion of two given sub-volumes.

On CUDA only our part that runs there is timed: augmentation and fusion of a batch of 4 in pinned memory, per sample.

Duration: 1 minute. Needs: one CPU core; with ``--device cuda`` a GPU; for PyMIC
``pip install imops h5py fastremap edt``.
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
from typing import Any

import numpy as np
import torch
from common import (
    Seconds,
    describe_device,
    find_peer,
    make_parser,
    median_and_range,
    median_ratio,
    report,
    take_turns,
    wait_for_device,
)
from torch import Tensor

from nnunetv2_vf.pretext.dataset import TRAINING, PretextDataset
from nnunetv2_vf.pretext.fusion import draw_fusion_map, fuse, fuse_batch
from nnunetv2_vf.pretext.loader import collate
from nnunetv2_vf.settings import VFSettings

PATCH = (64, 128, 128)
VOLUME = (128, 256, 256)
GPU_BATCH = 4
SETTINGS = VFSettings()
WARM_UP = 3
Contenders = dict[str, Callable[[], Any]]


class VolumeInMemory:
    """A dataset of one preprocessed case with the interface of nnU-Net's datasets."""

    def __init__(self, volume: np.ndarray):
        self.identifiers = ["case"]
        self.volume = volume[None]  # C, D, H, W

    def load_case(self, identifier: str) -> tuple[np.ndarray]:
        return (self.volume,)


def main() -> None:
    parser = make_parser(__doc__, device=True, peers=("PyMIC", "nnssl"), output=True)
    parser.add_argument("--repeats", type=int, default=40)
    args = parser.parse_args()
    torch.set_num_threads(1)
    volume = smooth_noise(VOLUME)
    seconds = time_on_gpu(volume, args.repeats) if args.device == "cuda" else time_on_cpu(volume, args)
    rows = [
        {
            "task": task,
            "": name,
            "ms per sample": median_and_range(runs, 1e3),
            "ours / this": f"{median_ratio(by_contender['ours'], runs):.3f}",
        }
        for task, by_contender in seconds.items()
        for name, runs in by_contender.items()
    ]
    about = f"{describe_device(args.device)}: median (range)"
    report(args, f"fusion_{args.device}", about, rows, seconds=seconds)


def time_on_cpu(volume: np.ndarray, args: argparse.Namespace) -> dict[str, Seconds]:
    tasks = make_tasks(volume, find_peer(args.peers, "PyMIC"), find_peer(args.peers, "nnssl"))
    return {
        task: take_turns(contenders, args.repeats, time.process_time, WARM_UP) for task, contenders in tasks.items()
    }


def time_on_gpu(volume: np.ndarray, repeats: int) -> dict[str, Seconds]:
    """Time the part of a training step that nnU-Net does not have, with the copy from pinned memory."""
    dataset = PretextDataset(VolumeInMemory(volume), PATCH, SETTINGS, TRAINING)
    tensors = collate([dataset[i] for i in range(GPU_BATCH)])["tensors"]
    batch = {name: tensor.pin_memory() for name, tensor in tensors.items()}

    def run() -> None:
        on_device = {name: tensor.to("cuda", non_blocking=True) for name, tensor in batch.items()}
        fuse_batch(on_device, SETTINGS.coefficient_steps)
        wait_for_device("cuda")

    seconds = take_turns({"ours": run}, repeats, warm_up=WARM_UP)
    return {"on the GPU": {"ours": [of_batch / GPU_BATCH for of_batch in seconds["ours"]]}}


def make_tasks(volume: np.ndarray, pymic: Path | None, nnssl: Path | None) -> dict[str, Contenders]:
    """Return for every task what each contender runs to make one sample."""
    foreground, background = (volume[i : i + PATCH[0], : PATCH[1], : PATCH[2]].copy() for i in (0, 32))
    rescaled: Contenders = {"ours": our_sample(volume, SETTINGS)}
    unscaled: Contenders = {"ours": our_sample(volume, VFSettings(crop_scale=(1, 1)))}
    fusion: Contenders = {"ours": our_fusion(foreground, background)}
    if pymic is not None:
        crop, pymic_fusion = load_pymic(pymic)
        rescaled["PyMIC"] = lambda: pymic_fusion({"image": crop({"image": volume[None].copy()})["image"]})
        fusion["PyMIC"] = lambda: pymic_fusion({"image": (foreground[None], background[None])})
    if nnssl is not None:
        augment, nnssl_fusion = load_nnssl(nnssl)
        unscaled["nnssl"] = lambda: augment(data=two_crops(volume))
        pair = np.stack([foreground, background])[:, None]
        fusion["nnssl"] = lambda: nnssl_fusion(data=pair)
    return {"rescaled": rescaled, "not rescaled": unscaled, "fusion": fusion}


def our_sample(volume: np.ndarray, settings: VFSettings) -> Callable[[], Any]:
    """Return what a worker and the training step on a CPU do, without collating, which no contender is timed for."""
    dataset = PretextDataset(VolumeInMemory(volume), PATCH, settings, TRAINING)
    index = itertools.count()

    def run() -> Any:
        sample = dataset[next(index)]
        batch_of_one = {name: x[None] for name, x in sample.items() if isinstance(x, Tensor)}
        return fuse_batch(batch_of_one, settings.coefficient_steps)

    return run


def our_fusion(foreground: np.ndarray, background: np.ndarray) -> Callable[[], Any]:
    rng = np.random.default_rng(0)
    pair = [torch.from_numpy(x)[None, None] for x in (foreground, background)]

    def run() -> Any:
        fusion_map = draw_fusion_map(PATCH, SETTINGS, rng)[None]
        return fuse(*pair, fusion_map, SETTINGS.coefficient_steps), fusion_map

    return run


def smooth_noise(shape: tuple[int, ...]) -> np.ndarray:
    """Return noise with structures of about 8 voxels, mean 0 and standard deviation 1."""
    coarse = torch.from_numpy(np.random.default_rng(0).normal(size=[side // 8 for side in shape])).float()
    fine = torch.nn.functional.interpolate(coarse[None, None], shape, mode="trilinear", align_corners=False)[0, 0]
    return ((fine - fine.mean()) / fine.std()).numpy()


def two_crops(volume: np.ndarray) -> np.ndarray:
    """Return two random crops (2, 1, D, H, W), in the layout of nnssl's loader."""
    starts = [[random.randint(0, side - patch) for side, patch in zip(VOLUME, PATCH, strict=True)] for _ in range(2)]
    return np.stack([volume[z : z + PATCH[0], y : y + PATCH[1], x : x + PATCH[2]] for z, y, x in starts])[:, None]


# ---------------------------------------------------------------- peers


def load_pymic(checkout: Path) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return PyMIC's Crop4VolumeFusion and VolumeFusion with their defaults, which are the paper's."""
    sys.path.insert(0, str(checkout))
    warnings.simplefilter("ignore")  # PyMIC calls names that scipy deprecates
    from pymic.transform.crop4vf import Crop4VolumeFusion, VolumeFusion

    parameters = {"task": "seg", "crop4volumefusion_output_size": PATCH}
    return Crop4VolumeFusion(parameters), VolumeFusion(parameters)


def load_nnssl(checkout: Path) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return the transforms of nnssl's VolumeFusionTrainer with that trainer's values, and its fusion alone.

    All transforms but the fusion come from batchgenerators. nnssl's trainer itself needs Python 3.12 and further
    packages, so its file with the fusion is loaded by itself.
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
    spec = importlib.util.spec_from_file_location(source.stem, source)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    box_sides = [(8, int(0.625 * side) + 1) for side in PATCH]
    fusion = module.VolumeFusionTransform(np.linspace(0, 1, 5), (10, 40), box_sides)
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
            fusion,
            NumpyToTensor(["input", "target"], "float"),
        ]
    )  # fmt: skip
    return augment, fusion


if __name__ == "__main__":
    main()
