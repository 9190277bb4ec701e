"""Fine-tuning schedules: learning rates, trained parts, and resuming in the middle."""

from __future__ import annotations

import json
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DATASET, DATASET_ID, PLANS_OF_NETWORKS, edit_json
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.run.run_training import get_trainer_from_args, run_training
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from torch import nn
from trainings import assert_same_training, make_trainer, run_before_step, run_until_signal, sender_of

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


class TinyNetwork(nn.Module):
    """A network with the names of nnU-Net's networks: two encoder stages, one decoder stage, one head."""

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


def test_full_without_warmup_equals_nnunets_schedule():
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
    nnunet_schedule = PolyLRScheduler(optimizer, 1.0, 20)
    for epoch in range(20):
        nnunet_schedule.step(epoch)
        assert rates("encoder", num_epochs=20)[epoch] == pytest.approx(nnunet_schedule.get_last_lr()[0])


@pytest.mark.parametrize("decay", ["poly", "cosine"])
def test_full_warms_up_and_then_decays(decay):
    for part in PARTS:
        values = rates(part, num_epochs=20, warmup_fraction=0.2, decay=decay)
        assert values[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
        assert values[4:] == sorted(values[4:], reverse=True)
        assert 0 < values[-1] < 0.1


def test_cosine_decay_reaches_half_in_the_middle():
    assert rates("heads", num_epochs=10, decay="cosine")[5] == pytest.approx(0.5)


def test_sawtooth_trains_decoder_and_heads_first():
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
def test_no_schedule_has_a_learning_rate_of_zero_for_the_heads(epochs, schedule):
    for decoder_only, warmup in ((0.0, 0.0), (0.1, 0.1), (0.45, 0.45), (0.9, 0.0), (0.0, 0.9)):
        settings = {"schedule": schedule, "decoder_fraction": decoder_only, "warmup_fraction": warmup}
        assert all(0 < value <= 1 for value in rates("heads", num_epochs=epochs, **settings))
        if schedule != "frozen_encoder":
            assert 0 < rates("encoder", num_epochs=epochs, **settings)[-1] <= 1


# ---------------------------------------------------------------- groups of parameters


def test_every_parameter_is_in_exactly_one_group():
    network = TinyNetwork()
    groups = parameter_groups(network, FinetuneSettings())
    assert [group["part"] for group in groups] == ["heads", "decoder", "encoder"]
    assert [group["share"] for group in groups] == [1, 1, 1]
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in network.parameters())


def test_layer_decay_lowers_the_rate_from_stage_to_stage():
    groups = parameter_groups(TinyNetwork(), FinetuneSettings(layer_decay=0.5))
    assert [(group["part"], group["share"]) for group in groups] == [
        ("heads", 1), ("decoder", 0.5), ("encoder", 0.25), ("encoder", 0.125)
    ]  # fmt: skip


@pytest.mark.parametrize("network", PLANS_OF_NETWORKS)
def test_layer_decay_lowers_the_rate_from_stage_to_stage_of_each_network(artifacts, two_epochs, monkeypatch, network):
    trainer = trainer_of(PLANS_OF_NETWORKS[network], artifacts[network], monkeypatch)
    stages = len(trainer.configuration_manager.network_arch_init_kwargs["features_per_stage"])
    groups = parameter_groups(trainer.bare_network(), FinetuneSettings(layer_decay=0.5))
    shares = {part: {g["share"] for g in groups if g["part"] == part} for part in PARTS}
    assert shares["heads"] == {1.0}
    assert shares["decoder"] == {0.5**distance for distance in range(1, stages)}
    assert shares["encoder"] == {0.5**distance for distance in range(stages, 2 * stages)}


def test_the_rate_depends_on_the_epoch_only_and_parts_without_rate_are_frozen():
    network = TinyNetwork()
    settings = FinetuneSettings(num_epochs=10, schedule="sawtooth", decoder_fraction=0.3, layer_decay=0.5)
    optimizer = torch.optim.SGD(parameter_groups(network, settings), lr=1.0)
    schedule = FinetuneLRScheduler(optimizer, settings)
    for epoch in (0, 7, 2, 3):
        schedule.step(epoch)
        schedule.freeze_parts_without_rate(network, with_statistics=True)
        for group, lr in zip(optimizer.param_groups, schedule.get_last_lr(), strict=True):
            assert (
                lr
                == group["lr"]
                == settings.initial_lr * group["share"] * relative_learning_rate(settings, group["part"], epoch)
            )
        assert all(p.requires_grad == (epoch >= 3) for p in network.encoder.parameters())
        assert all(p.requires_grad for p in network.decoder["seg_layers"].parameters())


def test_parameters_that_the_network_freezes_itself_stay_frozen():
    network = TinyNetwork()
    network.encoder["stages"][0].requires_grad_(False)
    groups = parameter_groups(network, FinetuneSettings())
    assert sum(len(group["params"]) for group in groups) == 6


def test_fractions_of_epochs_are_rounded_up_without_float_errors():
    settings = {"schedule": "sawtooth", "num_epochs": 100}
    assert decoder_only_epochs(FinetuneSettings(decoder_fraction=0.07, **settings)) == 7
    assert decoder_only_epochs(FinetuneSettings(decoder_fraction=0.071, **settings)) == 8


def test_a_network_without_an_encoder_takes_only_the_schedule_full():
    network = nn.Sequential(nn.Linear(1, 1))
    (group,) = parameter_groups(network, FinetuneSettings())
    assert group["part"] == "decoder"
    for settings in ({"schedule": "sawtooth"}, {"fresh_decoder_stages": 1}, {"layer_decay": 0.9}):
        with pytest.raises(
            UserError,
            match="an attribute 'encoder', which Sequential does not have; legal for it: full, 0 and 1",
        ):
            parameter_groups(network, FinetuneSettings(**settings))


# ---------------------------------------------------------------- trainings


@pytest.fixture
def schedule_of(two_epochs, monkeypatch):
    """Return a function that sets a schedule of 4 epochs; a decoder-only phase has 2 of them."""

    def choose(schedule: str, **settings) -> None:
        values = {"schedule": schedule, "num_epochs": 4, "decoder_fraction": 0.5, "warmup_fraction": 0.25, **settings}
        for name, value in values.items():
            monkeypatch.setenv(f"nnUNet_vf_finetune_{name}", str(value))

    return choose


def trainer_of(plans: str, weights: Path | None = None, monkeypatch=None):
    """Make a fine-tuning trainer as nnUNetv2_train does, with pretrained weights where they are given."""
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


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> bool:
    return any((before[name] != after[name]).any() for name in before)


_RISE_AND_DECAY = [
    0.5,
    1.0,
    (2 / 3) ** 0.9,
    (1 / 3) ** 0.9,
]  # one epoch of warm-up, then nnU-Net's decay over three epochs
_TEETH = [0.5, 1.0, 0.5, 1.0]
RATES = {  # relative learning rates of the four epochs of schedule_of, by part
    "full": dict.fromkeys(PARTS, _RISE_AND_DECAY),
    "encoder_only": dict.fromkeys(PARTS, _RISE_AND_DECAY),
    "frozen_encoder": {**dict.fromkeys(PARTS, _RISE_AND_DECAY), "encoder": [0.0] * 4},
    "sawtooth": {**dict.fromkeys(PARTS, _TEETH), "encoder": [0.0, 0.0, 0.5, 1.0]},
}


@pytest.mark.parametrize("network", PLANS_OF_NETWORKS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_each_schedule_trains_its_parts_with_its_rates_in_each_epoch(
    artifacts, schedule_of, monkeypatch, schedule, network
):
    schedule_of(schedule)
    trainer = trainer_of(PLANS_OF_NETWORKS[network], artifacts[network], monkeypatch)
    trainer.on_train_start()
    for epoch in range(4):
        before = weights_by_part(trainer.network)
        statistics = {name: tensor.clone() for name, tensor in trainer.network.encoder.named_buffers()}
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
        assert {part: changed(before[part], after[part]) for part in PARTS} == expected, epoch
        if statistics:  # batch norms, as in PCT-Net
            assert changed(statistics, dict(trainer.network.encoder.named_buffers())) == expected["encoder"], epoch
    trainer.on_train_end()


@pytest.mark.parametrize("norms", ["fresh", "pretrained"])
@pytest.mark.parametrize("network", ["U-Net", "PCT-Net", "FMUNet"])
def test_encoder_only_loads_the_encoder_and_keeps_all_else_as_from_scratch(
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
        assert f"Schedule {schedule}: the whole network" in log
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
@pytest.mark.parametrize("network", ["U-Net", "PCT-Net", "FMUNet"])
def test_the_last_decoder_stages_can_start_from_new_weights(artifacts, schedule_of, monkeypatch, network, norms):
    plans, pretrained = PLANS_OF_NETWORKS[network], read_artifact(artifacts[network])["network_weights"]
    scratch = trainer_of(plans)
    scratch.initialize()
    schedule_of("full", fresh_decoder_stages=1, kernel_norms=norms)
    trainer = trainer_of(plans, artifacts[network], monkeypatch)
    trainer.on_train_start()
    trainer.on_train_end()
    assert (
        "the last 1 decoder stages start from new weights (fresh_decoder_stages)" in Path(trainer.log_file).read_text()
    )
    last = len(scratch.network.decoder.stages) - 1
    for name, fresh in scratch.network.state_dict().items():
        loaded = trainer.network.state_dict()[name]
        if ".seg_layers." in name or re.match(rf"decoder\.(stages|transpconvs|ups)\.{last}\.", name):
            torch.testing.assert_close(loaded, fresh, rtol=0, atol=0, msg=name)
        elif norms == "fresh":
            torch.testing.assert_close(direction(loaded), direction(pretrained[name]), msg=name)
        else:
            torch.testing.assert_close(loaded, pretrained[name], rtol=0, atol=0, msg=name)


def test_a_decoder_with_only_new_stages_equals_encoder_only(nnunet):
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


def test_more_fresh_stages_than_the_decoder_has_are_refused(artifacts, schedule_of, monkeypatch):
    schedule_of("full", fresh_decoder_stages=5)
    with pytest.raises(SystemExit, match=r"fresh_decoder_stages=5, but the decoder has 2 stages; legal: 0 to 2"):
        trainer_of("nnUNetPlans", artifacts["U-Net"], monkeypatch).on_train_start()


def direction(weights: torch.Tensor) -> torch.Tensor:
    return nn.functional.normalize(weights.flatten().double(), dim=0)


def test_all_starting_weights_see_the_same_samples_in_the_same_order(artifacts, schedule_of, monkeypatch):
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
        shutil.rmtree(trainer.output_folder)  # a training from other weights would not replace it
        seen.append(torch.stack(batches))
    for other in seen[1:]:
        torch.testing.assert_close(other, seen[0], rtol=0, atol=0)


@pytest.mark.parametrize("schedule", ["encoder_only", "frozen_encoder"])
def test_schedules_for_pretrained_encoders_need_pretrained_weights(schedule_of, tmp_path, schedule):
    schedule_of(schedule)
    with pytest.raises(SystemExit, match=rf"schedule '{schedule}' needs pretrained weights; add -pretrained_weights"):
        trainer_of("nnUNetPlans").run_training()
    trainer = make_trainer("VFFinetuneTrainer", continue_training=True)  # there is no checkpoint to continue from
    with pytest.raises(SystemExit, match=rf"schedule '{schedule}' needs pretrained weights"):
        trainer.run_training()


@pytest.mark.parametrize(
    "schedule", [pytest.param(name, marks=[] if name == "sawtooth" else pytest.mark.slow) for name in SCHEDULES]
)
def test_a_training_interrupted_in_any_phase_ends_like_an_uninterrupted_one(
    artifacts, schedule_of, tmp_path, monkeypatch, schedule
):
    """An epoch has two training steps and two validation steps."""
    schedule_of(schedule)

    def interrupted_before(step: int | None) -> dict:
        results = tmp_path / f"interrupted_before_{step}"
        monkeypatch.setenv("nnUNet_results", str(results))
        trainer = trainer_of("nnUNetPlans", artifacts["U-Net"], monkeypatch)
        if step is None:
            trainer.run_training()
        else:
            run_before_step(trainer, step, sender_of(signal.SIGTERM))
            assert run_until_signal(trainer)
            torch.manual_seed(step)  # a new process has other random numbers
            np.random.seed(step)  # noqa: NPY002
            monkeypatch.setattr("sys.argv", ["nnUNetv2_train", "--c"])
            make_trainer("VFFinetuneTrainer", continue_training=True).run_training()
        return torch.load(next(results.rglob("checkpoint_final.pth")), weights_only=False)

    uninterrupted = interrupted_before(None)
    for step in (1, 4, 7, 9, 14):  # in training, between epochs, in validation
        continued = interrupted_before(step)
        assert continued["volume_fusion"]["pretrained"] == uninterrupted["volume_fusion"]["pretrained"] is not None
        assert_same_training(uninterrupted, continued)


@pytest.mark.parametrize(
    ("network", "schedule"), [("U-Net", "encoder_only"), pytest.param("PCT-Net", "full", marks=pytest.mark.slow)]
)
def test_a_training_killed_before_its_first_checkpoint_restarts_from_the_pretrained_weights(
    artifacts, schedule_of, tmp_path, monkeypatch, network, schedule
):
    """``--c`` takes no weights: without this, it would start from random weights and nobody would notice."""
    schedule_of(schedule)
    plans = PLANS_OF_NETWORKS[network]

    def result(train) -> dict:
        results = tmp_path / train.__name__
        monkeypatch.setenv("nnUNet_results", str(results))
        train(trainer_of(plans, artifacts[network], monkeypatch))
        return torch.load(next(results.rglob("checkpoint_final.pth")), weights_only=False)

    def uninterrupted(trainer) -> None:
        trainer.run_training()

    def killed(trainer) -> None:
        run_before_step(trainer, 1, lambda: (_ for _ in ()).throw(ConnectionError))  # stands for any sudden end
        with pytest.raises(ConnectionError):
            trainer.run_training()
        monkeypatch.setattr("sys.argv", ["nnUNetv2_train", "--c"])
        make_trainer("VFFinetuneTrainer", plans, continue_training=True).run_training()

    assert_same_training(result(uninterrupted), result(killed))


def train(continue_training: bool = False) -> None:
    """Train without the validation at the end, which starts processes."""
    make_trainer("VFFinetuneTrainer", continue_training=continue_training).run_training()


def test_continuing_with_another_schedule_is_refused(schedule_of, tmp_path, monkeypatch):
    schedule_of("sawtooth")
    train()
    monkeypatch.setenv("nnUNet_vf_finetune_schedule", "full")
    with pytest.raises(SystemExit, match=r"schedule = 'full' \(recorded: 'sawtooth'\).* --c"):
        train(continue_training=True)
    # with the settings of the checkpoint:
    run_training(str(DATASET_ID), "3d_fullres", 0, "VFFinetuneTrainer", only_run_validation=True, device=CPU)


def test_continuing_with_other_plans_is_refused(schedule_of, copied_dataset):
    schedule_of("full")
    train()
    plans_file = copied_dataset / "nnUNetPlans.json"
    edit_json(plans_file, lambda plans: plans["configurations"]["3d_fullres"].update(batch_size=3))
    with pytest.raises(SystemExit, match=r"with other plans \(different: batch_size\)"):
        train(continue_training=True)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("kernel_norms", "fresh", "'fresh' .recorded: 'pretrained'"),
        pytest.param("fresh_decoder_stages", "1", "1 .recorded: 0", marks=pytest.mark.slow),
    ],
)
def test_a_checkpoint_without_a_later_added_setting_continues_with_its_default(
    schedule_of, tmp_path, monkeypatch, name, value, message
):
    schedule_of("full", kernel_norms="pretrained")  # the behaviour before this was a setting
    train()
    (file,) = tmp_path.rglob("checkpoint_final.pth")
    checkpoint = torch.load(file, weights_only=False)
    del checkpoint["volume_fusion"]["settings"][name]
    torch.save(checkpoint, file)
    train(continue_training=True)
    monkeypatch.setenv(f"nnUNet_vf_finetune_{name}", value)
    torch.save(checkpoint, file)
    with pytest.raises(SystemExit, match=f"{name} = {message}"):
        train(continue_training=True)


def test_mirroring_off_is_recorded_for_prediction(schedule_of, tmp_path):
    schedule_of("full", mirroring="off")
    train()
    folder = tmp_path / "results" / DATASET / "VFFinetuneTrainer__nnUNetPlans__3d_fullres"
    checkpoint = torch.load(folder / "fold_0" / "checkpoint_final.pth", weights_only=False)
    assert checkpoint["inference_allowed_mirroring_axes"] is None
    assert json.loads((folder / "plans.json").read_text())["volume_fusion_finetune"]["mirroring"] == "off"
