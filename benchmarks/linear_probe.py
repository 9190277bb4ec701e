"""What pretrained features tell without any fine-tuning: a linear classifier of single voxels, in minutes.

    python benchmarks/linear_probe.py FOLDER NAME=vf_pretrained.pth ... [--plans nnUNetPlansHalf] [--labels 2]

FOLDER is what ``label_efficiency.py --out`` has prepared. The network of the plans stays as it is; its features are the
outputs of all stages of the encoder, of the decoder, or of the decoder's last stage alone, interpolated to the voxels
of the image. A logistic regression learns from the same labelled cases that the experiment trains on with these labels
and seeds, and marks ``--cases`` of its validation cases. Prints the mean Dice of the classes beside that of a network
that begins anew; writes ``docs/linear_probe_PLANS.json``. On CPUs; no test case is looked at.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from label_efficiency import CONFIG, MAX_SEEDS
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class, nnUNetBaseDataset
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from side_by_side import DOCS, report
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from nnunetv2_vf.errors import UserError, one_line_errors
from nnunetv2_vf.network_parts import HEADS
from nnunetv2_vf.transfer.artifact import read_artifact
from nnunetv2_vf.transfer.weight_transfer import RANDOM, transfer_weights, transferred_share

NEW = "new weights"
VOXELS = 2500  # of every class in every labelled case
DEPTHS = ("encoder", "decoder", "last stage")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("weights", nargs="+", metavar="NAME=FILE")
    parser.add_argument("--plans", default="nnUNetPlansHalf")
    parser.add_argument("--labels", type=int, default=2)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--cases", type=int, default=10, help="validation cases that are marked")
    parser.add_argument("--docs", type=Path, default=DOCS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with one_line_errors():
        config = json.loads(CONFIG.read_text())
        named = {NEW: None, **dict(map(name_and_file, args.weights))}
        if args.labels not in config["labels"]:
            raise UserError(f"--labels {args.labels} is not in the experiment; legal: {config['labels']}")
        preprocessed = args.folder / "preprocessed" / config["dataset"]
        if not preprocessed.is_dir():
            raise UserError(f"{preprocessed} is not there; prepare it: python benchmarks/label_efficiency.py")
        plan = PlansManager(str(preprocessed / f"{args.plans}.json")).get_configuration("3d_fullres")
        images = preprocessed / plan.data_identifier
        cases = infer_dataset_class(str(images))(str(images))
        folds = [config["labels"].index(args.labels) * MAX_SEEDS + seed for seed in args.seeds]
        splits = json.loads((preprocessed / "splits_final.json").read_text())
        networks = {name: build(plan, file) for name, file in named.items()}
        dice = {
            name: [probe(network, cases, splits[fold], args.cases) for fold in folds]
            for name, network in networks.items()
        }
    rows = [
        {"weights": name} | {depth: row([of_seed[depth] for of_seed in of]) for depth in DEPTHS}
        for name, of in dice.items()
    ]
    about = f"{args.plans}, {args.labels} labels, Dice of {args.cases} validation cases: mean (of each seed)"
    report(f"linear_probe_{args.plans}", about, rows, args.docs, dice=dice)


def name_and_file(argument: str) -> tuple[str, str]:
    name, equals, file = argument.partition("=")
    if not equals:
        raise UserError(f"{argument!r} is not NAME=FILE, boxes=vf_pretrained.pth for one")
    return name, file


def row(values: Sequence[float]) -> str:
    return f"{fmean(values):.3f} ({', '.join(f'{value:.3f}' for value in values)})"


def build(plan: ConfigurationManager, file: str | None) -> nn.Module:
    """The plan's network with pretrained or, without a file, new weights.

    Raises:
        UserError: the weights are of another network.
    """
    torch.manual_seed(0)
    network: nn.Module = get_network_from_plans(
        plan.network_arch_class_name,
        plan.network_arch_init_kwargs,
        plan.network_arch_init_kwargs_req_import,
        1,
        2,
        deep_supervision=True,
    )
    if file is not None:
        fates = transfer_weights(read_artifact(Path(file))["network_weights"], network)
        if transferred_share(fates) < 1:
            missing = next(fate for fate in fates if fate.outcome == RANDOM and HEADS not in fate.name)
            raise UserError(f"{file} is of another network than the plans: {missing.name} does not fit; see --plans")
    return network.eval()


def probe(network: nn.Module, cases: nnUNetBaseDataset, split: dict[str, list[str]], number: int) -> dict[str, float]:
    """Mean Dice, by depth, of what a linear classifier of the features makes of the first validation cases."""
    rng = np.random.default_rng(0)
    samples = [labelled_voxels(network, cases, case, rng) for case in split["train"]]
    labels = np.concatenate([of_case for _, of_case in samples])
    classifiers = {
        depth: make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=300)).fit(
            np.concatenate([of_case[depth] for of_case, _ in samples]), labels
        )
        for depth in DEPTHS
    }
    dice = [dice_of(classifiers, network, cases, case) for case in split["val"][:number]]
    return {depth: fmean(of_case[depth] for of_case in dice) for depth in DEPTHS}


def labelled_voxels(
    network: nn.Module, cases: nnUNetBaseDataset, case: str, rng: np.random.Generator
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Features and labels of up to VOXELS voxels of every class."""
    image, labels = load(cases, case)
    of_classes = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    chosen = np.concatenate([rng.choice(these, min(VOXELS, len(these)), replace=False) for these in of_classes])
    return {depth: x[chosen] for depth, x in features(network, image).items()}, labels.ravel()[chosen]


def dice_of(
    classifiers: Mapping[str, Pipeline], network: nn.Module, cases: nnUNetBaseDataset, case: str
) -> dict[str, float]:
    """Of every depth's classifier; mean over the classes."""
    image, labels = load(cases, case)
    found = features(network, image)
    return {
        depth: mean_dice(labels, classifier.predict(found[depth]).reshape(labels.shape))
        for depth, classifier in classifiers.items()
    }


def mean_dice(labels: np.ndarray, marked: np.ndarray) -> float:
    """Over the classes that there are, without the background."""
    both = [(labels == label, marked == label) for label in np.unique(labels) if label > 0]
    return fmean(2 * (true & found).sum() / (true.sum() + found.sum()) for true, found in both)


def load(cases: nnUNetBaseDataset, case: str) -> tuple[Tensor, np.ndarray]:
    """The image (C, D, H, W) and its labels (D, H, W); -1, nnU-Net's mark of what was cropped away, is background."""
    image, labels, *_ = cases.load_case(case)
    return torch.from_numpy(np.asarray(image[:], np.float32)), np.asarray(labels[:])[0].clip(min=0)


@torch.no_grad()
def features(network: nn.Module, image: Tensor) -> dict[str, np.ndarray]:
    """By depth (voxels, features): the outputs of stages, interpolated to the image's voxels."""
    encoder, decoder = (list(part.stages) for part in (network.encoder, network.decoder))
    shape = image.shape[1:]
    padding = [end for side in reversed(shape) for end in (0, -side % 2 ** (len(encoder) - 1))]
    padded = F.pad(image[None], padding)
    outputs: list[Tensor] = []
    with ExitStack() as hooks:
        for stage in [*encoder, *decoder]:
            hook = stage.register_forward_hook(lambda _module, _input, output: outputs.append(output))
            hooks.callback(hook.remove)
        network(padded)
    maps = [F.interpolate(output, size=padded.shape[2:], mode="trilinear")[0] for output in outputs]
    inside = [each[:, : shape[0], : shape[1], : shape[2]].flatten(1).T.numpy() for each in maps]
    return {
        "encoder": np.concatenate(inside[: len(encoder)], 1),
        "decoder": np.concatenate(inside[len(encoder) :], 1),
        "last stage": inside[-1],
    }


if __name__ == "__main__":
    main()
