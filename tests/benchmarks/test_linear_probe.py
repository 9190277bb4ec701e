"""The linear probe of frozen features: features, sampled voxels, scores and wrong arguments."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import DATASET
from linear_probe import (
    DEPTHS,
    VOXELS,
    build_network,
    labelled_voxels,
    load,
    main,
    mean_dice,
    probe,
    run,
    segment,
)
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from nnunetv2_vf.errors import UserError
from nnunetv2_vf.transfer.artifact import read_artifact


@pytest.fixture
def plan(nnunet):
    return PlansManager(str(nnunet / "preprocessed" / DATASET / "nnUNetPlans.json")).get_configuration("3d_fullres")


@pytest.fixture
def cases(nnunet):
    folder = str(nnunet / "preprocessed" / DATASET / "nnUNetPlans_3d_fullres")
    return infer_dataset_class(folder)(folder)


def voxel_features(network, image):
    outputs = run(network, image)
    return {
        depth: np.concatenate([outputs.to_voxels(stage) for stage in stages], 1)
        for depth, stages in outputs.stages.items()
    }


def test_every_voxel_has_features_for_any_image_shape(plan):
    network = build_network(plan, None)
    image = torch.randn(1, 17, 13, 21)
    found = voxel_features(network, image)
    counts = plan.network_arch_init_kwargs["features_per_stage"]
    expected = {"encoder": sum(counts), "decoder": sum(counts[:-1]), "last stage": counts[0]}
    assert {depth: x.shape for depth, x in found.items()} == {d: (17 * 13 * 21, n) for d, n in expected.items()}
    np.testing.assert_array_equal(found["decoder"][:, -counts[0] :], found["last stage"])


@pytest.mark.parametrize("classes", [2, 3])
def test_a_segmentation_is_that_of_the_classifier_on_the_features_of_every_voxel(plan, classes):
    network, image = build_network(plan, None), torch.randn(1, 17, 13, 21)
    for depth, x in voxel_features(network, image).items():
        classifier = make_pipeline(StandardScaler(), LogisticRegression()).fit(x, np.arange(len(x)) % classes)
        found = segment(classifier, run(network, image), depth)
        assert (found.ravel() == classifier.predict(x)).mean() > 0.999, "but for rounding"


def test_pretrained_weights_are_loaded_and_weights_of_another_network_refused(plan, artifacts):
    network = build_network(plan, str(artifacts["U-Net"]))
    pretrained = read_artifact(artifacts["U-Net"])["network_weights"]
    for name, tensor in network.state_dict().items():
        assert ".seg_layers." in name or torch.equal(tensor, pretrained[name])
    with pytest.raises(UserError, match=r"belongs to another network than the plans: .* does not fit; see --plans"):
        build_network(plan, str(artifacts["PCT-Net"]))


def test_at_most_voxels_samples_of_each_class_are_drawn(plan, cases):
    x, y = labelled_voxels(build_network(plan, None), cases, cases.identifiers[0], np.random.default_rng(0))
    _, labels = load(cases, cases.identifiers[0])
    assert {len(of_depth) for of_depth in x.values()} == {len(y)}
    assert dict(zip(*np.unique(y, return_counts=True), strict=True)) == {
        label: min(VOXELS, count) for label, count in zip(*np.unique(labels, return_counts=True), strict=True)
    }


def test_the_score_is_the_mean_dice_of_the_classes_without_background(cases):
    _, labels = load(cases, cases.identifiers[0])
    assert mean_dice(labels, labels) == 1
    assert mean_dice(labels, np.zeros_like(labels)) == 0
    classes = np.count_nonzero(np.unique(labels))
    assert mean_dice(labels, np.where(labels == 1, 0, labels)) == pytest.approx(1 - 1 / classes)


def test_a_probe_trained_on_a_case_segments_part_of_it(plan, cases):
    split = {"train": cases.identifiers[:1], "val": cases.identifiers[:1]}
    found = probe(build_network(plan, None), cases, split, 1)
    assert [*found] == [*DEPTHS]
    assert 0.1 < found["encoder"] <= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["vf_pretrained.pth"], "'vf_pretrained.pth' is not NAME=FILE"),
        (["a=b", "--labels", "3"], r"3 labels, seed 0: legal are \[2, 5"),
        (["a=b"], "prepare it: python benchmarks/label_efficiency.py"),
    ],
)
def test_wrong_arguments_are_reported_in_one_line(tmp_path, monkeypatch, arguments, message):
    monkeypatch.setattr("sys.argv", ["linear_probe.py", "hippocampus", str(tmp_path), *arguments])
    with pytest.raises(SystemExit, match=message):
        main()
