"""Which part of a network a weight belongs to, by its name: encoder, decoder or heads.

nnU-Net's networks and ours name their weights alike: ``encoder.``, ``decoder.``, and ``decoder.seg_layers.`` for the
heads, the last convolutions that give the classes. nnU-Net transfers all pretrained weights but the heads.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

HEADS = ".seg_layers."
ENCODER_PREFIX = "encoder."


def part_of(name: str) -> str:
    """The part that a parameter belongs to, by its name."""
    if HEADS in name:
        return "heads"
    return "encoder" if name.startswith(ENCODER_PREFIX) else "decoder"


def stages_to_output(names: Sequence[str]) -> dict[str, int]:
    """How many stages lie between a parameter and the output, on the way down and up again; heads: none."""
    stages = {
        # PCT-Net's encoder.downs.0 leads to its encoder.stages.1
        name: int((re.findall(r"\.(\d+)\.", name) or [0])[0]) + (".downs." in name)
        for name in names
    }
    count = {
        part: 1 + max((stages[name] for name in names if part_of(name) == part), default=-1)
        for part in ("decoder", "encoder")
    }
    distances = {
        "heads": lambda stage: 0,
        "decoder": lambda stage: count["decoder"] - stage,
        "encoder": lambda stage: count["decoder"] + count["encoder"] - stage,
    }
    return {name: distances[part_of(name)](stages[name]) for name in names}
