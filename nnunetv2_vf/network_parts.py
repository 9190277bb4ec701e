"""The part of a network that a weight belongs to, found from its name: encoder, decoder or heads.

nnU-Net's networks and ours use the same names: ``encoder.``, ``decoder.``, and ``decoder.seg_layers.`` for the heads,
which are the last convolutions, one per deep supervision output. nnU-Net transfers all pretrained weights except the
heads.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

HEADS = ".seg_layers."
ENCODER_PREFIX = "encoder."


def part_of(name: str) -> str:
    """Return the part of a parameter: ``"encoder"``, ``"decoder"`` or ``"heads"``."""
    if HEADS in name:
        return "heads"
    return "encoder" if name.startswith(ENCODER_PREFIX) else "decoder"


def stages_to_output(names: Sequence[str]) -> dict[str, int]:
    """Return for each parameter the number of stages from its own to the output; 0 for the heads.

    The path goes down the encoder and up the decoder.

    Args:
        names: all parameters of the network.
    """
    stages = {name: _stage_of(name) for name in names}

    def count_stages(part: str) -> int:
        return 1 + max((stages[name] for name in names if part_of(name) == part), default=-1)

    decoder_stages, encoder_stages = count_stages("decoder"), count_stages("encoder")

    def distance(name: str) -> int:
        if part_of(name) == "heads":
            return 0
        if part_of(name) == "decoder":
            return decoder_stages - stages[name]
        return decoder_stages + encoder_stages - stages[name]

    return {name: distance(name) for name in names}


def _stage_of(name: str) -> int:
    """Return the index of a parameter's stage within its part, in the order in which data passes the stages."""
    if name.startswith("decoder.bottom."):  # of FMUNet: before the first step up
        return 0
    match = re.search(r"\.(\d+)\.", name)
    number = int(match[1]) if match else 0
    return number + (".downs." in name)  # encoder.downs.0 leads to encoder.stages.1
