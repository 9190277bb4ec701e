"""Networks under their other names, and networks that are the user's own."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import DATASET, DATASET_ID, PLANS_OF_NETWORKS, edit_json
from nnunetv2.run.run_training import run_training
from trainings import CPU, make_trainer

from nnunetv2_vf.cli import main
from nnunetv2_vf.doctor import FAIL, examine
from nnunetv2_vf.errors import UserError
from nnunetv2_vf.transfer.architectures import build_network, can_be_planned, require_known_architecture
from nnunetv2_vf.transfer.artifact import read_artifact, read_pretrained
from nnunetv2_vf.transfer.differences import find_differences
from nnunetv2_vf.transfer.model_card import CARD_NAME
from nnunetv2_vf.transfer.network_fit import network_differences, require_fit
from nnunetv2_vf.transfer.target_plans import load_target

NETWORKS = "dynamic_network_architectures.architectures."
RESENC, OLD_RESENC = f"{NETWORKS}unet.ResidualEncoderUNet", f"{NETWORKS}residual_unet.ResidualEncoderUNet"
OWN = "networks.OwnUNet"  # in this folder: a network that plan --like and adapt do not know
old_plans_warn = pytest.mark.filterwarnings("ignore:Detected old nnU-Net plans", "ignore:Network class .* not found")


def copy_plans(dataset: Path, source: str, name: str, change) -> None:
    """Copy plans under another name and change their 3d_fullres."""

    def rename_and_change(plans: dict) -> None:
        plans["plans_name"] = name
        change(plans["configurations"]["3d_fullres"])

    shutil.copy(dataset / f"{source}.json", dataset / f"{name}.json")
    edit_json(dataset / f"{name}.json", rename_and_change)


def write_as_before_version_2_5(configuration: dict) -> None:
    """Describe the network as nnU-Net's plans did before version 2.5."""
    architecture = configuration.pop("architecture")
    kwargs = architecture["arch_kwargs"]
    features = kwargs["features_per_stage"]
    configuration |= {
        "UNet_class_name": architecture["network_class_name"].rpartition(".")[2],
        "UNet_base_num_features": features[0],
        "unet_max_num_features": features[-1],
        "n_conv_per_stage_encoder": kwargs["n_blocks_per_stage"],
        "n_conv_per_stage_decoder": kwargs["n_conv_per_stage_decoder"],
        "num_pool_per_axis": [kwargs["n_stages"] - 1] * 3,
        "pool_op_kernel_sizes": kwargs["strides"],
        "conv_kernel_sizes": kwargs["kernel_sizes"],
    }


def rename_network(file: Path, name: str, output: Path) -> Path:
    """Copy an artifact whose network then has another name."""
    content = torch.load(file, weights_only=True)
    content["vf"]["architecture"]["network_class_name"] = name
    torch.save(content, output)
    return output


def flatten_kernels(configuration: dict) -> None:
    kwargs = configuration["architecture"]["arch_kwargs"]
    kwargs["kernel_sizes"] = [[1, 3, 3]] * kwargs["n_stages"]


def own_network(configuration: dict) -> None:
    configuration["architecture"]["network_class_name"] = OWN


# ---------------------------------------------------------------- other names of known networks


@pytest.mark.parametrize("name", [OLD_RESENC, "ResidualEncoderUNet"])
def test_another_name_of_a_known_network_is_known_and_built_without_a_warning(artifacts, name, capsys):
    architecture = read_artifact(artifacts["ResEnc-M"])["vf"]["architecture"]
    renamed = {**architecture, "network_class_name": name}
    require_known_architecture(renamed, "w.pth")
    assert can_be_planned(renamed)
    assert type(build_network(renamed, 1, 5)) is type(build_network(architecture, 1, 5))
    assert capsys.readouterr().out == "", "nnU-Net prints a line when it searches for a network"


@pytest.mark.parametrize("name", [f"elsewhere.{RESENC}", "residual_unet.ResidualEncoderUNet", "resnet.ResNetD", None])
def test_a_name_that_is_only_similar_is_not_known(artifacts, name):
    architecture = read_artifact(artifacts["ResEnc-M"])["vf"]["architecture"]
    with pytest.raises(UserError, match=r"w.pth names the network .*; legal: "):
        require_known_architecture({**architecture, "network_class_name": name}, "w.pth")
    assert not can_be_planned({**architecture, "network_class_name": name})


def test_two_names_of_one_network_are_no_difference(artifacts, copied_dataset, tmp_path):
    plans_name = PLANS_OF_NETWORKS["ResEnc-M"]
    renamed = rename_network(artifacts["ResEnc-M"], OLD_RESENC, tmp_path / "old.pth")
    copy_plans(
        copied_dataset,
        plans_name,
        "BarePlans",
        lambda plan: plan["architecture"].update(network_class_name="ResidualEncoderUNet"),
    )
    for file in (artifacts["ResEnc-M"], renamed):
        for plans in (plans_name, "BarePlans"):
            target = load_target(str(DATASET_ID), plans, "3d_fullres")
            pretrained = read_pretrained(file)
            assert network_differences(pretrained["vf"], target) == {}
            require_fit(file, pretrained, target)
            main(["adapt", str(file), "-d", "7", "-p", plans, "-o", str(tmp_path / "out.pth")])
            assert read_artifact(tmp_path / "out.pth")["vf"]["adapted"]["transferred_share"] == 1
            assert read_artifact(tmp_path / "out.pth")["vf"]["architecture"]["network_class_name"] == RESENC
    assert read_artifact(renamed)["vf"]["architecture"]["network_class_name"] == OLD_RESENC, "the file is not changed"


def test_two_names_of_one_layer_are_no_difference(artifacts, copied_dataset, target, change_target):
    metadata = read_pretrained(artifacts["U-Net"])["vf"]
    names = {"conv_op": "torch.nn.Conv3d", "nonlin": "torch.nn.modules.activation.LeakyReLU"}
    assert network_differences(metadata, change_target(arch_kwargs=names)) == {}
    assert find_differences(metadata, change_target(arch_kwargs=names)) == []
    assert "nonlin" in network_differences(metadata, change_target(arch_kwargs={"nonlin": "torch.nn.ReLU"}))


@old_plans_warn
def test_pretraining_with_old_plans_gives_weights_that_every_command_takes(
    artifacts, copied_dataset, tmp_path, monkeypatch, capsys
):
    plans_name = PLANS_OF_NETWORKS["ResEnc-M"]
    copy_plans(copied_dataset, plans_name, "OldPlans", write_as_before_version_2_5)
    run_training(str(DATASET_ID), "3d_fullres", "all", "VFPretrainTrainer", "OldPlans", device=CPU)
    folder = tmp_path / "results" / DATASET / "VFPretrainTrainer__OldPlans__3d_fullres" / "fold_all"
    artifact = folder / "vf_pretrained.pth"
    assert "will refuse" not in next(folder.glob("training_log*.txt")).read_text()
    assert read_artifact(artifact)["vf"]["architecture"]["network_class_name"] == RESENC

    monkeypatch.setenv("nnUNet_n_proc_DA", "1")  # planning divides by it
    capsys.readouterr()
    for file in (artifact, folder / "checkpoint_final.pth"):
        main(["adapt", str(file), "-d", "7", "-p", plans_name, "-o", str(tmp_path / "out.pth")])
        main(["adapt", str(file), "-d", "7", "-p", "OldPlans", "-o", str(tmp_path / "out.pth")])
        main(["plan", "-d", "7", "--like", str(file)])
        plans = json.loads((copied_dataset / "VFPlans.json").read_text())
        assert plans["configurations"]["3d_fullres"]["architecture"]["network_class_name"] == RESENC
        assert not [f for f in examine("7", plans_name, "3d_fullres", file) if str(file) in f.text and f.state == FAIL]
    main(["info", str(artifact)])
    out = capsys.readouterr().out
    assert f"use: nnUNetv2_vf plan -d ID --like {artifact}" in out
    assert "FOUND IT" not in out


# ---------------------------------------------------------------- a network of the user's own


@pytest.fixture
def own_artifact(artifacts, copied_dataset, tmp_path) -> Path:
    """The artifact of a pretraining with a network of the user's own."""
    copy_plans(copied_dataset, "nnUNetPlans", "OwnPlans", own_network)
    run_training(str(DATASET_ID), "3d_fullres", "all", "VFPretrainTrainer", "OwnPlans", device=CPU)
    folder = tmp_path / "results" / DATASET / "VFPretrainTrainer__OwnPlans__3d_fullres" / "fold_all"
    return folder / "vf_pretrained.pth"


def test_log_info_and_model_card_say_which_commands_refuse_a_network_of_the_users_own(own_artifact, tmp_path, capsys):
    folder = own_artifact.parent
    log = next(folder.glob("training_log*.txt")).read_text()
    before_first_epoch = log.partition("Epoch 0")[0]
    assert "WARNING: nnUNetv2_vf plan --like and adapt will refuse the weights of this training" in before_first_epoch
    assert f"names the network '{OWN}'; legal: " in before_first_epoch

    for command in (["plan", "--like", str(own_artifact)], ["adapt", str(own_artifact), "-o", str(tmp_path / "out")]):
        with pytest.raises(SystemExit, match=f"names the network '{OWN}'; legal: "):
            main([*command, "-d", "7"])

    capsys.readouterr()
    main(["info", str(own_artifact)])
    use = capsys.readouterr().out.splitlines()[-1]
    assert use == (
        "use: only with plans of the same network (plan --like and adapt refuse it): nnUNetv2_train DATASET "
        f"CONFIGURATION FOLD -p PLANS -tr VFFinetuneTrainer -pretrained_weights {own_artifact}"
    )
    card = (folder / CARD_NAME).read_text()
    assert "nnUNetv2_vf plan -d ID --like" not in card
    assert "nnUNetv2_train ID 3d_fullres 0 -p PLANS -tr VFFinetuneTrainer -pretrained_weights vf_pretrained.pth" in card


def test_no_message_suggests_a_command_that_refuses_a_network_of_the_users_own(own_artifact, copied_dataset, target):
    pretrained = read_pretrained(own_artifact)
    copy_plans(copied_dataset, "OwnPlans", "FlatPlans", flatten_kernels)
    for other in (target, load_target(str(DATASET_ID), "FlatPlans", "3d_fullres")):
        weights = {name: tensor[..., :1] for name, tensor in pretrained["network_weights"].items()}
        with pytest.raises(UserError, match=r"see what the file holds: nnUNetv2_vf info") as refusal:
            require_fit(own_artifact, {**pretrained, "network_weights": weights}, other)
        assert "nnUNetv2_vf plan" not in str(refusal.value)
        assert "nnUNetv2_vf adapt" not in str(refusal.value)

    metadata = pretrained["vf"]
    metadata |= {"spacing": [2 * mm for mm in metadata["spacing"]], "normalization_schemes": ["ZScoreNormalization"]}
    metadata["architecture"]["arch_kwargs"]["nonlin"] = "torch.nn.ReLU"
    own_target = load_target(str(DATASET_ID), "OwnPlans", "3d_fullres")
    differences = [str(difference) for difference in find_differences(metadata, own_target)]
    assert len(differences) == 3
    assert not any("nnUNetv2_vf plan" in line for line in differences)


def test_a_network_of_the_users_own_is_fine_tuned_with_the_same_plans(own_artifact, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["nnUNetv2_train", "-pretrained_weights", str(own_artifact)])
    trainer = make_trainer("VFFinetuneTrainer", plans="OwnPlans")
    trainer.initialize()
    assert trainer.pretrained_record["compared"]


def test_a_checkpoint_of_a_network_of_the_users_own_is_described(copied_dataset, tmp_path, monkeypatch, capsys):
    copy_plans(copied_dataset, "nnUNetPlans", "OwnPlans", own_network)
    monkeypatch.setattr(sys, "argv", ["nnUNetv2_train"])
    trainer = make_trainer("nnUNetTrainer", plans="OwnPlans")
    trainer.initialize()
    file = tmp_path / "checkpoint_final.pth"
    trainer.save_checkpoint(str(file))
    main(["info", str(file)])
    use = capsys.readouterr().out.splitlines()[-1]
    assert use.startswith("use: nnUNetv2_predict; or as pretrained weights, only with plans of the same network")
    assert "plan -d ID" not in use
