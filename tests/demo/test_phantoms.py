from __future__ import annotations

import json

import numpy as np
import SimpleITK as sitk  # noqa: N813

from nnunetv2_vf.demo.phantoms import LABELS, make_phantom, write_dataset


def test_a_seed_always_gives_the_same_phantom():
    one, again, other = make_phantom(1), make_phantom(1), make_phantom(2)
    assert np.array_equal(one.image, again.image)
    assert np.array_equal(one.labels, again.labels)
    assert one.spacing == again.spacing != other.spacing


def test_organs_have_their_intensities_and_sizes():
    phantom = make_phantom(3, spacing=4)
    mean = {name: phantom.image[phantom.labels == label].mean() for name, label in LABELS.items()}
    assert mean["lungs"] < -600
    assert mean["spine"] > 200
    assert 0 < mean["liver"] < 250
    voxel = np.prod(phantom.spacing) / 1000  # ml
    volume = {name: (phantom.labels == label).sum() * voxel for name, label in LABELS.items()}
    assert volume["lungs"] > volume["liver"] > volume["heart"] > volume["kidneys"] > 20


def test_a_written_dataset_has_the_format_of_nnunet(tmp_path):
    write_dataset(tmp_path, [4, 5])
    description = json.loads((tmp_path / "dataset.json").read_text())
    assert description["numTraining"] == 2
    image = sitk.ReadImage(str(tmp_path / "imagesTr" / "torso_0004_0000.nii.gz"))
    labels = sitk.ReadImage(str(tmp_path / "labelsTr" / "torso_0004.nii.gz"))
    np.testing.assert_allclose(image.GetSpacing(), make_phantom(4).spacing[::-1], rtol=1e-6)
    assert image.GetSpacing() == labels.GetSpacing()
    assert set(np.unique(sitk.GetArrayFromImage(labels))) == set(LABELS.values())
