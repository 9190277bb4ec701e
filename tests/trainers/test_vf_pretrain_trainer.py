"""VFPretrainTrainer through nnU-Net's own entry points, on tiny phantoms."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DATASET_ID, NUM_CASES, edit_json, fold_folder, pretrain, shrink_network
from nnunetv2.experiment_planning.plan_and_preprocess_api import plan_experiments
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.run.run_training import get_trainer_from_args, run_training
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2, nnUNetDatasetNumpy
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from trainings import make_trainer, run_before_step, run_until_signal, sender_of

from nnunetv2_vf.pretext.dataset import TRAINING
from nnunetv2_vf.pretext.loader import collate
from nnunetv2_vf.training.checkpoints import STATE
from nnunetv2_vf.training.ranks import Ranks
from nnunetv2_vf.training.step import Precision
from nnunetv2_vf.transfer.artifact import ARTIFACT_NAME, read_artifact

CPU = torch.device("cpu")


# ---------------------------------------------------------------- a whole run


@pytest.fixture(scope="module")
def finished(nnunet, tmp_path_factory) -> Path:
    """Return the fold folder of one finished pretraining; tests only read it."""
    results = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("nnUNet_results", str(results))
        patch.setenv("nnUNet_n_proc_DA", "0")
        for name, value in {"num_epochs": 3, "iterations_per_epoch": 2, "val_iterations_per_epoch": 2}.items():
            patch.setenv(f"nnUNet_vf_{name}", str(value))
        pretrain()
    return fold_folder(results)


def test_a_training_writes_artifact_checkpoints_report_and_pictures(finished):
    names = {path.name for path in finished.iterdir()}
    expected = {"checkpoint_best.pth", "checkpoint_final.pth", ARTIFACT_NAME, "preview.png", "progress.png"}
    assert expected | {"pretext_report.json", "pretext_report.png"} <= names
    assert not any(name.endswith(".part") for name in names)


def test_the_report_counts_every_voxel_of_the_fixed_samples(finished):
    report = json.loads((finished / "pretext_report.json").read_text())
    confusion = np.array(report["confusion_rows_are_the_truth"])
    assert confusion.shape == (5, 5)
    assert report["samples"] == 4
    assert confusion.sum() == 4 * 16 * 16 * 24
    dice = 2 * confusion.diagonal() / (confusion.sum(0) + confusion.sum(1))
    np.testing.assert_allclose(list(report["dice_per_class"].values()), dice)
    assert report["mean_dice"] == pytest.approx(dice.mean())


def test_the_log_has_the_settings_and_the_dice_of_every_fusion_class(finished):
    log = next(finished.glob("training_log*.txt")).read_text()
    assert "num_epochs: 3" in log
    assert "fusion_map: boxes" in log
    checkpoint = torch.load(finished / "checkpoint_final.pth", weights_only=False)
    dice = checkpoint["logging"]["dice_per_class_or_region"]
    assert [len(epoch) for epoch in dice] == [5, 5, 5]


def test_the_artifact_rebuilds_the_network_and_records_its_origin(finished):
    artifact = read_artifact(finished / ARTIFACT_NAME)
    vf = artifact["vf"]
    architecture = vf["architecture"]
    network = get_network_from_plans(
        architecture["network_class_name"],
        architecture["arch_kwargs"],
        architecture["_kw_requires_import"],
        vf["num_input_channels"],
        vf["num_classes"],
        deep_supervision=True,
    )
    network.load_state_dict(artifact["network_weights"])
    assert vf["num_classes"] == 5
    assert vf["settings"]["num_epochs"] == 3
    assert vf["plans"]["volume_fusion"] == vf["settings"]
    assert vf["channel_names"] == {"0": "CT"}
    assert vf["normalization_schemes"] == ["CTNormalization"]
    assert len(vf["spacing"]) == 3
    assert (vf["fold"], vf["num_cases"]) == (0, NUM_CASES * 4 // 5)
    assert len(vf["pretext_dice_per_class"]) == 5
    assert set(vf["versions"]) == {"nnunetv2", "torch", "nnunetv2_vf"}
    assert all(tensor.device == CPU for tensor in artifact["network_weights"].values())


@pytest.mark.parametrize("file", [ARTIFACT_NAME, "checkpoint_final.pth"])
def test_stock_pretrained_weights_transfer_everything_but_the_heads(finished, two_epochs, file):
    trainer = get_trainer_from_args(str(DATASET_ID), "3d_fullres", 0, "nnUNetTrainer", device=CPU)
    trainer.initialize()
    before = {name: tensor.clone() for name, tensor in trainer.network.state_dict().items()}
    load_pretrained_weights(trainer.network, str(finished / file))
    pretrained = torch.load(finished / file, weights_only=False)["network_weights"]
    for name, tensor in trainer.network.state_dict().items():
        assert torch.equal(tensor, before[name] if ".seg_layers." in name else pretrained[name]), name


def test_val_repeats_the_report_of_the_finished_training(two_epochs, folder, monkeypatch):
    monkeypatch.setenv("nnUNet_vf_batch_per_gpu", "3")  # the plans have another batch
    pretrain()
    for name in ("num_epochs", "iterations_per_epoch", "val_iterations_per_epoch", "batch_per_gpu"):
        monkeypatch.delenv(f"nnUNet_vf_{name}")  # --val takes the settings of the checkpoint
    report = (folder / "pretext_report.json").read_text()
    (folder / "pretext_report.json").unlink()
    pretrain(only_run_validation=True)
    assert (folder / "pretext_report.json").read_text() == report
    pretrain(only_run_validation=True, val_with_best=True)
    assert (folder / "pretext_report.json").is_file()


# ---------------------------------------------------------------- the pretext task inside nnU-Net's training


def test_the_network_predicts_fusion_classes_for_any_labels(copied_dataset, monkeypatch):
    def regions_and_ignore(dataset_json):
        dataset_json["labels"] = {"background": 0, "organs": [1, 2, 3], "heart": [2, 3], "ignore": 4}
        dataset_json["regions_class_order"] = [1, 2]

    edit_json(copied_dataset / "dataset.json", regions_and_ignore)
    monkeypatch.setenv("nnUNet_vf_coefficient_steps", "3")
    trainer = make_trainer()
    trainer.initialize()
    assert trainer.label_manager.num_segmentation_heads == 4
    assert not trainer.label_manager.has_regions
    assert not trainer.label_manager.has_ignore_label
    assert trainer.network(torch.zeros(1, 1, 16, 16, 24))[0].shape[1] == 4
    stored = json.loads((copied_dataset / "dataset.json").read_text())
    assert stored["labels"]["ignore"] == 4, "the dataset itself is not changed"


def test_several_channels_share_one_map(copied_dataset, folder):
    edit_json(copied_dataset / "dataset.json", lambda d: d.update(channel_names={"0": "CT", "1": "PET", "2": "T1"}))
    for case in range(NUM_CASES):
        replace_image(copied_dataset, f"torso_{case:04d}", lambda data: np.concatenate([data, -data, data**2]))
    pretrain()
    vf = read_artifact(folder / ARTIFACT_NAME)["vf"]
    assert vf["num_input_channels"] == 3


def test_the_validation_loss_is_computed_under_autocast(two_epochs, monkeypatch):
    """Outside it, the half-precision cross-entropy of a CUDA training overflows."""
    trainer = make_trainer()
    trainer.initialize()
    trainer.precision = Precision("bf16", "cpu")
    loss, under_autocast = trainer.loss, []

    def spy(*args):
        under_autocast.append(torch.is_autocast_enabled("cpu"))
        return loss(*args)

    trainer.loss = spy
    _, validation = trainer.get_dataloaders()
    with torch.no_grad():
        trainer.validation_step(next(validation))
    assert under_autocast == [True]


@pytest.mark.parametrize(("batch", "ranks"), [(2, 2), (5, 2), (5, 3), (7, 4)])
def test_ranks_share_every_batch_as_nnunet_splits_it(copied_dataset, monkeypatch, batch, ranks):
    def enlarge(plans):
        plans["configurations"]["3d_fullres"]["batch_size"] = batch

    edit_json(copied_dataset / "nnUNetPlans.json", enlarge)
    trainer = make_trainer()
    trainer.is_ddp = True
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: ranks)  # nnU-Net asks these
    indices = []
    for rank in range(ranks):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        trainer.ranks = Ranks(rank, ranks)
        trainer._set_batch_size_and_oversample()
        indices += [i for step in trainer._share.batches(range(1, 3)) for i in step]
    assert sorted(indices) == list(range(batch, 3 * batch))


def test_class_0_counts_in_the_loss(two_epochs):
    trainer = make_trainer()
    trainer.initialize()
    assert trainer.loss.loss.dc.do_bg


def test_there_is_a_fusion_map_for_every_output_of_the_network(two_epochs):
    trainer = make_trainer()
    trainer.initialize()
    train, _ = trainer.get_dataloaders()
    batch = next(train)
    pretext = trainer._make_batch(batch)
    targets, outputs = trainer._targets(pretext.fusion_map), trainer.network(pretext.data)
    assert pretext.data.shape == (2, 1, 16, 16, 24)
    assert [t.shape[2:] for t in targets] == [o.shape[2:] for o in outputs]
    assert torch.equal(targets[0][:, 0], batch["tensors"]["fusion_map"])


def test_validation_samples_are_the_same_in_every_epoch_and_run(two_epochs, monkeypatch):
    def fixed_samples() -> list[dict]:
        trainer = make_trainer()
        trainer.initialize()
        _, validation = trainer.get_dataloaders()
        return [batch["tensors"] for batch in validation]

    samples = fixed_samples()
    monkeypatch.setenv("nnUNet_vf_seed", "8")
    other_run = fixed_samples()
    assert len(samples) == 4  # 2 epochs x 2 steps
    for batch, other in ((samples[0], samples[2]), (samples[1], samples[3]), (samples[0], other_run[0])):
        assert all(torch.equal(batch[name], other[name]) for name in batch)
    assert not torch.equal(samples[0]["foreground"], samples[1]["foreground"])


def test_the_network_learns_the_pretext_task(two_epochs, monkeypatch):
    for name, value in {"num_epochs": 2, "iterations_per_epoch": 20, "initial_lr": 0.01}.items():
        monkeypatch.setenv(f"nnUNet_vf_{name}", str(value))
    trainer = make_trainer()
    trainer.run_training()
    losses = trainer.logger.get_value("train_losses", step=None)
    assert losses[-1] < losses[0]


def test_with_another_number_of_ranks_the_samples_go_on_where_they_stopped(two_epochs, folder, monkeypatch):
    monkeypatch.setenv("nnUNet_vf_batch_per_gpu", "2")
    trainer = make_trainer()
    run_before_step(trainer, 3, sender_of(signal.SIGTERM))  # two steps of training and one of validation are complete
    assert run_until_signal(trainer)
    file = folder / "checkpoint_latest.pth"
    checkpoint = torch.load(file, weights_only=False)
    assert checkpoint[STATE]["batch"] == 2
    checkpoint[STATE]["batch"] = 6  # as if three ranks had trained
    torch.save(checkpoint, file)
    resumed = make_trainer(continue_training=True)
    batch = next(resumed.get_dataloaders()[0])
    samples = resumed._samples(TRAINING)
    expected = collate([samples[12], samples[13]])
    assert batch["cases"] == expected["cases"]
    assert torch.equal(batch["tensors"]["foreground"], expected["tensors"]["foreground"])
    log = "".join(path.read_text() for path in folder.glob("training_log*.txt"))
    assert "WARNING: the batch has 2 samples, before it had 6" in log
    resumed.run_training()
    final = torch.load(folder / "checkpoint_final.pth", weights_only=False)
    assert final[STATE]["extra_samples"] == 2 * (6 - 2)
    assert read_artifact(folder / ARTIFACT_NAME)["vf"]["batch_size"] == 2


def test_cases_are_unpacked_before_workers_read_them(two_epochs, copied_dataset):
    folder = copied_dataset / "nnUNetPlans_3d_fullres"
    compressed = nnUNetDatasetBlosc2(str(folder))
    for case in compressed.identifiers:
        image, labels, _, properties = compressed.load_case(case)
        nnUNetDatasetNumpy.save_case(np.asarray(image[:]), np.asarray(labels[:]), properties, str(folder / case))
    for file in folder.glob("*.b2nd"):
        file.unlink()
    trainer = make_trainer()
    trainer.initialize()
    trainer.get_dataloaders()
    assert {f"{case}.npy" for case in compressed.identifiers} <= {file.name for file in folder.iterdir()}


@pytest.mark.parametrize(
    ("workers", "pretext"),
    [
        pytest.param(0, "fusion", marks=pytest.mark.slow),
        (2, "fusion"),
        pytest.param(0, "masked", marks=pytest.mark.slow),
        (0, "fusion+masked"),
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one(two_epochs, tmp_path, monkeypatch, workers, pretext):
    monkeypatch.setenv("nnUNet_n_proc_DA", str(workers))
    monkeypatch.setenv("nnUNet_vf_pretext", pretext)
    monkeypatch.setenv("nnUNet_vf_mask_side", "4")
    monkeypatch.setenv("nnUNet_vf_num_epochs", "3")
    monkeypatch.setenv("nnUNet_vf_save_every", "2")

    def run(results: str, stop_after: int | None) -> Path:
        monkeypatch.setenv("nnUNet_results", str(tmp_path / results))
        torch.manual_seed(0)  # the same first weights
        trainer = make_trainer()
        if stop_after is not None:
            monkeypatch.setattr(trainer, "on_epoch_start", stopping(trainer, stop_after))
            with pytest.raises(KeyboardInterrupt):
                trainer.run_training()
            trainer = make_trainer(continue_training=True)
            assert trainer.current_epoch == stop_after
        trainer.run_training()
        return fold_folder(tmp_path / results)

    uninterrupted, resumed = (torch.load(run(*args) / "checkpoint_final.pth", weights_only=False)
                      for args in (("uninterrupted", None), ("resumed", 2)))  # fmt: skip
    for name, tensor in uninterrupted["network_weights"].items():
        assert torch.equal(tensor, resumed["network_weights"][name]), name
    for key in ("train_losses", "val_losses", "dice_per_class_or_region", "ema_fg_dice", "lrs"):
        np.testing.assert_array_equal(uninterrupted["logging"][key], resumed["logging"][key], err_msg=key)
    assert uninterrupted["_best_ema"] == resumed["_best_ema"]


def stopping(trainer, epoch: int):
    original = trainer.on_epoch_start

    def on_epoch_start() -> None:
        if trainer.current_epoch == epoch:
            raise KeyboardInterrupt
        original()

    return on_epoch_start


# ---------------------------------------------------------------- flags, folds, plans


def test_fold_all_and_disabled_checkpointing(two_epochs, tmp_path):
    pretrain("all", disable_checkpointing=True)
    names = {path.name for path in fold_folder(tmp_path / "results", "all").iterdir()}
    assert not {name for name in names if name.endswith(".pth")}
    assert "pretext_report.json" in names


@pytest.mark.parametrize("settings", [{"fusion_map": "blocks", "pairing": "different"}, {"optimizer": "sgd"}])
def test_other_fusion_maps_pairings_and_optimizers_train(two_epochs, folder, monkeypatch, settings):
    monkeypatch.setenv("nnUNet_vf_val_iterations_per_epoch", "10")  # enough for every class to occur
    for name, value in settings.items():
        monkeypatch.setenv(f"nnUNet_vf_{name}", value)
    pretrain()
    vf = read_artifact(folder / ARTIFACT_NAME)["vf"]
    assert settings.items() <= vf["settings"].items()


@pytest.mark.parametrize(
    "planner",
    [
        "nnUNetPlannerResEncM",
        pytest.param("nnUNetPlannerResEncL", marks=pytest.mark.slow),
        pytest.param("nnUNetPlannerResEncXL", marks=pytest.mark.slow),
    ],
)
def test_residual_encoder_plans_train(copied_dataset, planner, monkeypatch):
    monkeypatch.setenv("nnUNet_n_proc_DA", "1")  # the planner sets as many threads
    monkeypatch.setenv("nnUNet_vf_pretext", "fusion+masked")
    monkeypatch.setenv("nnUNet_vf_mask_side", "4")
    plans_name = plan_experiments([DATASET_ID], planner)
    plans_file = copied_dataset / f"{plans_name}.json"
    shrink_network(plans_file)
    edit_json(
        plans_file, lambda plans: plans["configurations"]["3d_fullres"].update(data_identifier="nnUNetPlans_3d_fullres")
    )
    run_training(str(DATASET_ID), "3d_fullres", 0, "VFPretrainTrainer", plans_name, device=CPU)


def test_settings_are_read_from_the_plans(copied_dataset):
    edit_json(copied_dataset / "nnUNetPlans.json", lambda plans: plans.update(volume_fusion={"seed": 11}))
    assert make_trainer().settings.seed == 11


# ---------------------------------------------------------------- unusable volumes


def fill_with(dataset: Path, case: str, value: float) -> None:
    replace_image(dataset, case, lambda data: np.full_like(data, value))


def replace_image(dataset: Path, case: str, change) -> None:
    folder = dataset / "nnUNetPlans_3d_fullres"
    data, seg, _, properties = nnUNetDatasetBlosc2(str(folder)).load_case(case)
    data, seg = change(data[:]), seg[:]
    for path in folder.glob(f"{case}*.b2nd"):
        path.unlink()
    nnUNetDatasetBlosc2.save_case(data, seg, properties, str(folder / case), (1, 8, 8, 8), (1, 8, 8, 8))


def test_nan_and_constant_volumes_are_skipped_and_reported_once(copied_dataset, folder, monkeypatch):
    monkeypatch.setenv("nnUNet_vf_iterations_per_epoch", "12")
    monkeypatch.setenv("nnUNet_vf_quarantine_limit", "0.2")
    fill_with(copied_dataset, "torso_0000", np.nan)
    fill_with(copied_dataset, "torso_0001", 0.0)
    pretrain("all")
    folder = folder.parent / "fold_all"
    log = next(folder.glob("training_log*.txt")).read_text()
    for case in ("torso_0000", "torso_0001"):
        assert log.count(f"case {case} has no image content: all voxels are equal, NaN or infinite; quarantined") == 1
    losses = torch.load(folder / "checkpoint_final.pth", weights_only=False)["logging"]["train_losses"]
    assert np.isfinite(losses).all()


def test_a_dataset_without_any_usable_volume_stops_with_one_line(copied_dataset, tmp_path, monkeypatch):
    monkeypatch.setenv("nnUNet_vf_quarantine_limit", "1")
    for case in range(NUM_CASES):
        fill_with(copied_dataset, f"torso_{case:04d}", 1.0)
    with pytest.raises(SystemExit, match="no usable sub-volume"):
        pretrain("all")
    suffixes = {path.suffix for path in (tmp_path / "results").rglob("fold_all/*")}
    assert suffixes <= {".txt", ".json"}, "only logs are written, no weights"


# ---------------------------------------------------------------- --c


def test_continuing_with_other_settings_is_refused_with_names_and_values(two_epochs, folder, monkeypatch):
    pretrain()
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*.pth")}
    monkeypatch.setenv("nnUNet_vf_num_epochs", "5")
    monkeypatch.setenv("nnUNet_vf_gamma", "1,1")
    with pytest.raises(SystemExit) as exit_info:
        pretrain(continue_training=True)
    message = exit_info.value.code
    assert "num_epochs = 5 (recorded: 2)" in message
    assert "gamma = [1.0, 1.0] (recorded: [0.7, 1.5])" in message
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*.pth")} == before


def test_continuing_from_a_file_that_is_not_a_checkpoint_is_refused(two_epochs, folder):
    pretrain()
    torch.save({"weights": 1}, folder / "checkpoint_final.pth")
    with pytest.raises(SystemExit, match="is damaged or not an nnU-Net checkpoint"):
        pretrain(continue_training=True)


def test_continuing_with_other_plans_is_refused(copied_dataset, folder):
    pretrain()

    def enlarge(plans):
        plans["configurations"]["3d_fullres"]["batch_size"] = 3

    edit_json(copied_dataset / "nnUNetPlans.json", enlarge)
    with pytest.raises(SystemExit, match=r"with other plans \(different: batch_size\)"):
        pretrain(continue_training=True)


def test_the_checkpoint_of_another_trainer_is_refused(two_epochs, folder):
    pretrain()
    checkpoint = torch.load(folder / "checkpoint_final.pth", weights_only=False)
    torch.save({**checkpoint, "trainer_name": "nnUNetTrainer"}, folder / "checkpoint_final.pth")
    with pytest.raises(SystemExit, match="written by nnUNetTrainer, not by VFPretrainTrainer"):
        pretrain(continue_training=True)
