from __future__ import annotations

import copy
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import DATASET, DATASET_ID, edit_json
from nnunetv2.experiment_planning.plan_and_preprocess_api import preprocess
from nnunetv2.run.run_training import get_trainer_from_args, maybe_load_checkpoint, run_training

from nnunetv2_vf.cli import main
from nnunetv2_vf.errors import UserError
from nnunetv2_vf.training.preflight import preprocessed_cases
from nnunetv2_vf.transfer.artifact import read_artifact
from nnunetv2_vf.transfer.compatibility import (
    adapt_command,
    adapted_name,
    differences,
    like_command,
    mismatched_tensors,
    pretrained_weights_argument,
    require_fit,
)
from nnunetv2_vf.transfer.target_plans import TargetPlans, build_network, load_target

CPU = torch.device("cpu")
TRAIN = ["nnUNetv2_train", str(DATASET_ID), "3d_fullres", "0"]


@pytest.fixture
def artifact(artifacts) -> Path:
    return artifacts["U-Net"]


@pytest.fixture
def target(tiny, own_dataset) -> TargetPlans:
    return load_target(str(DATASET_ID), "nnUNetPlans", "3d_fullres")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["nnUNetv2_train", "7", "3d_fullres", "0", "-pretrained_weights", "w.pth", "-p", "PCTNetPlans"], "w.pth"),
        (["/bin/nnUNetv2_train", "7", "-p", "PCTNetPlans", "-pretrained_weights=w.pth", "--npz"], "w.pth"),
        (["run_training.py", "7", "-pretrained_weights", "w.pth"], "w.pth"),
        (["nnUNetv2_train", "7", "3d_fullres", "0", "-p", "PCTNetPlans", "-tr", "T", "--c"], None),
        (["nnUNetv2_train", "-pretrained_weights"], None),
        (["another_program", "-pretrained_weights", "w.pth"], None),
        (["another_program", "-pretrained", "w.pth", "-p", "x"], None),
        ([""], None),
    ],
)
def test_the_weights_are_found_on_the_command_line(arguments, expected):
    assert pretrained_weights_argument(arguments) == (expected and Path(expected))


# ---------------------------------------------------------------- what differs


def test_nothing_differs_from_the_pretraining_dataset(artifact, target):
    pretrained = read_artifact(artifact)
    require_fit(artifact, pretrained, target)
    assert differences(pretrained["vf"], target) == []


def test_each_difference_is_told_with_both_values_and_its_cost(artifact, target):
    vf = read_artifact(artifact)["vf"]
    statistics = vf["plans"]["foreground_intensity_properties_per_channel"]["0"]
    shifted = {"0": {**statistics, "mean": statistics["mean"] + 5 * statistics["std"]}}
    cases = {
        "channels": {"channel_names": {"0": "T1"}},
        "normalisation": {"normalization_schemes": ["ZScoreNormalization"]},
        "intensities": {"plans": {**vf["plans"], "foreground_intensity_properties_per_channel": shifted}},
        "spacing": {"spacing": [2 * mm for mm in vf["spacing"]]},
        "axis order": {"plans": {**vf["plans"], "transpose_forward": [2, 0, 1]}},
        "nonlin": {"architecture": with_kwargs(vf["architecture"], nonlin="torch.nn.ReLU")},
        "norm_op": {"architecture": with_kwargs(vf["architecture"], norm_op="torch.nn.modules.batchnorm.BatchNorm3d")},
        "normalisation within the mask only": {"plans": with_mask(vf["plans"])},
    }
    for what, change in cases.items():
        (found,) = differences({**vf, **change}, target)
        assert found.what == what
        assert found.pretrained != found.target
        assert str(found) == f"{what}: {found.pretrained} in pretraining, {found.target} here: {found.cost}"


def with_kwargs(architecture: dict, **changes) -> dict:
    return {**architecture, "arch_kwargs": {**architecture["arch_kwargs"], **changes}}


def with_mask(plans: dict) -> dict:
    plans = copy.deepcopy(plans)
    plans["configurations"]["3d_fullres"]["use_mask_for_norm"] = [True]
    return plans


def test_channels_in_another_order_are_a_difference(artifact, target):
    vf = {
        **read_artifact(artifact)["vf"],
        "channel_names": {"0": "CT", "1": "PET"},
        "normalization_schemes": ["CTNormalization", "ZScoreNormalization"],
    }
    names = {**target.dataset_json, "channel_names": {"0": "PET", "1": "CT"}}
    plans = copy.deepcopy(target.plans_manager.plans)
    plans["configurations"]["3d_fullres"]["normalization_schemes"] = vf["normalization_schemes"][::-1]
    swapped = TargetPlans(type(target.plans_manager)(plans), "3d_fullres", names)
    assert {"channels", "normalisation"} <= {difference.what for difference in differences(vf, swapped)}


@pytest.mark.parametrize(("factor", "told"), [(0.72, False), (1.0, False), (1.45, False), (0.6, True), (1.6, True)])
def test_spacings_within_the_scales_of_pretrainings_crops_are_no_difference(artifact, target, factor, told):
    vf = read_artifact(artifact)["vf"]
    vf["spacing"] = [mm / factor for mm in target.configuration.spacing]
    assert bool(differences(vf, target)) == told


def test_other_spelling_of_a_channel_is_no_difference(artifact, target):
    vf = read_artifact(artifact)["vf"]
    vf["channel_names"] = {"0": "ct"}
    assert differences(vf, target) == []


@pytest.mark.parametrize(
    ("theirs", "ours", "told"),
    [
        (["MR"], ["MRI"], False),
        (["MR"], ["MRI", "MRI1", "mr_2"], False),
        (["MR"], ["T1", "T2w", "FLAIR"], False),
        (["T1"], ["T2"], True),
        (["MR"], ["CT"], True),
        (["MR"], ["T1", "PET"], True),
        (["CT"], ["CT", "CT"], False),
        (["T1", "T2"], ["T2", "T1"], True),
    ],
)
def test_names_of_one_modality_are_no_difference(artifact, target, theirs, ours, told):
    vf = {**read_artifact(artifact)["vf"], "channel_names": dict(enumerate(theirs))}
    names = {str(i): name for i, name in enumerate(ours)}
    target = TargetPlans(target.plans_manager, "3d_fullres", {**target.dataset_json, "channel_names": names})
    assert ("channels" in [difference.what for difference in differences(vf, target)]) == told


def test_weights_that_tell_nothing_of_their_data_are_said_to(target):
    (found,) = differences({}, target)
    assert "not recorded" in str(found)


# ---------------------------------------------------------------- what cannot work


def test_misfits_are_what_nnunet_would_refuse(artifact, target):
    weights = read_artifact(artifact)["network_weights"]
    network = build_network(target.architecture, 1, 7)  # heads do not count
    assert mismatched_tensors(weights, network) == []
    assert mismatched_tensors({name: w for name, w in weights.items() if "transpconvs.0" not in name}, network) == [
        "decoder.transpconvs.0.weight",
        "decoder.transpconvs.0.bias",
    ]


def another_architecture(target: TargetPlans, **changes) -> TargetPlans:
    plans = copy.deepcopy(target.plans_manager.plans)
    plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"] |= changes
    return TargetPlans(type(target.plans_manager)(plans), "3d_fullres", target.dataset_json)


def test_a_misfit_names_both_values_and_the_commands_that_mend_it(artifact, target):
    features = target.architecture["arch_kwargs"]["features_per_stage"]
    wider = another_architecture(target, features_per_stage=[2 * f for f in features])
    with pytest.raises(UserError) as error:
        require_fit(artifact, read_artifact(artifact), wider)
    message = str(error.value)
    assert f"features_per_stage {features} against {[2 * f for f in features]}" in message
    assert "nnUNetv2_vf adapt" not in message, "it would refuse them"
    assert f"nnUNetv2_vf plan -d 7 --like {artifact}" in message

    kwargs = target.architecture["arch_kwargs"]
    names = ("features_per_stage", "kernel_sizes", "strides", "n_conv_per_stage", "n_conv_per_stage_decoder")
    shallower = {name: kwargs[name][:-1] for name in names} | {"n_stages": kwargs["n_stages"] - 1}
    with pytest.raises(UserError, match="nnUNetv2_vf adapt"):
        require_fit(artifact, read_artifact(artifact), another_architecture(target, **shallower))

    flatter = another_architecture(target, kernel_sizes=[[1, 3, 3]] * len(features))
    with pytest.raises(UserError) as error:
        require_fit(artifact, read_artifact(artifact), flatter)
    message = str(error.value)
    assert f"nnUNetv2_vf adapt {artifact} -d 7 -p nnUNetPlans -c 3d_fullres -o vf_pretrained_for_7.pth" in message
    assert f"nnUNetv2_vf plan -d 7 --like {artifact}" in message


def test_other_channels_need_no_other_plans(artifact, target):
    two = TargetPlans(
        target.plans_manager, "3d_fullres", {**target.dataset_json, "channel_names": {"0": "CT", "1": "PET"}}
    )
    with pytest.raises(UserError, match=r"input channels 1 against 2; adapt it: nnUNetv2_vf adapt [^;]*$"):
        require_fit(artifact, read_artifact(artifact), two)


def test_printed_commands_survive_the_shell_and_spare_the_file(target):
    words = shlex.split(adapt_command(Path("my weights.pth"), target))
    assert words[:3] == ["nnUNetv2_vf", "adapt", "my weights.pth"]
    assert words[-2:] == ["-o", "my weights_for_7.pth"]
    assert shlex.split(like_command("my weights.pth", target))[-1] == "my weights.pth"
    assert adapted_name(Path("w_for_7.pth"), 7) != "w_for_7.pth"


def test_bare_weights_name_a_tensor(artifact, target):
    weights = read_artifact(artifact)["network_weights"]
    wider = another_architecture(target, n_conv_per_stage=[3] * target.architecture["arch_kwargs"]["n_stages"])
    with pytest.raises(UserError, match="tensors are missing or of another shape, encoder"):
        require_fit(artifact, {"network_weights": weights, "vf": {}}, wider)


# ---------------------------------------------------------------- in the trainer


def trainer(monkeypatch, weights) -> object:
    monkeypatch.setattr(sys, "argv", [*TRAIN, "-tr", "VFFinetuneTrainer", "-pretrained_weights", str(weights)])
    return get_trainer_from_args(str(DATASET_ID), "3d_fullres", 0, "VFFinetuneTrainer", device=CPU)


def test_a_misfit_ends_training_in_one_line_before_anything_is_written(
    artifacts, tiny, own_dataset, tmp_path, monkeypatch
):
    with pytest.raises(SystemExit, match=r"^nnUNetv2_vf: error: .* does not fit 3d_fullres of nnUNetPlans.*--like"):
        trainer(monkeypatch, artifacts["PCT-Net"])
    with pytest.raises(SystemExit, match=r"^nnUNetv2_vf: error: no file /nowhere.pth"):
        trainer(monkeypatch, "/nowhere.pth")
    assert not (tmp_path / "results").exists()


def test_without_preprocessed_cases_nothing_is_written(artifact, tiny, own_dataset, tmp_path, monkeypatch):
    edit_json(
        own_dataset / "nnUNetPlans.json",
        lambda plans: plans["configurations"]["3d_fullres"].update(data_identifier="nowhere"),
    )
    with pytest.raises(SystemExit, match=r"no preprocessed cases in .*: nnUNetv2_preprocess -d 7 -plans_name nnUNet"):
        trainer(monkeypatch, artifact)
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("name", ["VFFinetuneTrainer", "VFPretrainTrainer"])
def test_cases_of_former_plans_are_refused(tiny, own_dataset, tmp_path, monkeypatch, name):
    def replan(plans):
        spacing = plans["configurations"]["3d_fullres"]["spacing"]
        plans["configurations"]["3d_fullres"]["spacing"] = [2 * mm for mm in spacing]

    edit_json(own_dataset / "nnUNetPlans.json", replan)
    monkeypatch.setattr(sys, "argv", TRAIN)
    with pytest.raises(SystemExit, match=r"preprocessed for other plans: .* preprocess again: nnUNetv2_preprocess"):
        get_trainer_from_args(str(DATASET_ID), "3d_fullres", 0, name, device=CPU)
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    "unlike", [{"resampling_fn_data": "no_resampling_hack"}, {"preprocessor_name": "SomeonesPreprocessor"}]
)
def test_cases_that_nnunet_does_not_resample_to_the_spacing_are_not_measured_by_it(tiny, own_dataset, unlike):
    def replan(plans):
        plans["configurations"]["3d_fullres"] |= {"spacing": [4.0, 4.0, 4.0], **unlike}

    edit_json(own_dataset / "nnUNetPlans.json", replan)
    plans = load_target(str(DATASET_ID), "nnUNetPlans", "3d_fullres").plans_manager
    assert len(preprocessed_cases(plans, "3d_fullres")) == 10


def test_two_dimensional_plans_train_without_weights(tiny, own_dataset, monkeypatch):
    """Nothing of the checks stands in the way of what is nnU-Net's own."""
    plans = load_target(str(DATASET_ID), "nnUNetPlans", "3d_fullres").plans_manager
    preprocess([DATASET_ID], "nnUNetPlans", configurations=["2d"], num_processes=[1])
    assert len(preprocessed_cases(plans, "2d")) == 10
    monkeypatch.setattr(sys, "argv", TRAIN)
    assert get_trainer_from_args(str(DATASET_ID), "2d", 0, "VFFinetuneTrainer", device=CPU).pretrained_weights is None


def test_differences_are_logged_and_the_weights_recorded(artifact, tiny, own_dataset, tmp_path, monkeypatch):
    edited = tmp_path / "edited.pth"
    content = torch.load(artifact, weights_only=True)
    content["vf"]["channel_names"] = {"0": "T1"}
    torch.save(content, edited)
    tuned = trainer(monkeypatch, edited)
    maybe_load_checkpoint(tuned, False, False, str(edited))
    tuned.run_training()
    fold = Path(tuned.output_folder)
    (log,) = fold.glob("training_log_*.txt")
    assert f"Pretrained weights: edited.pth of {DATASET}\n  channels: T1 in pretraining, CT here" in log.read_text()
    checkpoint = torch.load(fold / "checkpoint_final.pth", weights_only=False)
    assert checkpoint["trainer_name"] == "nnUNetTrainer"
    provenance = checkpoint["volume_fusion"]
    assert provenance["trainer"] == "VFFinetuneTrainer"
    assert provenance["settings"]["num_epochs"] == 2
    assert provenance["pretrained"]["file"] == "edited.pth", "without its folder: models are shared"
    assert provenance["pretrained"]["dataset"] == DATASET


def test_a_continued_training_keeps_the_record(artifact, tiny, own_dataset, tmp_path, monkeypatch):
    run = (str(DATASET_ID), "3d_fullres", 0, "VFFinetuneTrainer")
    first = trainer(monkeypatch, artifact)
    maybe_load_checkpoint(first, False, False, str(artifact))
    first.on_train_start()
    first.on_train_end()
    (Path(first.output_folder) / "checkpoint_final.pth").rename(Path(first.output_folder) / "checkpoint_latest.pth")
    monkeypatch.setattr(sys, "argv", [*TRAIN, "--c"])
    run_training(*run, continue_training=True, device=CPU)
    final = torch.load(Path(first.output_folder) / "checkpoint_final.pth", weights_only=False)
    assert final["volume_fusion"]["pretrained"]["file"] == "vf_pretrained.pth"
    assert final["current_epoch"] == 2


def test_a_network_of_ones_own_keeps_the_trainers_name(tiny, own_dataset, monkeypatch):
    monkeypatch.setattr(sys, "argv", TRAIN)
    stock = get_trainer_from_args(str(DATASET_ID), "3d_fullres", 0, "VFFinetuneTrainer", device=CPU)

    class OwnTrainer(type(stock)):
        @staticmethod
        def build_network_architecture(plans_manager, configuration_manager, channels, classes, deep_supervision=True):
            raise NotImplementedError

    stock.initialize()
    stock.__class__ = OwnTrainer
    path = Path(stock.output_folder) / "checkpoint_best.pth"
    stock.save_checkpoint(str(path))
    assert torch.load(path, weights_only=False)["trainer_name"] == "OwnTrainer"
    assert [p.name for p in path.parent.iterdir() if p.name.endswith(".part")] == []


# ---------------------------------------------------------------- adapt


def test_adapt_for_plans_of_another_topology(artifact, tiny, own_dataset, tmp_path, capsys, monkeypatch):
    """Flat kernels and another stage, through the command, into stock -pretrained_weights."""

    def change(plans):
        plans["plans_name"] = "OtherPlans"
        kwargs = plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
        kwargs["n_stages"] += 1
        for name in ("features_per_stage", "kernel_sizes", "strides", "n_conv_per_stage", "n_conv_per_stage_decoder"):
            kwargs[name] = [*kwargs[name], kwargs[name][-1]]
        kwargs["kernel_sizes"][0] = [1, 3, 3]
        kwargs["strides"][1] = [1, 2, 2]

    shutil.copy(own_dataset / "nnUNetPlans.json", own_dataset / "OtherPlans.json")
    edit_json(own_dataset / "OtherPlans.json", change)
    out = tmp_path / "adapted.pth"
    main(["adapt", str(artifact), "-d", "7", "-p", "OtherPlans", "-o", str(out)])
    printed = capsys.readouterr().out
    assert "kernel 3x3x3 -> 1x3x3" in printed
    assert "upsampling 2x2x2 -> 1x2x2" in printed
    assert f"nnUNetv2_train 7 3d_fullres 0 -p OtherPlans -tr VFFinetuneTrainer -pretrained_weights {out}" in printed
    vf = read_artifact(out)["vf"]
    assert "not in the pretrained network" in printed
    assert 0 < vf["adapted"]["transferred_share"] < 1
    assert vf["dataset"] == DATASET
    assert vf["architecture"]["arch_kwargs"]["kernel_sizes"][0] == [1, 3, 3]
    run = (str(DATASET_ID), "3d_fullres", 0)
    stock = get_trainer_from_args(*run, "nnUNetTrainer", "OtherPlans", device=CPU)
    maybe_load_checkpoint(stock, False, False, str(out))
    assert torch.equal(stock.network.encoder.stages[0][0].convs[0].conv.weight.cpu(),
                       read_artifact(out)["network_weights"]["encoder.stages.0.0.convs.0.conv.weight"])  # fmt: skip


def test_adapt_takes_a_checkpoint_of_nnunet(tiny, own_dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", TRAIN)
    stock = get_trainer_from_args(str(DATASET_ID), "3d_fullres", 0, "nnUNetTrainer", device=CPU)
    stock.initialize()
    stock.save_checkpoint(str(tmp_path / "checkpoint_final.pth"))
    out = tmp_path / "adapted.pth"
    main(["adapt", str(tmp_path / "checkpoint_final.pth"), "-d", "7", "-o", str(out), "--encoder-only"])
    assert 0 < read_artifact(out)["vf"]["adapted"]["transferred_share"] < 1


def test_what_was_at_random_stays_known_to_be(artifact, tiny, own_dataset, tmp_path, capsys):
    one, two = tmp_path / "one.pth", tmp_path / "two.pth"
    main(["adapt", str(artifact), "-d", "7", "-o", str(one), "--encoder-only"])
    main(["adapt", str(one), "-d", "7", "-o", str(two)])
    first, second = (read_artifact(path)["vf"]["adapted"] for path in (one, two))
    assert first == second
    assert "are from pretraining; adapt left the others at random" in capsys.readouterr().out
    assert "nnssl_adaptation_plan" not in torch.load(one, weights_only=True)


@pytest.mark.parametrize(
    ("network", "arguments", "message"),
    [
        ("PCT-Net", [], "holds weights of nnunetv2_vf.pct_net.PCTNet, but 3d_fullres of nnUNetPlans.*--partial"),
        ("U-Net", ["-c", "2d"], "configuration '2d' of .* cannot be used; legal: 3d_fullres"),
        ("U-Net", ["-p", "NoPlans"], "no plans .*there are: [^;]*nnUNetPlans[^;]*$"),
        ("U-Net", ["-p", "VFPlans"], "no plans .*make them: nnUNetv2_vf plan -d 7 --like FILE"),
        ("U-Net", ["-p", "nnUNetPlans.json"], "'nnUNetPlans.json' is no name of plans; legal"),
        ("U-Net", ["-p", "BrokenPlans"], "BrokenPlans.json, or dataset.json beside it, cannot be read"),
        ("U-Net", ["-d", "99"], "no dataset 99"),
        ("U-Net", ["-o", "/nowhere/adapted.pth"], "the folder /nowhere does not exist; make it: mkdir -p /nowhere"),
    ],
)
def test_adapts_mistakes_are_one_line(artifacts, tiny, own_dataset, tmp_path, network, arguments, message):
    out = tmp_path / "adapted.pth"
    (own_dataset / "BrokenPlans.json").write_text("{bad")
    with pytest.raises(SystemExit, match=f"^nnUNetv2_vf: error: .*{message}"):
        main(["adapt", str(artifacts[network]), "-d", "7", "-o", str(out), *arguments])
    assert not out.exists()


def test_other_features_are_refused_unless_partial(artifact, tiny, own_dataset, tmp_path):
    def widen(plans):
        kwargs = plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
        kwargs["features_per_stage"][-1] *= 2

    edit_json(own_dataset / "nnUNetPlans.json", widen)
    command = ["adapt", str(artifact), "-d", "7", "-o", str(tmp_path / "adapted.pth")]
    with pytest.raises(SystemExit, match=r"have other features than in .* against .*--partial"):
        main(command)
    main([*command, "--partial"])
    assert 0 < read_artifact(tmp_path / "adapted.pth")["vf"]["adapted"]["transferred_share"] < 1


def test_what_is_left_at_random_is_the_same_every_time_and_the_generator_untouched(
    artifact, tiny, own_dataset, tmp_path
):
    state = torch.get_rng_state()
    for name in ("a.pth", "b.pth"):
        main(["adapt", str(artifact), "-d", "7", "-o", str(tmp_path / name), "--encoder-only"])
    one, other = (read_artifact(tmp_path / name)["network_weights"] for name in ("a.pth", "b.pth"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert torch.equal(torch.get_rng_state(), state)
