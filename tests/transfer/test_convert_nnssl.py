"""Checkpoints of nnssl become artifacts, and nnU-Net's nnssl commands accept artifacts."""

from __future__ import annotations

import json

import pytest
import torch
from foreign_checkpoints import nnssl_checkpoint
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

from nnunetv2_vf.cli import main
from nnunetv2_vf.transfer.architectures import build_network
from nnunetv2_vf.transfer.artifact import read_artifact
from nnunetv2_vf.transfer.convert_nnssl import RES_ENC_L, primus_m

DYNAMIC_NETWORKS = "dynamic_network_architectures.architectures."


def zero_weights(architecture: dict, classes: int, deep_supervision: bool | None = True) -> dict:
    """Return weights of zeros in the shapes of a network, all views of one number, which takes no memory."""
    network = build_network(architecture, 1, classes, deep_supervision=deep_supervision)
    return {name: torch.zeros(()).expand(tensor.shape) for name, tensor in network.state_dict().items()}


@pytest.mark.parametrize(
    "name",
    [
        "ResidualEncoderUNet",
        f"{DYNAMIC_NETWORKS}unet.ResidualEncoderUNet",
        f"{DYNAMIC_NETWORKS}residual_unet.ResidualEncoderUNet",
        "PlainConvUNet",
    ],
)
def test_a_unet_becomes_an_artifact(tmp_path, capsys, name):
    original = nnssl_checkpoint(name)
    torch.save(original, tmp_path / "checkpoint_final.pth")
    main(["convert", str(tmp_path / "checkpoint_final.pth"), "-o", str(tmp_path / "out.pth")])
    assert f"{name.rpartition('.')[2]} of nnssl, 1 input channels, 5 output channels" in capsys.readouterr().out
    artifact = read_artifact(tmp_path / "out.pth")
    vf = artifact["vf"]
    assert vf["converted_from"] == {
        "project": "nnssl",
        "trainer": "VolumeFusionTrainer_BS8",
        "file": "checkpoint_final.pth",
    }
    assert (vf["spacing"], vf["normalization_schemes"]) == ([1, 1, 1], ["ZScoreNormalization"])
    assert artifact["nnssl_adaptation_plan"] == original["nnssl_adaptation_plan"]
    network = get_network_from_plans(
        vf["architecture"]["network_class_name"],
        vf["architecture"]["arch_kwargs"],
        vf["architecture"]["_kw_requires_import"],
        1,
        5,
        deep_supervision=True,
    )
    network.load_state_dict(artifact["network_weights"])


def test_a_target_is_planned_with_res_enc_l(tmp_path, empty_dataset, capsys):
    weights = zero_weights(RES_ENC_L, 5)
    torch.save(nnssl_checkpoint("ResEncL", weights, (160, 160, 160)), tmp_path / "checkpoint_final.pth")
    main(["convert", str(tmp_path / "checkpoint_final.pth"), "-o", str(tmp_path / "out.pth")])
    plans_file = empty_dataset((1.0, 1.0, 1.0), (160, 200, 180))
    main(["plan", "-d", "42", "--like", str(tmp_path / "out.pth"), "--normalization", "pretrained"])
    plan = json.loads(plans_file.with_name("VFPlans.json").read_text())["configurations"]["3d_fullres"]
    assert plan["architecture"]["arch_kwargs"]["n_blocks_per_stage"] == [1, 3, 4, 6, 6, 6]
    assert plan["normalization_schemes"] == ["ZScoreNormalization"]


def test_primus_m_becomes_an_artifact_but_no_target_is_planned_with_it(tmp_path, empty_dataset, capsys):
    weights = zero_weights(primus_m([32, 32, 32]), 5, deep_supervision=None)
    assert {"down_projection.proj.weight", "eva.pos_embed", "mask_token"} <= weights.keys()
    torch.save(nnssl_checkpoint("PrimusM", weights), tmp_path / "checkpoint_final.pth")
    main(["convert", str(tmp_path / "checkpoint_final.pth"), "-o", str(tmp_path / "out.pth")])
    main(["info", str(tmp_path / "out.pth")])
    assert "network: Primus, " in capsys.readouterr().out
    empty_dataset((1.0, 1.0, 1.0), (160, 200, 180))
    with pytest.raises(SystemExit, match="Primus, which is two-dimensional or takes patches of one size"):
        main(["plan", "-d", "42", "--like", str(tmp_path / "out.pth")])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["network_weights"].popitem(), "1 tensors differ, .*missing"),
        (lambda c: c["network_weights"].update(extra=torch.zeros(1)), "1 tensors differ, .*extra.*nothing"),
        (
            lambda c: c["nnssl_adaptation_plan"]["architecture_plans"].update(arch_class_name="NoSkipResEncL"),
            "network NoSkipResEncL cannot be converted; legal: ResEncL",
        ),
    ],
)
def test_a_checkpoint_that_differs_from_its_plan_is_rejected(tmp_path, change, message):
    content = nnssl_checkpoint()
    change(content)
    torch.save(content, tmp_path / "checkpoint_final.pth")
    with pytest.raises(SystemExit, match=message):
        main(["convert", str(tmp_path / "checkpoint_final.pth"), "-o", str(tmp_path / "out.pth")])
    with pytest.raises(SystemExit, match=r"--mode 1, but .* is a checkpoint of nnssl"):
        main(["convert", str(tmp_path / "checkpoint_final.pth"), "-o", str(tmp_path / "out.pth"), "--mode", "1"])
    assert not (tmp_path / "out.pth").exists()


# ---------------------------------------------------------------- nnU-Net's nnssl commands


PLAN_FIELDS = {  # the fields of nnssl's dataclasses AdaptationPlan, ArchitecturePlans, Plan and ConfigurationPlan
    "": {
        "architecture_plans", "pretrain_plan", "pretrain_num_input_channels", "recommended_downstream_patchsize",
        "key_to_encoder", "key_to_stem", "keys_to_in_proj", "key_to_lpe",
    },
    "architecture_plans": {"arch_class_name", "arch_kwargs", "arch_kwargs_requiring_import"},
    "pretrain_plan": {
        "dataset_name", "plans_name", "original_median_spacing_after_transp", "image_reader_writer",
        "transpose_forward", "transpose_backward", "configurations", "experiment_planner_used",
    },
    "median": {
        "data_identifier", "preprocessor_name", "spacing_style", "normalization_schemes", "use_mask_for_norm",
        "resampling_fn_data", "resampling_fn_data_kwargs", "resampling_fn_mask", "resampling_fn_mask_kwargs",
        "spacing", "patch_size",
    },
}  # fmt: skip


@pytest.mark.parametrize("name", ["U-Net", "ResEnc-M", "PCT-Net", "FMUNet"])
def test_the_plan_in_an_artifact_has_nnssls_fields_and_names_existing_weights(artifacts, name):
    artifact = torch.load(artifacts[name], weights_only=True)  # as nnU-Net's commands read it
    plan, weights = artifact["nnssl_adaptation_plan"], artifact["network_weights"]
    configuration = plan["pretrain_plan"]["configurations"]["median"]
    parts = {"": plan, "median": configuration} | {key: plan[key] for key in ("architecture_plans", "pretrain_plan")}
    assert {part: set(content) for part, content in parts.items()} == PLAN_FIELDS
    for key in (plan["key_to_encoder"], plan["key_to_stem"]):
        assert any(weight.startswith(f"{key}.") for weight in weights)
    assert all(f"{key}.weight" in weights for key in plan["keys_to_in_proj"])
    described = plan["architecture_plans"]
    class_name = described["arch_class_name"]
    if "." not in class_name:  # nnU-Net searches bare names in this package
        class_name = f"dynamic_network_architectures.architectures.unet.{class_name}"
    network = get_network_from_plans(
        class_name, described["arch_kwargs"], described["arch_kwargs_requiring_import"], 1, 2, deep_supervision=False
    )
    for key in (plan["key_to_encoder"], plan["key_to_stem"]):  # as nnU-Net's PretrainedTrainer loads them
        inner = {k.removeprefix(f"{key}."): w for k, w in weights.items() if k.startswith(f"{key}.")}
        network.get_submodule(key).load_state_dict(inner)


@pytest.mark.filterwarnings("ignore:Network class .* not found:UserWarning")  # nnU-Net's, of bare names: it finds them
@pytest.mark.parametrize("name", ["U-Net", "ResEnc-M"])
def test_nnunets_nnssl_commands_accept_an_artifact(artifacts, name, two_epochs, copied_dataset, monkeypatch):
    """Only with nnU-Net's development version (commit 0e49508); 2.8.1 does not have these commands."""
    like_nnssl = pytest.importorskip("nnunetv2.experiment_planning.like_nnssl")
    from nnunetv2.run.run_training_from_pretrained import get_trainer_from_args

    artifact, base = str(artifacts[name]), {"U-Net": "nnUNetPlans", "ResEnc-M": "nnUNetResEncUNetMPlans"}[name]
    like_nnssl.preprocess_like_nnssl(7, "like", artifact, "like_pretrained", None, 1, False)
    like_nnssl.plan_like_dynamic(7, "like", artifact, base, 1)
    (planned,) = copied_dataset.glob("ptPlans__like*.json")
    trainers = {planned.stem: "PretrainedTrainer", "ptPlans_dynamic__like": "DynamicPretrainedTrainer"}
    for plans, trainer_name in trainers.items():
        trainer = get_trainer_from_args("7", "3d_fullres", "all", trainer_name, plans, device=torch.device("cpu"))
        trainer.on_train_start()
        trainer.on_train_epoch_start()
        assert torch.isfinite(torch.as_tensor(trainer.train_step(next(trainer.dataloader_train))["loss"]))
        trainer.on_train_end()
