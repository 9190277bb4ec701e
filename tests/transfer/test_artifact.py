from __future__ import annotations

from pathlib import Path

import pytest
import torch
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

from nnunetv2_vf.errors import UserError
from nnunetv2_vf.transfer.artifact import read_artifact, transfer, write_artifact


class UnpicklableTensor(torch.Tensor):
    def __reduce_ex__(self, protocol):
        raise TypeError("cannot pickle this")


def test_what_is_written_is_read_without_running_code(tmp_path):
    path = tmp_path / "vf_pretrained.pth"
    weights = {"a": torch.randn(3, 2), "b": torch.arange(4)}
    write_artifact(path, weights, {"fold": 0, "nested": {"list": [1, 2.5, "x", None, True]}})
    artifact = torch.load(path, weights_only=True)
    assert artifact["vf"] == {"fold": 0, "nested": {"list": [1, 2.5, "x", None, True]}}
    assert all(torch.equal(artifact["network_weights"][name], weights[name]) for name in weights)
    assert read_artifact(path)["vf"] == artifact["vf"]
    assert list(tmp_path.iterdir()) == [path]


def test_metadata_load_safely_whatever_their_classes(tmp_path):
    class Version(str):
        pass

    write_artifact(tmp_path / "file", {}, {"version": Version("2.1"), 1: (1, 2)})
    assert read_artifact(tmp_path / "file")["vf"] == {"version": "2.1", "1": [1, 2]}


def test_parameters_with_several_names_are_stored_once(tmp_path):
    weight = torch.randn(100_000)
    write_artifact(tmp_path / "once", {"a": weight}, {})
    write_artifact(tmp_path / "twice", {"a": weight, "b.a": weight}, {})
    sizes = [(tmp_path / name).stat().st_size for name in ("once", "twice")]
    assert sizes[1] < 1.01 * sizes[0]


def test_tensors_that_only_share_memory_stay_themselves(tmp_path):
    weight = torch.randn(2, 3)
    views = {"w": weight, "transposed": weight.t(), "row": weight[0]}
    write_artifact(tmp_path / "file", views, {})
    read = read_artifact(tmp_path / "file")["network_weights"]
    assert all(torch.equal(read[name], tensor) for name, tensor in views.items())


def test_a_failed_write_leaves_the_old_artifact(tmp_path):
    path = tmp_path / "vf_pretrained.pth"
    write_artifact(path, {"a": torch.zeros(1)}, {"fold": 0})
    with pytest.raises(TypeError):
        write_artifact(path, {"a": torch.zeros(1)}, {"fold": object()})
    with pytest.raises(Exception, match="pickle"):
        write_artifact(path, {"a": torch.zeros(1), "b": UnpicklableTensor()}, {})
    assert read_artifact(path)["vf"] == {"fold": 0}
    assert list(tmp_path.iterdir()) == [path]


def test_missing_damaged_and_foreign_files_are_one_clear_error(tmp_path):
    path = tmp_path / "vf_pretrained.pth"
    with pytest.raises(UserError, match=r"no file .*vf_pretrained"):
        read_artifact(path)
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(UserError, match=r"vf_pretrained\.pth is no file .* can be trusted: it is damaged"):
        read_artifact(path)
    torch.save({"state_dict": {}}, path)
    with pytest.raises(UserError, match="lacks network_weights and vf"):
        read_artifact(path)


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    class Malicious:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    path = tmp_path / "vf_pretrained.pth"
    torch.save({"network_weights": Malicious(), "vf": {}}, path)
    with pytest.raises(UserError, match=r"can be trusted: it would run .*pathlib\.Path"):
        read_artifact(path)
    assert not (tmp_path / "ran").exists()


def test_weights_are_transferred_as_by_nnunet_but_for_the_heads(artifacts):
    file = artifacts["U-Net"]
    content = read_artifact(file)
    architecture = content["vf"]["architecture"]
    ours, theirs = (
        get_network_from_plans(
            architecture["network_class_name"],
            architecture["arch_kwargs"],
            architecture["_kw_requires_import"],
            1,
            3,
            deep_supervision=True,
        )
        for _ in range(2)
    )
    theirs.load_state_dict(ours.state_dict())
    transfer(content["network_weights"], ours)
    load_pretrained_weights(theirs, str(file))
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name
