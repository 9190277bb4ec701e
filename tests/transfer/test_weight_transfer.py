from __future__ import annotations

import copy
import itertools

import pytest
import torch
from networks import fmunet, pct_net, unet
from torch import Tensor, nn

from nnunetv2_vf.transfer.weight_transfer import (
    ADAPTED,
    RANDOM,
    TRANSFERRED,
    format_table,
    transfer_weights,
    transferred_share,
)

FLAT_KERNELS = ((1, 3, 3), (1, 3, 3), (3, 3, 3))
FOUR_STAGES = {"kernels": ((3, 3, 3),) * 4, "strides": ((1, 1, 1),) + ((2, 2, 2),) * 3}


def residual_unet(**kwargs) -> nn.Module:
    return unet(residual=True, **kwargs)


ALL_NETWORKS = pytest.mark.parametrize("make", [unet, residual_unet, pct_net, fmunet])


def predict(network: nn.Module, image: Tensor) -> Tensor:
    """Return the output at full resolution."""
    output = network(image)
    return output[0] if isinstance(output, list) else output


def have_same_weights(network: nn.Module, other: nn.Module) -> bool:
    pairs = zip(network.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(tensor, other_tensor) for tensor, other_tensor in pairs)


@ALL_NETWORKS
def test_an_equal_network_takes_all_weights_unchanged(make):
    pretrained, target = make(), make()
    assert {outcome.kind for outcome in transfer_weights(pretrained.state_dict(), target)} == {TRANSFERRED}
    assert have_same_weights(pretrained, target)


@ALL_NETWORKS
def test_a_network_with_more_channels_gives_the_same_output_for_equal_channels(make):
    one_channel, four_channels = make(channels=1), make(channels=4)
    outcomes = transfer_weights(one_channel.state_dict(), four_channels)
    image = torch.randn(1, 1, 16, 32, 32)
    output, expected = predict(four_channels, image.expand(-1, 4, -1, -1, -1)), predict(one_channel, image)
    torch.testing.assert_close(output, expected, atol=1e-4, rtol=1e-4)
    changed = [(outcome.kind, outcome.detail) for outcome in outcomes if outcome.kind != TRANSFERRED]
    assert changed == [(ADAPTED, "input channels 1 -> 4")]
    assert transferred_share(outcomes) == 1


def test_all_names_of_the_encoder_get_the_weights():
    network = unet(channels=2)
    transfer_weights(unet().state_dict(), network)
    state = network.state_dict()
    assert all(torch.equal(state[name], state[f"decoder.{name}"]) for name in state if name.startswith("encoder."))


# ---------------------------------------------------------------- kernels


def test_longer_kernels_keep_the_output_and_changing_them_back_restores_the_network():
    flat, full, restored = unet(kernels=FLAT_KERNELS), unet(), unet(kernels=FLAT_KERNELS)
    assert {outcome.kind for outcome in transfer_weights(flat.state_dict(), full)} == {TRANSFERRED, ADAPTED}
    image = torch.randn(1, 1, 16, 16, 16)
    torch.testing.assert_close(predict(full, image), predict(flat, image), atol=1e-4, rtol=1e-4)
    transfer_weights(full.state_dict(), restored)
    assert have_same_weights(restored, flat)


def test_kernels_without_a_common_centre_do_not_fit():
    outcomes = transfer_weights(unet(kernels=((3, 3, 3),) * 3).state_dict(), unet(kernels=((2, 3, 3),) * 3))
    convolutions = [outcome for outcome in outcomes if "conv.weight" in outcome.name and "seg" not in outcome.name]
    assert {outcome.fits for outcome in convolutions} == {False}


# ---------------------------------------------------------------- stages and blocks


def test_stages_keep_their_level_in_a_deeper_network():
    three, four, restored = unet(), unet(**FOUR_STAGES), unet()
    outcomes = transfer_weights(three.state_dict(), four)
    for level in range(3):
        assert have_same_weights(three.encoder.stages[level], four.encoder.stages[level])
    for level in range(2):  # the decoder counts its stages from the deepest one
        assert have_same_weights(three.decoder.stages[1 - level], four.decoder.stages[2 - level])
        assert have_same_weights(three.decoder.transpconvs[1 - level], four.decoder.transpconvs[2 - level])
        assert have_same_weights(three.decoder.seg_layers[1 - level], four.decoder.seg_layers[2 - level])
    random = {outcome.name for outcome in outcomes if outcome.kind == RANDOM}
    assert random
    new = ("encoder.stages.3", "decoder.stages.0", "decoder.transpconvs.0", "decoder.seg_layers.0")
    assert all(name.startswith(new) for name in random)
    transfer_weights(four.state_dict(), restored)
    assert have_same_weights(restored, three)


def test_additional_residual_blocks_stay_random_and_surplus_ones_are_dropped():
    two_blocks, three_blocks = residual_unet(), residual_unet()
    three_blocks.encoder.stages[2].blocks.append(copy.deepcopy(three_blocks.encoder.stages[2].blocks[1]))
    outcomes = transfer_weights(two_blocks.state_dict(), three_blocks)
    random = [outcome.name for outcome in outcomes if outcome.kind == RANDOM]
    assert {name.rpartition("blocks.")[2][:2] for name in random} == {"2."}
    outcomes = transfer_weights(three_blocks.state_dict(), residual_unet())
    assert {outcome.kind for outcome in outcomes} == {TRANSFERRED}


# ---------------------------------------------------------------- PCT-Net and FMUNet


@pytest.mark.parametrize(("make", "changes"), [(pct_net, {"kernel", "upsampling"}), (fmunet, {"kernel"})])
@pytest.mark.parametrize(("old", "new"), [*itertools.permutations(range(3), 2)])
def test_every_resolution_mode_takes_the_weights_of_every_other(make, changes, old, new):
    target = make(new)
    outcomes = transfer_weights(make(old).state_dict(), target)
    assert transferred_share(outcomes) == 1
    assert {outcome.detail.partition(" ")[0] for outcome in outcomes if outcome.detail} == changes
    assert predict(target, torch.randn(1, 1, 16, 16, 32)).isfinite().all()


@pytest.mark.parametrize("make", [pct_net, fmunet])
@pytest.mark.parametrize(("old", "new"), [(1, 0), (2, 0), (2, 1)])
def test_changing_to_a_finer_mode_and_back_restores_the_network(make, old, new):
    network, finer, restored = make(old), make(new), make(old)
    transfer_weights(network.state_dict(), finer)
    transfer_weights(finer.state_dict(), restored)
    assert have_same_weights(network, restored)


def test_changing_to_a_larger_window_and_back_restores_the_network():
    network, larger, restored = pct_net(window=2), pct_net(window=3), pct_net(window=2)
    outcomes = transfer_weights(network.state_dict(), larger)
    transfer_weights(larger.state_dict(), restored)
    assert have_same_weights(network, restored)
    assert "window 2 -> 3" in {outcome.detail for outcome in outcomes}


# ---------------------------------------------------------------- tensors that are left at random


def test_tensors_with_other_features_keep_their_values():
    narrow, wide = unet(features=4), unet(features=8)
    before = copy.deepcopy(wide)
    outcomes = transfer_weights(narrow.state_dict(), wide)
    assert {outcome.kind for outcome in outcomes if not outcome.fits} == {RANDOM}
    assert transferred_share(outcomes) == 0
    assert have_same_weights(wide.encoder, before.encoder)


@ALL_NETWORKS
def test_encoder_only_leaves_the_decoder_unchanged(make):
    pretrained, target = make(), make()
    before = copy.deepcopy(target)
    outcomes = transfer_weights(pretrained.state_dict(), target, encoder_only=True)
    assert have_same_weights(pretrained.encoder, target.encoder)
    own = {name for name, _ in target.decoder.named_parameters() if not name.startswith(("encoder", "seg_layers"))}
    assert own
    for name in own:
        assert torch.equal(target.decoder.get_parameter(name), before.decoder.get_parameter(name))
    assert {outcome.detail for outcome in outcomes if outcome.kind == RANDOM} == {"decoder"}


def test_the_rows_of_the_table_add_up_to_the_network_without_its_heads():
    target = unet(channels=4, **{**FOUR_STAGES, "kernels": ((1, 3, 3),) * 4})
    lines = format_table(transfer_weights(unet().state_dict(), target)).splitlines()
    rows = {label.rstrip(): numbers for label, *numbers in (line.rsplit(maxsplit=3) for line in lines[1:])}
    body = [parameter for name, parameter in target.named_parameters() if ".seg_layers." not in name]
    outcomes = [rows[outcome] for outcome in (TRANSFERRED, ADAPTED, RANDOM)]
    assert sum(int(tensors) for tensors, _, _ in outcomes) == len(body)
    assert sum(int(parameters) for _, parameters, _ in outcomes) == sum(parameter.numel() for parameter in body)
    assert "  input channels 1 -> 4, kernel 3x3x3 -> 1x3x3" in rows
    assert rows["  not in the pretrained network"] == rows[RANDOM]
