"""One training step: precision, gradient clipping, and skipping of non-finite steps."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from conftest import DATASET_ID
from nnunetv2.run.run_training import get_trainer_from_args
from torch import nn

from nnunetv2_vf.errors import UserError
from nnunetv2_vf.settings import VFSettings
from nnunetv2_vf.training.optimizer import make_optimizer
from nnunetv2_vf.training.step import LossScaler, Precision, UnitScaler, take_step

CPU = torch.device("cpu")


def small_network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.LeakyReLU(), nn.Conv3d(4, 2, 1))


def data(device: torch.device = CPU) -> torch.Tensor:
    return torch.randn(2, 1, 6, 7, 8, generator=torch.Generator().manual_seed(0)).to(device)


# ---------------------------------------------------------------- precision


@pytest.mark.parametrize("setting", ["auto", "fp32"])
def test_a_cpu_trains_in_single_precision(setting):
    assert Precision.choose(setting, CPU).name == "fp32"


@pytest.mark.parametrize("setting", ["bf16", "fp16", "tf32"])
def test_an_unavailable_precision_is_refused_with_the_legal_ones(setting):
    with pytest.raises(UserError, match=rf"precision '{setting}' is not available on cpu; legal: auto, fp32"):
        Precision.choose(setting, CPU)


@pytest.mark.parametrize(
    ("bf16_supported", "legal"), [(True, ["bf16", "fp16", "tf32", "fp32"]), (False, ["fp16", "fp32"])]
)
def test_auto_chooses_the_best_precision_of_the_gpu(monkeypatch, bf16_supported, legal):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16_supported)
    cuda = torch.device("cuda", 0)
    assert Precision.choose("auto", cuda).name == legal[0]
    assert [Precision.choose(name, cuda).name for name in legal] == legal


@pytest.mark.parametrize(
    ("name", "tf32", "kind"),
    [
        ("bf16", True, UnitScaler),
        ("fp16", True, LossScaler),
        ("tf32", True, UnitScaler),
        ("fp32", False, UnitScaler),
    ],
)
def test_a_precision_sets_tf32_scaler_and_autocast(monkeypatch, name, tf32, kind):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", torch.backends.cudnn.allow_tf32)
    before = torch.get_float32_matmul_precision()
    precision = Precision(name, "cpu")
    try:
        precision.set_float32_precision()
        assert torch.backends.cudnn.allow_tf32 is tf32
        assert torch.get_float32_matmul_precision() == ("high" if tf32 else "highest")
    finally:
        torch.set_float32_matmul_precision(before)
    assert type(precision.scaler()) is kind
    with precision.autocast():
        dtype = nn.Linear(2, 2)(torch.ones(1, 2)).dtype
    assert dtype == {"bf16": torch.bfloat16, "fp16": torch.float16}.get(name, torch.float32)


# ---------------------------------------------------------------- the step


@pytest.mark.parametrize("optimizer_name", ["adam", "sgd"])
@pytest.mark.parametrize("fused", [False, True])
def test_a_step_equals_nnunets_step(optimizer_name, fused):
    """The expected step is written out here: backward, clip to a norm of 12, step."""
    settings = VFSettings(optimizer=optimizer_name)
    network, expected_network = small_network(), small_network()
    optimizers = (
        make_optimizer(network.parameters(), settings, fused),
        make_optimizer(expected_network.parameters(), settings),
    )
    scaler = UnitScaler("cpu")
    for factor in (1.0, 1e4, 3.0):  # the second is clipped
        loss = factor * network(data()).square().mean()
        taken = take_step(loss, network, optimizers[0], scaler)
        expected = factor * expected_network(data()).square().mean()
        optimizers[1].zero_grad()
        expected.backward()
        nn.utils.clip_grad_norm_(expected_network.parameters(), 12)
        optimizers[1].step()
        assert taken
        torch.testing.assert_close(loss.detach(), expected.detach())
    torch.testing.assert_close(network.state_dict(), expected_network.state_dict())


@pytest.mark.parametrize("optimizer_name", ["adam", "adamw", "sgd"])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_with_a_non_finite_gradient_is_skipped(optimizer_name, fused, bad):
    """Also the very first one, where torch's fused SGD would use uninitialised memory."""
    network, reference = small_network(), small_network()
    optimizers = [
        make_optimizer(n.parameters(), VFSettings(optimizer=optimizer_name), fused) for n in (network, reference)
    ]
    scalers = UnitScaler("cpu"), UnitScaler("cpu")
    flags = []
    for factor in (bad, 1.0, bad, 2.0, bad, bad, 1.0):
        flags.append(bool(take_step(factor * network(data()).mean(), network, optimizers[0], scalers[0])))
    for factor in (1.0, 2.0, 1.0):
        take_step(factor * reference(data()).mean(), reference, optimizers[1], scalers[1])
    assert flags == [False, True, False, True, False, False, True]
    torch.testing.assert_close(network.state_dict(), reference.state_dict(), rtol=0, atol=0)
    assert scalers[0].get_scale() == 1


@pytest.mark.parametrize(("before", "after"), [("bf16", "fp16"), ("fp16", "bf16"), ("fp16", "fp16")])
def test_a_training_can_continue_in_another_precision(before, after):
    old, new = (Precision(name, "cpu").scaler() for name in (before, after))
    network = small_network()
    take_step(network(data()).mean(), network, make_optimizer(network.parameters(), VFSettings()), old)
    new.load_state_dict(old.state_dict())
    take_step(network(data()).mean(), network, make_optimizer(network.parameters(), VFSettings()), new)
    assert new.get_scale() == (65536 if after == "fp16" else 1)


@contextmanager
def synchronizing_is_an_error() -> Iterator[None]:
    """Raise an error where the CPU waits for the GPU."""
    try:
        with warnings.catch_warnings():
            # torch warns after it has switched the mode on; an error here would leave it on
            warnings.simplefilter("ignore")
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("plans", "pretext"),
    [
        *((plans, "fusion") for plans in ("nnUNetPlans", "PCTNetPlans", "FMUNetPlans")),
        *(("nnUNetPlans", pretext) for pretext in ("masked", "fusion+masked")),
    ],
)
def test_the_steps_of_the_trainer_never_wait_for_the_gpu(
    two_epochs, pct_plans, fmunet_plans, monkeypatch, plans, pretext
):
    """This covers pretext, network, deep supervision, losses, optimiser and scores."""
    monkeypatch.setenv("nnUNet_compile", "f")
    monkeypatch.setenv("nnUNet_vf_pretext", pretext)
    monkeypatch.setenv("nnUNet_vf_mask_side", "4")
    trainer = get_trainer_from_args(str(DATASET_ID), "3d_fullres", 0, "VFPretrainTrainer", plans)
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    batches = [{**next(trainer.dataloader_train)} for _ in range(2)]
    for batch in batches:
        batch["tensors"] = {name: tensor.pin_memory() for name, tensor in batch["tensors"].items()}
    trainer.train_step(batches[0])
    with torch.no_grad():
        trainer.validation_step(batches[0])
    with synchronizing_is_an_error():
        trainer.train_step(batches[1])
        with torch.no_grad():
            trainer.validation_step(batches[1])


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["bf16", "fp16", "tf32", "fp32"])
def test_a_step_never_waits_for_the_gpu(name):
    cuda = torch.device("cuda")
    network, precision = small_network().to(cuda), Precision.choose(name, cuda)
    optimizer, scaler, x = (
        make_optimizer(network.parameters(), VFSettings(), fused=True),
        precision.scaler(),
        data(cuda),
    )

    def forward() -> torch.Tensor:
        with precision.autocast():
            return network(x).square().mean()

    take_step(forward(), network, optimizer, scaler)  # the optimiser creates its state
    with synchronizing_is_an_error():
        take_step(forward(), network, optimizer, scaler)
