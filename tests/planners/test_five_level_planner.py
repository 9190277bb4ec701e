from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from conftest import DATASET_ID
from nnunetv2.experiment_planning.plan_and_preprocess_api import plan_experiment_dataset
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_vf.cli import main
from nnunetv2_vf.errors import UserError
from nnunetv2_vf.five_level_network import MODES, total_stride
from nnunetv2_vf.planners.five_level_planner import plan_network, resolution_mode
from nnunetv2_vf.planners.memory_fitting import candidate_patches
from nnunetv2_vf.planners.pct_net_planner import PCTNetPlanner
from nnunetv2_vf.planners.step_memory import GIB, measure_architecture

CASES = {  # spacing in mm, median shape in voxels, cases, resolution mode
    "isotropic": ((1.0, 1.0, 1.0), (160, 200, 180), 100, 0),
    "anisotropic": ((5.0, 0.7, 0.7), (24, 320, 320), 40, 2),
    "between": ((2.5, 1.0, 1.0), (60, 256, 256), 40, 1),
    "tiny": ((1.0, 1.0, 1.0), (35, 50, 35), 130, 0),
    "large": ((1.5, 0.8, 0.8), (300, 512, 512), 100, 0),
    "thin": ((8.0, 1.25, 1.25), (10, 200, 220), 100, 2),
    "thin, isotropic": ((1.0, 1.0, 1.0), (12, 100, 100), 100, 0),
}


NETWORKS = {"PCTNet": [], "FMUNet": ["--network", "FMUNet"]}


@pytest.mark.parametrize(
    ("name", "network"),
    [
        # Each measurement of PCT-Net takes a second, of FMUNet half of it.
        *((name, "FMUNet") for name in ("between", "tiny", "large", "thin, isotropic")),
        ("thin", "PCTNet"),
        *(pytest.param(name, "PCTNet", marks=pytest.mark.slow) for name in CASES if name != "thin"),
    ],
)
def test_plans_are_legal_and_fit_the_memory_target(empty_dataset, name, network):
    spacing, shape, cases, mode = CASES[name]
    plans_file = empty_dataset(spacing, shape, cases)
    main(["plan", "-d", "42", "-gpu_memory_target", "6", *NETWORKS[network]])
    configurations = json.loads(plans_file.with_name(f"{network}Plans.json").read_text())["configurations"]
    plan = configurations["3d_fullres"]
    assert plan["architecture"]["network_class_name"].endswith(f".{network}")
    divisor = total_stride(MODES[mode])
    assert plan["architecture"]["arch_kwargs"]["strides"] == [list(stride) for stride in MODES[mode]]
    assert all(side % d == 0 for side, d in zip(plan["patch_size"], divisor, strict=True))
    assert all(side < s + d for side, s, d in zip(plan["patch_size"], shape, divisor, strict=True))
    assert plan["batch_size"] >= 2
    assert ("3d_lowres" in configurations) == (name == "large")
    assert plan["estimated_training_memory_gb"] <= 0.9 * 6  # a tenth stays free
    patches = candidate_patches(spacing, shape, divisor)
    larger = patches[: patches.index(tuple(plan["patch_size"]))]
    if larger:  # as large as the target allows
        assert measure_architecture(plan["architecture"], 1, 5, larger[-1], 2).total > 0.9 * 6 * GIB


def test_everything_except_the_network_is_as_nnunet_plans_it(empty_dataset):
    spacing, shape, cases, _ = CASES["anisotropic"]
    plans_file = empty_dataset(spacing, shape, cases)
    main(["plan", "-d", "Dataset042_Made"])
    ours = json.loads(plans_file.read_text())
    plan_experiment_dataset("Dataset042_Made")
    stock = json.loads(plans_file.with_name("nnUNetPlans.json").read_text())

    def without(plans, *names):
        return {key: value for key, value in plans.items() if key not in names}

    names = ("plans_name", "experiment_planner_used", "configurations")
    assert without(ours, *names) == without(stock, *names)
    assert ours["configurations"].keys() == stock["configurations"].keys()
    of_network = ("patch_size", "batch_size", "architecture", "estimated_training_memory_gb")
    for name, plan in ours["configurations"].items():
        changed = ("data_identifier", *(of_network if name.startswith("3d") else ()))
        assert without(plan, *changed) == without(stock["configurations"][name], *changed)


def test_a_larger_memory_target_gives_a_larger_patch(empty_dataset):
    spacing, shape, cases, _ = CASES["between"]
    plans_file = empty_dataset(spacing, shape, cases)
    voxels = []
    for target in (4, 12):
        options = ["-gpu_memory_target", str(target), "-overwrite_plans_name", f"Plans{target}", "--network", "FMUNet"]
        main(["plan", "-d", "42", *options])
        plans = json.loads(plans_file.with_name(f"Plans{target}.json").read_text())
        voxels.append(np.prod(plans["configurations"]["3d_fullres"]["patch_size"]))
    assert voxels[1] > 2 * voxels[0]


@pytest.mark.parametrize("network", NETWORKS)
def test_the_target_spacing_can_be_set_and_the_next_commands_are_printed(empty_dataset, capsys, network):
    name = f"{network}Plans"
    plans_file = empty_dataset((1.0, 1.0, 1.0), (40, 60, 60)).with_name(f"{name}.json")
    main(["plan", "-d", "42", "-overwrite_target_spacing", "4", "1", "1", *NETWORKS[network]])
    plans = PlansManager(str(plans_file))
    assert list(plans.get_configuration("3d_fullres").spacing) == [4.0, 1.0, 1.0]
    out = capsys.readouterr().out
    assert "resolution mode 2" in out
    assert f"  nnUNetv2_preprocess -d 42 -plans_name {name} -c 3d_fullres\n" in out
    assert f"  nnUNetv2_train 42 3d_fullres all -p {name} -tr VFPretrainTrainer" in out
    assert f"  nnUNetv2_train 42 3d_fullres 0 -p {name}" in out
    pretrained = f"$nnUNet_results/Dataset042_Made/VFPretrainTrainer__{name}__3d_fullres/fold_all/vf_pretrained.pth"
    assert f" -tr VFFinetuneTrainer -pretrained_weights {pretrained} " in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-d", "43"], "no dataset 43"),
        (["-d", "Dataset043_Other"], "no dataset Dataset043_Other"),
        (["-d", "other"], "'other' is not a dataset"),
        (["-d", "42", "-gpu_memory_target", "nan"], "-gpu_memory_target nan; legal: a positive number"),
        (["-d", "42", "-gpu_memory_target", "inf"], "-gpu_memory_target inf; legal: a positive number"),
        (["-d", "42", "-overwrite_target_spacing", "nan", "1", "1"], "three positive numbers"),
        (["-d", "42", "-gpu_memory_target", "0"], "-gpu_memory_target 0; legal: a positive number"),
        (["-d", "42", "-gpu_memory_target", "0.5"], "-gpu_memory_target 0.5 is too small.*use at least 1.. GB"),
        (["-d", "42", "-overwrite_target_spacing", "1", "0", "1"], "three positive numbers"),
        (["-d", "42", "--network", "FMUNet", "--like", "w.pth"], "--network and --like exclude each other"),
    ],
)
def test_errors_are_one_line_and_no_plans_are_written(empty_dataset, arguments, message):
    plans_file = empty_dataset((1.0, 1.0, 1.0), (40, 60, 60))
    with pytest.raises(SystemExit, match=f"^nnUNetv2_vf: error: .*{message}"):
        main(["plan", *arguments])
    assert not plans_file.exists()


def test_plans_with_which_a_network_was_trained_are_not_replaced_by_those_of_another(empty_dataset, tmp_path):
    plans_file = empty_dataset((1.0, 1.0, 1.0), (40, 60, 60))
    main(["plan", "-d", "42"])
    planned = json.loads(plans_file.read_text())
    folder = tmp_path / "results" / "Dataset042_Made" / "VFFinetuneTrainer__PCTNetPlans__3d_fullres"
    folder.mkdir(parents=True)
    (folder / "plans.json").write_text(json.dumps(planned))
    main(["plan", "-d", "42", "-gpu_memory_target", "12"])  # another patch; the network is the same

    planned["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]["features_per_stage"] = [8, 16, 32, 64, 128]
    (folder / "plans.json").write_text(json.dumps(planned))
    before = plans_file.read_text()
    with pytest.raises(SystemExit, match=r"has folds of another network.* -overwrite_plans_name PCTNetPlans2"):
        main(["plan", "-d", "42"])
    assert plans_file.read_text() == before
    folder.rename(folder.with_name("VFFinetuneTrainer__PCTNetPlans__own"))  # trained with a configuration of the user's
    for file in (plans_file, folder.with_name("VFFinetuneTrainer__PCTNetPlans__own") / "plans.json"):
        plans = json.loads(file.read_text())
        plans["configurations"]["own"] = {"inherits_from": "3d_fullres"}
        file.write_text(json.dumps(plans))
    with pytest.raises(SystemExit, match=r"has folds of another network"):
        main(["plan", "-d", "42"])
    main(["plan", "-d", "42", "-overwrite_plans_name", "PCTNetPlans2"])


def test_a_default_argument_that_is_written_out_makes_no_other_network(empty_dataset, tmp_path):
    plans_file = empty_dataset((1.0, 1.0, 1.0), (40, 60, 60))
    main(["plan", "-d", "42"])
    planned = json.loads(plans_file.read_text())
    arguments = planned["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
    assert "num_heads" not in arguments
    arguments |= {"num_heads": [4, 8, 16], "norm_op": "torch.nn.BatchNorm3d"}
    folder = tmp_path / "results" / "Dataset042_Made" / "VFFinetuneTrainer__PCTNetPlans__3d_fullres"
    folder.mkdir(parents=True)
    (folder / "plans.json").write_text(json.dumps(planned))
    main(["plan", "-d", "42"])


def test_a_missing_fingerprint_is_made(copied_dataset, monkeypatch):
    monkeypatch.delenv("nnUNet_n_proc_DA")  # a value for training
    fingerprint = copied_dataset / "dataset_fingerprint.json"
    before = json.loads(fingerprint.read_text())
    fingerprint.unlink()
    main(["plan", "-d", str(DATASET_ID), "-overwrite_plans_name", "New"])
    assert json.loads(fingerprint.read_text()) == before
    assert (copied_dataset / "New.json").is_file()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--like", "nowhere.pth"],
        ["-gpu_memory_target", "-1"],
        ["-overwrite_target_spacing", "0", "1", "1"],
        ["-overwrite_plans_name", "../x"],
        ["-overwrite_plans_name", "My Plans"],
        ["-overwrite_plans_name", "My.json"],
    ],
)
def test_no_fingerprint_is_made_for_options_that_are_not_legal(copied_dataset, monkeypatch, arguments):
    monkeypatch.delenv("nnUNet_n_proc_DA")  # a value for training
    (copied_dataset / "dataset_fingerprint.json").unlink()
    with pytest.raises(SystemExit, match=r"^nnUNetv2_vf: error: .*(legal|no file|three positive)"):
        main(["plan", "-d", str(DATASET_ID), *arguments])
    assert not (copied_dataset / "dataset_fingerprint.json").exists()


def test_planning_by_python_names_the_command_that_makes_a_fingerprint(empty_dataset):
    empty_dataset((1.0, 1.0, 1.0), (40, 60, 60), fingerprint=False)
    with pytest.raises(UserError, match="nnUNetv2_extract_fingerprint -d 42"):
        list(plan_network(["42"], PCTNetPlanner))


@pytest.mark.parametrize("content", ["", '{"spacings": [[1.0', "{}", "[]"])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("New.json", r"New.json is damaged; remove it, then plan again: rm "),
        ("dataset_fingerprint.json", r"is damaged; make it again: nnUNetv2_extract_fingerprint -d \d+ --clean"),
        ("dataset.json", r"dataset.json has missing or wrong entries: "),
    ],
)
def test_a_damaged_file_is_named_with_the_command_that_mends_it(
    copied_dataset, tmp_path, monkeypatch, name, message, content
):
    monkeypatch.delenv("nnUNet_n_proc_DA")  # a value for training
    folder = copied_dataset
    if name == "dataset.json":
        monkeypatch.setenv("nnUNet_raw", str(tmp_path / "raw"))
        folder = tmp_path / "raw" / copied_dataset.name
        folder.mkdir(parents=True)
    (folder / name).write_text(content)
    with pytest.raises(SystemExit, match=rf"^nnUNetv2_vf: error: .*{message}"):
        main(["plan", "-d", str(DATASET_ID), "-overwrite_plans_name", "New"])


def test_plans_that_preprocess_otherwise_say_that_preprocessed_cases_are_old(copied_dataset, monkeypatch, capsys):
    monkeypatch.delenv("nnUNet_n_proc_DA")  # a value for training
    command = ["plan", "-d", str(DATASET_ID), "--network", "FMUNet", "-overwrite_plans_name", "New"]
    command += ["-overwrite_target_spacing", "2", "2"]
    main([*command, "2"])
    (copied_dataset / "New_3d_fullres").mkdir()
    (copied_dataset / "New_3d_fullres" / "case.b2nd").touch()
    main([*command, "2"])
    message = "New_3d_fullres holds cases that were preprocessed with the old plans of this name: preprocess again"
    assert message not in capsys.readouterr().out
    main([*command, "3"])
    assert message in capsys.readouterr().out


def test_missing_plans_name_the_command_that_makes_them(empty_dataset):
    empty_dataset((1.0, 1.0, 1.0), (40, 60, 60))
    with pytest.raises(SystemExit, match=r"no plans .*FMUNetPlans.json.*nnUNetv2_vf plan -d 42 --network FMUNet"):
        main(["preprocess", "-d", "42", "-plans_name", "FMUNetPlans", "-c", "3d_fullres"])


def test_two_dimensional_images_get_only_nnunets_2d_plan(empty_dataset, capsys):
    empty_dataset((999.0, 1.0, 1.0), (1, 256, 256))
    main(["plan", "-d", "42"])
    assert "only the configuration 2d" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("spacing", "mode"),
    [
        ((1, 1, 1), 0),
        ((1.9, 1, 1), 0),
        ((2, 1, 1), 1),
        ((3.9, 1, 1), 1),
        ((4, 1, 1), 2),
        ((9, 1, 2), 2),
        ((2.5, 1.5, 1), 0),
        ((1, 3, 1), 0),
    ],
)
def test_the_resolution_mode_follows_from_the_anisotropy(spacing, mode):
    assert resolution_mode(spacing) == mode


def test_candidate_patches_shrink_along_the_axis_that_covers_most_of_the_median_shape():
    divisor = (4, 16, 16)
    patches = candidate_patches((5.0, 1.0, 1.0), (40, 200, 300), divisor)
    assert patches[-1] == (8, 32, 32)
    for larger, smaller in itertools.pairwise(patches):
        steps = np.subtract(larger, smaller)
        axis = int(np.argmax(np.divide(larger, (40, 200, 300)) * (np.array(larger) > (8, 32, 32))))
        assert steps.tolist() == [divisor[i] if i == axis else 0 for i in range(3)]
