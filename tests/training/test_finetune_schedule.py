"""Schedules of fine-tuning: learning rates, what is trained, and going on in the middle."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DATASET, DATASET_ID, PLANS_OF_NETWORKS
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.run.run_training import get_trainer_from_args, run_training
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from torch import nn
from trainings import assert_same_training, before_step, leaves_early, make_trainer, send

from nnunetv2_vf.errors import UserError
from nnunetv2_vf.network_parts import HEADS, part_of
from nnunetv2_vf.settings import FinetuneSettings
from nnunetv2_vf.training.finetune_schedule import (
    FinetuneLRScheduler,
    decoder_only_epochs,
    parameter_groups,
    reinitialized_parameters,
    relative_learning_rate,
)
from nnunetv2_vf.transfer.artifact import read_artifact

CPU = torch.device("cpu")
SCHEDULES = ("full", "sawtooth", "encoder_only", "frozen_encoder")
PARTS = ("heads", "decoder", "encoder")


class Tiny(nn.Module):
    """Named like nnU-Net's networks: two stages down, one up, a head."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.ModuleDict({"stages": nn.ModuleList(nn.Sequential(nn.Linear(1, 1)) for _ in range(2))})
        self.decoder = nn.ModuleDict({"encoder": self.encoder})
        self.decoder["stages"] = nn.ModuleList([nn.Sequential(nn.Linear(1, 1))])
        self.decoder["seg_layers"] = nn.ModuleList([nn.Linear(1, 1)])


def rates(part: str, **settings) -> list[float]:
    chosen = FinetuneSettings(**settings)
    return [relative_learning_rate(chosen, part, epoch) for epoch in range(chosen.num_epochs)]


# ---------------------------------------------------------------- learning rates


def test_full_without_warmup_is_nnunets_schedule():
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
    theirs = PolyLRScheduler(optimizer, 1.0, 20)
    for epoch in range(20):
        theirs.step(epoch)
        assert rates("encoder", num_epochs=20)[epoch] == pytest.approx(theirs.get_last_lr()[0])


@pytest.mark.parametrize("decay", ["poly", "cosine"])
def test_full_rises_to_its_highest_and_then_decays(decay):
    for part in PARTS:
        values = rates(part, num_epochs=20, warmup_fraction=0.2, decay=decay)
        assert values[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
        assert values[4:] == sorted(values[4:], reverse=True)
        assert 0 < values[-1] < 0.1


def test_cosine_is_half_way_down_in_the_middle():
    assert rates("heads", num_epochs=10, decay="cosine")[5] == pytest.approx(0.5)


def test_sawtooth_ramps_decoder_and_heads_first():
    settings = {"num_epochs": 20, "schedule": "sawtooth", "decoder_fraction": 0.2, "warmup_fraction": 0.1}
    ramp, rise = [0.25, 0.5, 0.75, 1.0], [1 / 3, 2 / 3, 1.0]
    for part in ("heads", "decoder"):
        assert rates(part, **settings)[:7] == pytest.approx([*ramp, *rise])
    assert rates("encoder", **settings)[:7] == pytest.approx([0, 0, 0, 0, *rise])
    assert rates("encoder", **settings)[4:] == rates("heads", **settings)[4:]


def test_a_frozen_encoder_has_no_learning_rate():
    settings = {"num_epochs": 20, "schedule": "frozen_encoder", "warmup_fraction": 0.2}
    assert set(rates("encoder", **settings)) == {0.0}
    assert rates("decoder", **settings) == rates("decoder", **{**settings, "schedule": "full"})


@pytest.mark.parametrize("epochs", [1, 2, 3, 10])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_of_any_length_train(epochs, schedule):
    for alone, warmup in ((0.0, 0.0), (0.1, 0.1), (0.45, 0.45), (0.9, 0.0), (0.0, 0.9)):
        settings = {"schedule": schedule, "decoder_fraction": alone, "warmup_fraction": warmup}
        assert all(0 < value <= 1 for value in rates("heads", num_epochs=epochs, **settings))
        if schedule != "frozen_encoder":
            assert 0 < rates("encoder", num_epochs=epochs, **settings)[-1] <= 1


# ---------------------------------------------------------------- groups of parameters


def test_every_parameter_is_in_one_group_and_the_heads_come_first():
    network = Tiny()
    groups = parameter_groups(network, FinetuneSettings())
    assert [group["part"] for group in groups] == ["heads", "decoder", "encoder"]
    assert [group["share"] for group in groups] == [1, 1, 1]
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in network.parameters())


def test_layer_wise_decay_halves_from_stage_to_stage():
    groups = parameter_groups(Tiny(), FinetuneSettings(layer_decay=0.5))
    assert [(group["part"], group["share"]) for group in groups] == [
        ("heads", 1), ("decoder", 0.5), ("encoder", 0.25), ("encoder", 0.125)
    ]  # fmt: skip


@pytest.mark.parametrize("network", PLANS_OF_NETWORKS)
def test_layer_wise_decay_goes_from_stage_to_stage_of_real_networks(artifacts, tiny, monkeypatch, network):
    trainer = trainer_of(PLANS_OF_NETWORKS[network], artifacts[network], monkeypatch)
    stages = len(trainer.configuration_manager.network_arch_init_kwargs["features_per_stage"])
    groups = parameter_groups(trainer.bare_network(), FinetuneSettings(layer_decay=0.5))
    shares = {part: {g["share"] for g in groups if g["part"] == part} for part in PARTS}
    assert shares["heads"] == {1.0}
    assert shares["decoder"] == {0.5**distance for distance in range(1, stages)}
    assert shares["encoder"] == {0.5**distance for distance in range(stages, 2 * stages)}


def test_the_rate_is_a_function_of_the_epoch_alone_and_what_has_none_takes_no_gradient():
    network = Tiny()
    settings = FinetuneSettings(num_epochs=10, schedule="sawtooth", decoder_fraction=0.3, layer_decay=0.5)
    optimizer = torch.optim.SGD(parameter_groups(network, settings), lr=1.0)
    schedule = FinetuneLRScheduler(optimizer, settings)
    for epoch in (0, 7, 2, 3):
        schedule.step(epoch)
        schedule.freeze_parts_without_rate()
        for group, lr in zip(optimizer.param_groups, schedule.get_last_lr(), strict=True):
            assert (
                lr
                == group["lr"]
                == settings.initial_lr * group["share"] * relative_learning_rate(settings, group["part"], epoch)
            )
        assert all(p.requires_grad == (epoch >= 3) for p in network.encoder.parameters())
        assert all(p.requires_grad for p in network.decoder["seg_layers"].parameters())


def test_what_a_network_keeps_fixed_itself_stays_so():
    network = Tiny()
    network.encoder["stages"][0].requires_grad_(False)
    groups = parameter_groups(network, FinetuneSettings())
    assert sum(len(group["params"]) for group in groups) == 6


def test_parts_of_the_epochs_are_rounded_up_but_for_the_last_digit_of_a_float():
    settings = {"schedule": "sawtooth", "num_epochs": 100}
    assert decoder_only_epochs(FinetuneSettings(decoder_fraction=0.07, **settings)) == 7
    assert decoder_only_epochs(FinetuneSettings(decoder_fraction=0.071, **settings)) == 8


def test_a_network_without_encoder_is_trained_as_a_whole_or_refused():
    network = nn.Sequential(nn.Linear(1, 1))
    (group,) = parameter_groups(network, FinetuneSettings())
    assert group["part"] == "decoder"
    for settings in ({"schedule": "sawtooth"}, {"fresh_decoder_stages": 1}, {"layer_decay": 0.9}):
        with pytest.raises(UserError, match="needs a network with an encoder, which Sequential does not name so"):
            parameter_groups(network, FinetuneSettings(**settings))


# ---------------------------------------------------------------- trainings


@pytest.fixture
def schedule_of(tiny, monkeypatch):
    """Sets the settings of a schedule of 4 epochs, with a first phase of 2 where there is one."""

    def choose(schedule: str, **settings) -> None:
        values = {"schedule": schedule, "num_epochs": 4, "decoder_fraction": 0.5, "warmup_fraction": 0.25, **settings}
        for name, value in values.items():
            monkeypatch.setenv(f"nnUNet_vf_finetune_{name}", str(value))

    return choose


def trainer_of(plans: str, weights: Path | None = None, monkeypatch=None, go_on: bool = False):
    """What nnUNetv2_train makes of its arguments."""
    if weights is not None:
        monkeypatch.setattr("sys.argv", ["nnUNetv2_train", "-pretrained_weights", str(weights)])
    trainer = get_trainer_from_args(str(DATASET_ID), "3d_fullres", 0, "VFFinetuneTrainer", plans, device=CPU)
    if weights is not None:
        trainer.initialize()
        load_pretrained_weights(trainer.network, str(weights))
    return trainer


def weights_by_part(network: nn.Module) -> dict[str, dict[str, torch.Tensor]]:
    found: dict[str, dict[str, torch.Tensor]] = {part: {} for part in PARTS}
    for name, parameter in network.named_parameters():
        found[part_of(name)][name] = parameter.detach().clone()
    return found


def moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> bool:
    return any((before[name] != after[name]).any() for name in before)


_RISE_AND_DECAY = [0.5, 1.0, (2 / 3) ** 0.9, (1 / 3) ** 0.9]  # one epoch of warm-up, then nnU-Net's decay over three
_TEETH = [0.5, 1.0, 0.5, 1.0]
RATES = {  # of the four epochs of schedule_of, by part, as shares of the highest
    "full": dict.fromkeys(PARTS, _RISE_AND_DECAY),
    "encoder_only": dict.fromkeys(PARTS, _RISE_AND_DECAY),
    "frozen_encoder": {**dict.fromkeys(PARTS, _RISE_AND_DECAY), "encoder": [0.0] * 4},
    "sawtooth": {**dict.fromkeys(PARTS, _TEETH), "encoder": [0.0, 0.0, 0.5, 1.0]},
}


@pytest.mark.parametrize("network", PLANS_OF_NETWORKS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_which_parameters_move_in_each_epoch_and_how_fast(artifacts, schedule_of, monkeypatch, schedule, network):
    schedule_of(schedule)
    trainer = trainer_of(PLANS_OF_NETWORKS[network], artifacts[network], monkeypatch)
    trainer.on_train_start()
    for epoch in range(4):
        before = weights_by_part(trainer.network)
        trainer.on_epoch_start()
        trainer.on_train_epoch_start()
        rates_of_groups = {g["part"]: g["lr"] / trainer.initial_lr for g in trainer.optimizer.param_groups}
        assert rates_of_groups == pytest.approx({part: RATES[schedule][part][epoch] for part in PARTS})
        losses = [trainer.train_step(next(trainer.dataloader_train)) for _ in range(2)]
        trainer.on_train_epoch_end(losses)
        trainer.current_epoch += 1
        after = weights_by_part(trainer.network)
        expected = {"heads": True, "decoder": True, "encoder": True}
        if schedule == "frozen_encoder" or (schedule == "sawtooth" and epoch < 2):
            expected["encoder"] = False
        assert {part: moved(before[part], after[part]) for part in PARTS} == expected, epoch
    trainer.on_train_end()


@pytest.mark.parametrize("norms", ["fresh", "pretrained"])
@pytest.mark.parametrize("network", ["U-Net", "PCT-Net"])
def test_encoder_only_takes_nothing_else_and_the_rest_is_that_of_the_baseline(
    artifacts, schedule_of, monkeypatch, network, norms
):
    plans, pretrained = PLANS_OF_NETWORKS[network], read_artifact(artifacts[network])["network_weights"]
    scratch = trainer_of(plans)
    scratch.initialize()
    starts = {}
    for schedule in ("encoder_only", "full"):
        schedule_of(schedule, kernel_norms=norms)
        trainer = trainer_of(plans, artifacts[network], monkeypatch)
        trainer.on_train_start()
        starts[schedule] = trainer.network.state_dict()
        log = Path(trainer.log_file).read_text()
        assert f"Schedule {schedule}: all of the network is trained" in log
        trainer.on_train_end()
    for name, fresh in scratch.network.state_dict().items():
        full, encoder_only = starts["full"][name], starts["encoder_only"][name]
        torch.testing.assert_close(encoder_only, full if "encoder." in name else fresh, rtol=0, atol=0)
        if ".seg_layers." in name:
            torch.testing.assert_close(full, fresh, rtol=0, atol=0)
        else:
            torch.testing.assert_close(direction(full), direction(pretrained[name]))
        if norms == "pretrained" and "encoder." in name:
            torch.testing.assert_close(full, pretrained[name], rtol=0, atol=0)


@pytest.mark.parametrize("norms", ["fresh", "pretrained"])
@pytest.mark.parametrize("network", ["U-Net", "PCT-Net"])
def test_the_last_stages_of_the_decoder_can_begin_anew(artifacts, schedule_of, monkeypatch, network, norms):
    plans, pretrained = PLANS_OF_NETWORKS[network], read_artifact(artifacts[network])["network_weights"]
    scratch = trainer_of(plans)
    scratch.initialize()
    schedule_of("full", fresh_decoder_stages=1, kernel_norms=norms)
    trainer = trainer_of(plans, artifacts[network], monkeypatch)
    trainer.on_train_start()
    trainer.on_train_end()
    assert "of a pretrained decoder the last 1 begin anew (fresh_decoder_stages)" in Path(trainer.log_file).read_text()
    last = len(scratch.network.decoder.stages) - 1
    for name, fresh in scratch.network.state_dict().items():
        begun = trainer.network.state_dict()[name]
        if ".seg_layers." in name or re.match(rf"decoder\.(stages|transpconvs|ups)\.{last}\.", name):
            torch.testing.assert_close(begun, fresh, rtol=0, atol=0, msg=name)
        elif norms == "fresh":
            torch.testing.assert_close(direction(begun), direction(pretrained[name]), msg=name)
        else:
            torch.testing.assert_close(begun, pretrained[name], rtol=0, atol=0, msg=name)


def test_a_decoder_all_of_whose_stages_begin_anew_is_that_of_encoder_only(nnunet):
    network = trainer_of("nnUNetPlans")
    network.initialize()
    names = list(network.network.state_dict())
    all_stages = reinitialized_parameters(names, FinetuneSettings(fresh_decoder_stages=2))
    assert all_stages
    assert all_stages | {name for name in names if HEADS in name} == {
        name for name in names if name.startswith("decoder.") and ".encoder." not in name
    }
    assert reinitialized_parameters(names, FinetuneSettings(schedule="encoder_only")) == all_stages
    assert reinitialized_parameters(names, FinetuneSettings()) == set()


def test_more_stages_than_there_are_cannot_begin_anew(artifacts, schedule_of, monkeypatch):
    schedule_of("full", fresh_decoder_stages=5)
    with pytest.raises(SystemExit, match=r"fresh_decoder_stages=5, and the decoder has 2 stages; legal: 0 to 2"):
        trainer_of("nnUNetPlans", artifacts["U-Net"], monkeypatch).on_train_start()


def direction(weights: torch.Tensor) -> torch.Tensor:
    return nn.functional.normalize(weights.flatten().double(), dim=0)


def test_all_starts_see_the_same_samples_in_the_same_order(artifacts, schedule_of, monkeypatch):
    """With nnUNet_n_proc_DA=0, as in benchmarks/label_efficiency.py."""
    seen = []
    for schedule, weights in (("full", None), ("encoder_only", artifacts["PCT-Net"]), ("full", artifacts["PCT-Net"])):
        schedule_of(schedule)
        trainer = trainer_of("PCTNetPlans", weights, monkeypatch)
        trainer.on_train_start()
        batches = []
        for _ in range(3):  # the network's dropout draws between them
            batches.append(next(trainer.dataloader_train)["data"])
            trainer.train_step(next(trainer.dataloader_train))
        trainer.on_train_end()
        seen.append(torch.stack(batches))
    for other in seen[1:]:
        torch.testing.assert_close(other, seen[0], rtol=0, atol=0)


@pytest.mark.parametrize("schedule", ["encoder_only", "frozen_encoder"])
def test_a_schedule_of_pretrained_encoders_needs_one(schedule_of, tmp_path, schedule):
    schedule_of(schedule)
    with pytest.raises(SystemExit, match=rf"schedule '{schedule}' is for pretrained weights.* -pretrained_weights"):
        trainer_of("nnUNetPlans").on_train_start()
    trainer = make_trainer("VFFinetuneTrainer", go_on=True)  # from nothing: there is no checkpoint
    with pytest.raises(SystemExit, match=rf"schedule '{schedule}' is for pretrained weights"):
        trainer.on_train_start()


@pytest.mark.parametrize(
    "schedule", ["full", "sawtooth", *(pytest.param(name, marks=pytest.mark.slow) for name in SCHEDULES[2:])]
)
def test_going_on_in_any_phase_is_as_if_there_had_been_no_interruption(
    artifacts, schedule_of, tmp_path, monkeypatch, schedule
):
    """An epoch has two steps of training and two of validation."""
    schedule_of(schedule)

    def interrupted_before(step: int | None) -> dict:
        results = tmp_path / f"interrupted_before_{step}"
        monkeypatch.setenv("nnUNet_results", str(results))
        trainer = trainer_of("nnUNetPlans", artifacts["U-Net"], monkeypatch)
        if step is None:
            trainer.run_training()
        else:
            before_step(trainer, step, send(signal.SIGTERM))
            assert leaves_early(trainer)
            torch.manual_seed(step)  # another process has other random numbers
            np.random.seed(step)  # noqa: NPY002
            monkeypatch.setattr("sys.argv", ["nnUNetv2_train", "--c"])
            make_trainer("VFFinetuneTrainer", go_on=True).run_training()
        return torch.load(next(results.rglob("checkpoint_final.pth")), weights_only=False)

    whole = interrupted_before(None)
    for step in (1, 4, 7, 9, 14):  # in training, between epochs, in validation
        continued = interrupted_before(step)
        assert continued["volume_fusion"]["pretrained"] == whole["volume_fusion"]["pretrained"] is not None
        assert_same_training(whole, continued)


@pytest.mark.parametrize(("network", "schedule"), [("U-Net", "encoder_only"), ("PCT-Net", "full")])
def test_killed_before_a_checkpoint_was_due_it_goes_on_from_the_pretrained_weights(
    artifacts, schedule_of, tmp_path, monkeypatch, network, schedule
):
    """``--c`` cannot be given weights: without a checkpoint it would begin without them, and nobody would notice."""
    schedule_of(schedule)
    plans = PLANS_OF_NETWORKS[network]

    def result(begin) -> dict:
        results = tmp_path / begin.__name__
        monkeypatch.setenv("nnUNet_results", str(results))
        begin(trainer_of(plans, artifacts[network], monkeypatch))
        return torch.load(next(results.rglob("checkpoint_final.pth")), weights_only=False)

    def whole(trainer) -> None:
        trainer.run_training()

    def killed(trainer) -> None:
        before_step(trainer, 1, lambda: (_ for _ in ()).throw(ConnectionError))  # whatever ends it without a word
        with pytest.raises(ConnectionError):
            trainer.run_training()
        monkeypatch.setattr("sys.argv", ["nnUNetv2_train", "--c"])
        make_trainer("VFFinetuneTrainer", plans, go_on=True).run_training()

    assert_same_training(result(whole), result(killed))


def train(**kwargs) -> None:
    run_training(str(DATASET_ID), "3d_fullres", 0, "VFFinetuneTrainer", device=CPU, **kwargs)


def test_a_training_is_not_continued_with_another_schedule(schedule_of, tmp_path, monkeypatch):
    schedule_of("sawtooth")
    train()
    monkeypatch.setenv("nnUNet_vf_finetune_schedule", "full")
    with pytest.raises(SystemExit, match=r"schedule = 'full' \(recorded: 'sawtooth'\).* --c"):
        train(continue_training=True)
    train(only_run_validation=True)  # with the settings of the checkpoint


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [("kernel_norms", "fresh", "'fresh' .recorded: 'pretrained'"), ("fresh_decoder_stages", "1", "1 .recorded: 0")],
)
def test_a_checkpoint_from_before_it_was_a_setting_goes_on(schedule_of, tmp_path, monkeypatch, name, value, told):
    schedule_of("full", kernel_norms="pretrained")  # as all trainings were before
    train()
    (file,) = tmp_path.rglob("checkpoint_final.pth")
    checkpoint = torch.load(file, weights_only=False)
    del checkpoint["volume_fusion"]["settings"][name]
    torch.save(checkpoint, file)
    train(continue_training=True)
    monkeypatch.setenv(f"nnUNet_vf_finetune_{name}", value)
    torch.save(checkpoint, file)
    with pytest.raises(SystemExit, match=f"{name} = {told}"):
        train(continue_training=True)


def test_without_mirroring_nothing_is_mirrored_and_predictors_know(schedule_of, tmp_path):
    schedule_of("full", mirroring="off")
    train()
    folder = tmp_path / "results" / DATASET / "VFFinetuneTrainer__nnUNetPlans__3d_fullres"
    checkpoint = torch.load(folder / "fold_0" / "checkpoint_final.pth", weights_only=False)
    assert checkpoint["inference_allowed_mirroring_axes"] is None
    assert json.loads((folder / "plans.json").read_text())["volume_fusion_finetune"]["mirroring"] == "off"
