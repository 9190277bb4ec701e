from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nnunetv2_vf.errors import UserError
from nnunetv2_vf.transfer.artifact import read_artifact, write_artifact


class UnpicklableTensor(torch.Tensor):
    def __reduce_ex__(self, protocol):
        raise TypeError("cannot pickle this")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "vf_pretrained.pth"


def test_an_artifact_is_read_with_weights_only(path):
    weights = {"a": torch.randn(3, 2), "b": torch.arange(4)}
    metadata = {"fold": 0, "nested": {"list": [1, 2.5, "x", None, True]}}
    write_artifact(path, weights, metadata)
    artifact = torch.load(path, weights_only=True)
    assert artifact["vf"] == metadata
    assert all(torch.equal(artifact["network_weights"][name], weights[name]) for name in weights)
    assert read_artifact(path)["vf"] == metadata
    assert list(path.parent.iterdir()) == [path]


def test_metadata_of_other_classes_become_plain_data(path):
    class Version(str):
        pass

    write_artifact(path, {}, {"version": Version("2.1"), 1: (1, 2)})
    assert read_artifact(path)["vf"] == {"version": "2.1", "1": [1, 2]}


def test_a_parameter_with_several_names_is_stored_once(tmp_path):
    weight = torch.randn(100_000)
    write_artifact(tmp_path / "once", {"a": weight}, {})
    write_artifact(tmp_path / "twice", {"a": weight, "b.a": weight}, {})
    sizes = [(tmp_path / name).stat().st_size for name in ("once", "twice")]
    assert sizes[1] < 1.01 * sizes[0]


def test_tensors_that_share_memory_keep_their_values(path):
    weight = torch.randn(2, 3)
    views = {"w": weight, "transposed": weight.t(), "row": weight[0]}
    write_artifact(path, views, {})
    read = read_artifact(path)["network_weights"]
    assert all(torch.equal(read[name], tensor) for name, tensor in views.items())


def test_a_failed_write_keeps_the_old_artifact(path):
    write_artifact(path, {"a": torch.zeros(1)}, {"fold": 0})
    with pytest.raises(TypeError):
        write_artifact(path, {"a": torch.zeros(1)}, {"fold": object()})
    with pytest.raises(Exception, match="pickle"):
        write_artifact(path, {"a": torch.zeros(1), "b": UnpicklableTensor()}, {})
    assert read_artifact(path)["vf"] == {"fold": 0}
    assert list(path.parent.iterdir()) == [path]


def test_a_missing_file_is_rejected(path):
    with pytest.raises(UserError, match=r"no file .*vf_pretrained"):
        read_artifact(path)


def test_a_damaged_file_is_rejected(path):
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(UserError, match=r"vf_pretrained\.pth cannot be loaded safely: it is damaged"):
        read_artifact(path)


def test_a_file_that_is_no_artifact_is_rejected(path):
    torch.save({"state_dict": {}}, path)
    with pytest.raises(UserError, match="lacks network_weights and vf"):
        read_artifact(path)


def test_a_pickle_that_would_run_code_is_rejected(path):
    class Malicious:
        def __reduce__(self):
            return Path.touch, (path.with_name("ran"),)

    torch.save({"network_weights": Malicious(), "vf": {}}, path)
    with pytest.raises(UserError, match=r"cannot be loaded safely: loading it would run .*pathlib(\._local)?\.Path"):
        read_artifact(path)
    assert not path.with_name("ran").exists()


@pytest.mark.parametrize("missing", ["experiment_planner_used", "original_median_spacing_after_transp"])
def test_plans_without_an_entry_that_only_nnssl_reads_can_be_pretrained(artifacts, tmp_path, missing):
    artifact = read_artifact(artifacts["U-Net"])
    del artifact["vf"]["plans"][missing]
    write_artifact(tmp_path / "new.pth", artifact["network_weights"], artifact["vf"])
    assert torch.load(tmp_path / "new.pth", weights_only=True).keys() == {"network_weights", "vf"}
