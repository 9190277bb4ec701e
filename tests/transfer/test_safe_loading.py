"""Files that name more than weights: what they name is never called, what they say never steers the terminal."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from foreign_checkpoints import nnssl_checkpoint
from nnunetv2.run.run_training import get_trainer_from_args

from nnunetv2_vf.cli import main
from nnunetv2_vf.errors import UserError, printable
from nnunetv2_vf.transfer.artifact import read_artifact
from nnunetv2_vf.transfer.safe_loading import as_described, can_be_planned, require_known_architecture


def hostile(entry: dict, canary: Path) -> dict:
    """The entry, with a command in the place of the nonlinearity."""
    entry = copy.deepcopy(entry)
    entry["arch_kwargs"] |= {"nonlin": "subprocess.Popen", "nonlin_kwargs": {"args": f"touch {canary}", "shell": True}}
    return entry


def test_what_an_artifact_names_is_not_called(artifacts, tiny, own_dataset, tmp_path):
    canary, path = tmp_path / "ran", tmp_path / "evil.pth"
    content = torch.load(artifacts["U-Net"], weights_only=True)
    content["vf"]["architecture"] = hostile(content["vf"]["architecture"], canary)
    torch.save(content, path)
    for command in (["plan", "--like", str(path)], ["adapt", str(path), "-o", str(tmp_path / "out.pth")]):
        with pytest.raises(SystemExit, match=r"names 'subprocess.Popen' as the nonlin .*; legal: layers of torch.nn"):
            main([*command, "-d", "7"])
    main(["info", str(path)])
    assert not canary.exists()


def test_what_a_checkpoint_of_nnssl_names_is_not_called(tmp_path, capsys):
    canary, path = tmp_path / "ran", tmp_path / "evil.pth"
    content = nnssl_checkpoint()
    plan = content["nnssl_adaptation_plan"]["architecture_plans"]
    plan["arch_class_name"] = "ResidualEncoderUNet"
    plan["arch_kwargs"] = hostile({"arch_kwargs": dict(plan["arch_kwargs"] or {})}, canary)["arch_kwargs"]
    plan["arch_kwargs_requiring_import"] = ["nonlin"]
    torch.save(content, path)
    main(["info", str(path)])
    assert "cannot be converted: the checkpoint names 'subprocess.Popen'" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"names 'subprocess\.Popen'"):
        main(["convert", str(path), "-o", str(tmp_path / "out.pth")])
    assert not canary.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"network_class_name": "os.system"}, "names the network 'os.system'; legal: "),
        ({"_kw_requires_import": None}, "is not what its entries say"),
        ({"arch_kwargs": "text"}, "is not what its entries say"),
        ({"arch_kwargs": {"nonlin": "torch.nn.LeakyReLU.__dict__.update"}}, "as the nonlin"),
        ({"arch_kwargs": {"nonlin": {"a": "dict"}}}, "as the nonlin"),
        ({"arch_kwargs": {"conv_op": "torch.nn.modules.conv.Conv2d"}}, "legal: 3D networks"),
    ],
)
def test_only_known_networks_are_taken_from_files(artifacts, change, message):
    architecture = read_artifact(artifacts["U-Net"])["vf"]["architecture"]
    require_known_architecture(architecture, "w.pth")
    with pytest.raises(UserError, match=f"w.pth .*{message}"):
        require_known_architecture({**architecture, **change}, "w.pth")


def test_every_network_that_is_pretrained_here_is_known_and_can_be_planned(artifacts):
    for path in artifacts.values():
        architecture = read_artifact(path)["vf"]["architecture"]
        require_known_architecture(architecture, path)
        assert can_be_planned(architecture)
    assert not can_be_planned({"arch_kwargs": {"patch_embed_size": [8, 8, 8]}})
    assert not can_be_planned({"arch_kwargs": {"strides": [[1, 1], [2, 2]]}})


def test_a_checkpoint_opens_no_path(tmp_path, capsys):
    path = tmp_path / "odd.pth"
    arguments = {"plans": "/etc/passwd", "dataset_json": {}, "configuration": "3d_fullres", "fold": 0}
    torch.save({"network_weights": {}, "init_args": arguments, "trainer_name": "T"}, path)
    main(["info", str(path)])
    assert "no file of weights that this program knows" in capsys.readouterr().out


@pytest.mark.parametrize(
    "content",
    [
        {"network_weights": [1], "vf": {"architecture": {}, "num_input_channels": 1, "num_classes": 5}},
        {"network_weights": {}, "vf": {"architecture": "text", "num_input_channels": 1, "num_classes": 5}},
        {"network_weights": {}, "vf": 3},
        {"network_weights": {}, "vf": {"architecture": {"network_class_name": "x"}}},
    ],
)
def test_odd_contents_are_one_line(artifacts, tiny, own_dataset, tmp_path, monkeypatch, content):
    path = tmp_path / "odd.pth"
    torch.save(content, path)
    for command in (["plan", "--like", str(path)], ["adapt", str(path), "-o", str(tmp_path / "out.pth")]):
        with pytest.raises(SystemExit, match=r"^nnUNetv2_vf: error: "):
            main([*command, "-d", "7"])
    with pytest.raises(SystemExit, match="1"):
        main(["doctor", "-d", "7", "-w", str(path)])
    monkeypatch.setattr("sys.argv", ["nnUNetv2_train", "-pretrained_weights", str(path)])
    with pytest.raises(SystemExit, match=r"^nnUNetv2_vf: error: "):
        get_trainer_from_args("7", "3d_fullres", 0, "VFFinetuneTrainer", device=torch.device("cpu"))


def test_what_a_file_says_stays_on_its_line(artifacts, tmp_path, capsys):
    content = torch.load(artifacts["U-Net"], weights_only=True)
    content["vf"]["dataset"] = "Dataset\n\x1b[2Kuse: anything else"
    torch.save(content, tmp_path / "odd.pth")
    main(["info", str(tmp_path / "odd.pth")])
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert not any(line.startswith("use: anything") for line in out.splitlines())


def test_printable():
    assert printable("a\tb\n\nc \x1b[0m") == "a b c ?[0m"
    assert printable("ä" * 600) == "ä" * 497 + "..."


def test_other_errors_are_no_faults_of_a_file():
    with pytest.raises(OSError, match="disk"), as_described("w.pth"):
        raise OSError("disk")
