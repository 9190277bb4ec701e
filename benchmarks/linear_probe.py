"""Dice of a linear classifier of single voxels on the frozen features of pretrained networks.

    python benchmarks/linear_probe.py EXPERIMENT FOLDER NAME=vf_pretrained.pth ... [--plans nnUNetPlansHalf]
        [--labels 2]

FOLDER is the ``--work`` folder that ``label_efficiency.py`` has prepared. The features of a voxel are the outputs of
all stages of the encoder, of the decoder, or of the decoder's last stage alone, interpolated to the image voxels.
(The classifier is applied before the interpolation. Both are linear, so the result is the same, and no image needs all
its features at once.)
A logistic regression learns from the labelled cases of the experiment with these labels and seeds and segments
``--cases`` of its validation cases. Test cases are not used. Prints the mean Dice of the classes, beside that of a
network with new weights; writes ``linear_probe_EXPERIMENT_PLANS_LABELS.json``.

Duration: minutes on one CPU core. Needs: the folder of ``label_efficiency.py``, pretrained weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from common import make_parser, report
from experiment_data import fold_number
from label_efficiency_report import read_experiment
from label_efficiency_tables import mean_and_each
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class, nnUNetBaseDataset
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from nnunetv2_vf.errors import UserError, one_line_errors
from nnunetv2_vf.network_parts import HEADS
from nnunetv2_vf.transfer.artifact import read_artifact
from nnunetv2_vf.transfer.weight_transfer import RANDOM, transfer_weights, transferred_share

NEW = "new weights"
VOXELS = 2500  # per class and labelled case
DEPTHS = ("encoder", "decoder", "last stage")


class Outputs(NamedTuple):
    """What the stages of a network make of an image (C, D, H, W).

    Args:
        stages: for every depth, tensors (1, features, d, h, w).
        padded: shape of the padded image, voxels.
        shape: of the image itself.
    """

    stages: dict[str, list[Tensor]]
    padded: tuple[int, ...]
    shape: tuple[int, ...]

    def to_voxels(self, maps: Tensor) -> np.ndarray:
        """Interpolate maps (1, N, d, h, w) to the voxels of the image; return (D * H * W, N)."""
        depth, height, width = self.shape
        of_voxels = F.interpolate(maps, size=self.padded, mode="trilinear")[0, :, :depth, :height, :width]
        return of_voxels.flatten(1).T.numpy()


def main() -> None:
    parser = make_parser(__doc__, output=True)
    parser.add_argument("experiment", metavar="EXPERIMENT")
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("weights", nargs="+", metavar="NAME=FILE")
    parser.add_argument("--plans", default="nnUNetPlansHalf")
    parser.add_argument("--labels", type=int, default=2)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--cases", type=int, default=10, help="validation cases that are segmented")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with one_line_errors():
        config = read_experiment(args.experiment)
        files = {NEW: None, **dict(map(split_argument, args.weights))}
        folds = [fold_number(config, args.labels, seed) for seed in args.seeds]
        preprocessed = args.folder / "preprocessed" / config["dataset"]
        if not preprocessed.is_dir():
            raise UserError(f"{preprocessed} does not exist; prepare it: python benchmarks/label_efficiency.py")
        plan = PlansManager(str(preprocessed / f"{args.plans}.json")).get_configuration("3d_fullres")
        images = preprocessed / plan.data_identifier
        cases = infer_dataset_class(str(images))(str(images))
        splits = json.loads((preprocessed / "splits_final.json").read_text())
        networks = {name: build_network(plan, file) for name, file in files.items()}
        dice = {
            name: [probe(network, cases, splits[fold], args.cases) for fold in folds]
            for name, network in networks.items()
        }
    rows = [
        {"weights": name} | {depth: mean_and_each([of_seed[depth] for of_seed in by_seed]) for depth in DEPTHS}
        for name, by_seed in dice.items()
    ]
    number = len(splits[folds[0]]["val"][: args.cases])
    about = f"{args.plans}, {args.labels} labels, Dice of {number} validation cases: mean (of each seed)"
    report(args, f"linear_probe_{args.experiment}_{args.plans}_{args.labels}", about, rows, dice=dice)


def split_argument(argument: str) -> tuple[str, str]:
    name, equals, file = argument.partition("=")
    if not equals:
        raise UserError(f"{argument!r} is not NAME=FILE, for example boxes=vf_pretrained.pth")
    return name, file


def build_network(plan: ConfigurationManager, file: str | None) -> nn.Module:
    """Return the plans' network with pretrained or, without a file, new weights.

    Raises:
        UserError: the weights belong to another network.
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
        outcomes = transfer_weights(read_artifact(Path(file))["network_weights"], network)
        if transferred_share(outcomes) < 1:
            missing = next(outcome for outcome in outcomes if outcome.kind == RANDOM and HEADS not in outcome.name)
            raise UserError(
                f"{file} belongs to another network than the plans: {missing.name} does not fit; see --plans"
            )
    return network.eval()


def probe(network: nn.Module, cases: nnUNetBaseDataset, split: dict[str, list[str]], number: int) -> dict[str, float]:
    """Train a classifier for every depth; return its mean Dice on the first ``number`` validation cases."""
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
    """Return the features, by depth, and the labels of up to VOXELS random voxels of every class."""
    image, labels = load(cases, case)
    by_class = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    chosen = np.concatenate([rng.choice(voxels, min(VOXELS, len(voxels)), replace=False) for voxels in by_class])
    outputs = run(network, image)
    features = {
        depth: np.concatenate([outputs.to_voxels(stage)[chosen] for stage in stages], axis=1)
        for depth, stages in outputs.stages.items()
    }
    return features, labels.ravel()[chosen]


def dice_of(
    classifiers: Mapping[str, Pipeline], network: nn.Module, cases: nnUNetBaseDataset, case: str
) -> dict[str, float]:
    """Segment a case with the classifier of every depth; return the mean Dice of the classes."""
    image, labels = load(cases, case)
    outputs = run(network, image)
    return {depth: mean_dice(labels, segment(classifier, outputs, depth)) for depth, classifier in classifiers.items()}


def segment(classifier: Pipeline, outputs: Outputs, depth: str) -> np.ndarray:
    """Return the class that the classifier of a depth predicts for every voxel, (D, H, W)."""
    stages = outputs.stages[depth]
    scaler, regression = classifier
    weights = regression.coef_ / scaler.scale_
    score = regression.intercept_ - weights @ scaler.mean_  # (voxels, classes), or (voxels, 1) with two classes
    ends = np.cumsum([stage.shape[1] for stage in stages])
    for stage, of_stage in zip(stages, np.split(weights, ends[:-1], axis=1), strict=True):
        kernel = torch.from_numpy(of_stage.astype(np.float32))[:, :, None, None, None]
        score = score + outputs.to_voxels(F.conv3d(stage, kernel))
    chosen = score.argmax(1) if score.shape[1] > 1 else (score[:, 0] > 0).astype(int)
    return np.asarray(regression.classes_[chosen].reshape(outputs.shape))


def mean_dice(labels: np.ndarray, prediction: np.ndarray) -> float:
    """Return the mean Dice of the classes in ``labels``, without the background."""
    masks = [(labels == label, prediction == label) for label in np.unique(labels) if label > 0]
    return fmean(2 * (true & predicted).sum() / (true.sum() + predicted.sum()) for true, predicted in masks)


def load(cases: nnUNetBaseDataset, case: str) -> tuple[Tensor, np.ndarray]:
    """Return the image (C, D, H, W) and its labels (D, H, W); nnU-Net's label -1, cropped away, becomes background."""
    image, labels, *_ = cases.load_case(case)
    return torch.from_numpy(np.asarray(image[:], np.float32)), np.asarray(labels[:])[0].clip(min=0)


@torch.no_grad()
def run(network: nn.Module, image: Tensor) -> Outputs:
    """Run the network on an image, padded at the ends of its axes until all strides divide it."""
    encoder, decoder = (list(part.stages) for part in (network.encoder, network.decoder))
    largest_stride = 2 ** (len(encoder) - 1)
    padded = F.pad(image, [end for side in reversed(image.shape[1:]) for end in (0, -side % largest_stride)])
    outputs: list[Tensor] = []
    with ExitStack() as hooks:
        for stage in [*encoder, *decoder]:
            hook = stage.register_forward_hook(lambda _module, _input, output: outputs.append(output))
            hooks.callback(hook.remove)
        network(padded[None])
    stages = {"encoder": outputs[: len(encoder)], "decoder": outputs[len(encoder) :], "last stage": outputs[-1:]}
    return Outputs(stages, padded.shape[1:], image.shape[1:])


if __name__ == "__main__":
    main()
