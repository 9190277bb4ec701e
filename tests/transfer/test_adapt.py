from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from networks import pct_net, unet

from nnunetv2_vf.transfer.adapt import (
    ADAPTED,
    RANDOM,
    TRANSFERRED,
    fit_channels,
    fit_kernel,
    fit_position_bias,
    table,
    transfer,
    transferred_share,
)
from nnunetv2_vf.window_attention import WindowAttention


def answer(network, x):
    output = network(x)
    return output[0] if isinstance(output, list) else output


def same_weights(one, other) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


# ---------------------------------------------------------------- input channels


@pytest.mark.parametrize(("old", "new"), [(1, 4), (2, 3), (2, 4), (4, 1), (3, 2), (1, 1), (5, 7)])
def test_a_replicated_input_gets_the_same_answer(old, new):
    weight = torch.randn(6, old, 3, 3, 3, dtype=torch.float64)
    image = torch.randn(1, 1, 7, 8, 9, dtype=torch.float64)
    before = F.conv3d(image.expand(1, old, -1, -1, -1), weight)
    after = F.conv3d(image.expand(1, new, -1, -1, -1), fit_channels(weight, new))
    torch.testing.assert_close(after, before)


@pytest.mark.parametrize(("old", "new"), [(1, 4), (2, 3), (2, 6), (3, 4)])
def test_more_channels_and_back_is_the_identity(old, new):
    weight = torch.randn(6, old, 3, 3, 3, dtype=torch.float64)
    torch.testing.assert_close(fit_channels(fit_channels(weight, new), old), weight)


@pytest.mark.parametrize("make", [unet, lambda **kw: unet(residual=True, **kw), pct_net], ids=["unet", "resenc", "pct"])
def test_the_whole_network_answers_a_replicated_input_alike(make):
    one, four = make(channels=1), make(channels=4)
    fates = transfer(one.state_dict(), four)
    image = torch.randn(1, 1, 16, 16, 32)
    torch.testing.assert_close(answer(four, image.expand(-1, 4, -1, -1, -1)), answer(one, image), atol=1e-4, rtol=1e-4)
    assert [(fate.what, fate.how) for fate in fates if fate.what != TRANSFERRED] == [(ADAPTED, "input channels 1 -> 4")]
    assert transferred_share(fates) == 1


# ---------------------------------------------------------------- kernels


@pytest.mark.parametrize("kernel", [(3, 3, 3), (3, 3, 5), (5, 5, 5)])
def test_a_longer_kernel_is_the_same_convolution(kernel):
    weight = torch.randn(4, 2, 1, 3, 3, dtype=torch.float64)
    image = torch.randn(1, 2, 7, 8, 9, dtype=torch.float64)
    longer = fit_kernel(weight, kernel)
    assert longer.shape[2:] == kernel
    same = F.conv3d(image, weight, padding="same")
    torch.testing.assert_close(F.conv3d(image, longer, padding="same"), same)
    assert torch.equal(fit_kernel(longer, (1, 3, 3)), weight)


@pytest.mark.parametrize(("kernel", "axes"), [((1, 3, 3), (2,)), ((3, 1, 3), (3,)), ((1, 1, 1), (2, 3, 4))])
def test_a_shorter_kernel_answers_alike_where_nothing_changes_along_the_axis(kernel, axes):
    weight = torch.randn(4, 2, 3, 3, 3, dtype=torch.float64)
    image = torch.randn(1, 2, 9, 9, 9, dtype=torch.float64)
    for axis in axes:
        image = image.mean(axis, keepdim=True).expand_as(image)
    middle = (..., slice(2, -2), slice(2, -2), slice(2, -2))
    before = F.conv3d(image, weight, padding="same")[middle]
    torch.testing.assert_close(F.conv3d(image, fit_kernel(weight, kernel), padding="same")[middle], before)


def test_from_five_to_three_the_outermost_take_in_what_is_cut_off():
    weight = torch.tensor([1.0, 2, 3, 4, 5]).view(1, 1, 5, 1, 1)
    assert fit_kernel(weight, (3, 1, 1)).flatten().tolist() == [3, 3, 9]


def test_kernels_without_a_common_centre_do_not_fit():
    fates = transfer(unet(kernels=((3, 3, 3),) * 3).state_dict(), unet(kernels=((2, 3, 3),) * 3))
    assert {fate.fits for fate in fates if "conv.weight" in fate.name and "seg" not in fate.name} == {False}


def test_flat_kernels_and_back_keep_the_network():
    flat = unet(kernels=((1, 3, 3), (1, 3, 3), (3, 3, 3)))
    full = unet()
    assert {fate.what for fate in transfer(flat.state_dict(), full)} == {TRANSFERRED, ADAPTED}
    image = torch.randn(1, 1, 16, 16, 16)
    torch.testing.assert_close(answer(full, image), answer(flat, image), atol=1e-4, rtol=1e-4)
    back = unet(kernels=((1, 3, 3), (1, 3, 3), (3, 3, 3)))
    transfer(full.state_dict(), back)
    assert same_weights(back, flat)


# ---------------------------------------------------------------- stages


def test_a_deeper_network_keeps_every_stage_at_its_level():
    three, four = unet(), unet(kernels=((3, 3, 3),) * 4, strides=((1, 1, 1),) + ((2, 2, 2),) * 3)
    fates = {fate.name: fate for fate in transfer(three.state_dict(), four)}
    for level in range(3):
        pair = three.encoder.stages[level], four.encoder.stages[level]
        assert same_weights(*pair)
    for level in range(2):  # the decoder counts from its deepest stage
        assert same_weights(three.decoder.stages[1 - level], four.decoder.stages[2 - level])
        assert same_weights(three.decoder.transpconvs[1 - level], four.decoder.transpconvs[2 - level])
        assert same_weights(three.decoder.seg_layers[1 - level], four.decoder.seg_layers[2 - level])
    random = {name for name, fate in fates.items() if fate.what == RANDOM}
    assert random
    new = ("encoder.stages.3", *(f"decoder.{part}.0" for part in ("stages", "transpconvs", "seg_layers")))
    assert all(name.startswith(new) for name in random)
    back = unet()
    transfer(four.state_dict(), back)
    assert same_weights(back, three)


def test_the_decoders_second_name_of_the_encoder_follows():
    network = unet(channels=2)
    transfer(unet(residual=False).state_dict(), network)
    state = network.state_dict()
    assert all(torch.equal(state[name], state[f"decoder.{name}"]) for name in state if name.startswith("encoder."))


def test_more_residual_blocks_stay_at_random_and_fewer_are_dropped():
    two, three = unet(residual=True), unet(residual=True)
    three.encoder.stages[2].blocks.append(copy.deepcopy(three.encoder.stages[2].blocks[1]))
    fates = transfer(two.state_dict(), three)
    assert {fate.name.rpartition("blocks.")[2][:2] for fate in fates if fate.what == RANDOM} == {"2."}
    assert {fate.what for fate in transfer(three.state_dict(), unet(residual=True))} == {TRANSFERRED}


# ---------------------------------------------------------------- PCT-Net


def test_every_resolution_mode_takes_the_weights_of_every_other():
    for old, new in itertools.permutations(range(3), 2):
        target = pct_net(new)
        fates = transfer(pct_net(old).state_dict(), target)
        assert transferred_share(fates) == 1
        assert {how for fate in fates for how in fate.how.split(" ")[:1] if how} == {"kernel", "upsampling"}
        assert answer(target, torch.randn(1, 1, 16, 16, 16)).isfinite().all()


@pytest.mark.parametrize(("old", "new"), [(1, 0), (2, 0), (2, 1)])
def test_a_finer_mode_and_back_is_the_identity(old, new):
    network, there, back = pct_net(old), pct_net(new), pct_net(old)
    transfer(network.state_dict(), there)
    transfer(there.state_dict(), back)
    assert same_weights(network, back)


def test_a_larger_window_and_back_is_the_identity():
    network, there, back = pct_net(window=3), pct_net(window=5), pct_net(window=3)
    fates = transfer(network.state_dict(), there)
    transfer(there.state_dict(), back)
    assert same_weights(network, back)
    assert "window 3 -> 5" in {fate.how for fate in fates}


def test_another_window_answers_alike_on_maps_within_both():
    small, large = (WindowAttention(8, 2, window, shifted=False) for window in (3, 5))
    large.load_state_dict({**small.state_dict(), "position_bias": fit_position_bias(small.position_bias, 9**3)})
    tokens = torch.randn(1, 3, 2, 3, 8)
    torch.testing.assert_close(large(tokens), small(tokens))


def test_offsets_beyond_the_window_get_the_nearest_bias():
    bias = torch.arange(27.0).view(27, 1)  # window 2: offsets -1, 0, 1
    larger = fit_position_bias(bias, 5**3).view(5, 5, 5)
    assert larger[1:4, 1:4, 1:4].flatten().tolist() == list(range(27))
    assert larger[0, 0, 0] == 0
    assert larger[4, 2, 2] == bias[22]
    assert larger[2, 4, 0] == bias[9 + 6]


# ---------------------------------------------------------------- what does not fit, and the table


def test_the_same_network_takes_everything_as_it_is():
    for make in (unet, pct_net):
        one, other = make(), make()
        assert {fate.what for fate in transfer(one.state_dict(), other)} == {TRANSFERRED}
        assert same_weights(one, other)


def test_other_features_stay_at_random():
    narrow, wide = unet(features=4), unet(features=8)
    before = copy.deepcopy(wide)
    fates = transfer(narrow.state_dict(), wide)
    assert {fate.what for fate in fates if not fate.fits} == {RANDOM}
    assert transferred_share(fates) == 0
    assert same_weights(wide.encoder, before.encoder)


def test_encoder_only_leaves_the_decoder_alone():
    for make in (unet, lambda: unet(residual=True), pct_net):
        pretrained, target = make(), make()
        before = copy.deepcopy(target)
        fates = transfer(pretrained.state_dict(), target, encoder_only=True)
        assert same_weights(pretrained.encoder, target.encoder)
        own = {name for name, _ in target.decoder.named_parameters() if not name.startswith(("encoder", "seg_layers"))}
        assert own
        for name in own:
            assert torch.equal(target.decoder.get_parameter(name), before.decoder.get_parameter(name))
        assert {fate.how for fate in fates if fate.what == RANDOM} == {"decoder"}


def test_the_table_adds_up():
    target = unet(channels=4, kernels=((1, 3, 3),) * 4, strides=((1, 1, 1),) + ((2, 2, 2),) * 3)
    lines = table(transfer(unet().state_dict(), target)).splitlines()
    rows = {label.rstrip(): numbers for label, *numbers in (line.rsplit(maxsplit=3) for line in lines[1:])}
    body = [p for name, p in target.named_parameters() if ".seg_layers." not in name]
    totals = [int(rows[what][1]) for what in (TRANSFERRED, ADAPTED, RANDOM)]
    assert sum(totals) == sum(p.numel() for p in body)
    assert sum(int(rows[what][0]) for what in (TRANSFERRED, ADAPTED, RANDOM)) == len(body)
    assert "  input channels 1 -> 4, kernel 3x3x3 -> 1x3x3" in rows
    assert rows["  not in the pretrained network"] == rows[RANDOM]
