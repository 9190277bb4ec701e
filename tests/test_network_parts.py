from __future__ import annotations

import pytest

from nnunetv2_vf.network_parts import stages_to_output


@pytest.mark.parametrize("block", ["stages.{}.conv.weight", "a.b.{}.weight", "layer.{}.mlp.1.bias"])
def test_stages_of_an_encoder_are_counted_from_the_output_whatever_their_names(block):
    names = [f"encoder.{block.format(stage)}" for stage in range(4)]
    assert [*stages_to_output(names).values()] == [4, 3, 2, 1]


def test_the_bottom_of_a_decoder_is_as_far_from_the_output_as_its_first_stage():
    names = [f"decoder.{block}.3.weight" for block in ("bottom.convs.1", "stages.0.convs.1", "stages.1.convs.0")]
    assert [*stages_to_output(names).values()] == [2, 2, 1]


def test_a_step_down_belongs_to_the_stage_that_it_leads_to():
    names = [f"{block}.weight" for block in ("encoder.stages.0", "encoder.downs.0", "encoder.stages.1")]
    assert [*stages_to_output([*names, "decoder.seg_layers.0.weight"]).values()] == [2, 1, 1, 0]
