"""``MODEL_CARD.md``: what someone else must know before using an artifact, as a page to complete and share."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nnunetv2_vf.transfer.artifact import FILE_NAME

CARD_NAME = "MODEL_CARD.md"
_AUTHORS = "## Licence and data"


def write_model_card(path: Path, metadata: Mapping[str, Any]) -> None:
    """Write the card of an artifact, from its ``vf`` metadata.

    What stands under "Licence and data" is the author's: it is written once and then left alone.
    """
    card = _card(metadata)
    if path.is_file():
        own = path.read_text(encoding="utf-8").partition(_AUTHORS)[2]
        card = card.partition(_AUTHORS)[0] + _AUTHORS + (own or card.partition(_AUTHORS)[2])
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(card, encoding="utf-8")
    unfinished.replace(path)


def _card(vf: Mapping[str, Any]) -> str:
    network = vf["architecture"]["network_class_name"].rpartition(".")[2]
    settings = vf["settings"]
    dice = vf["pretext_dice_per_class"]
    mean = sum(dice) / len(dice)
    steps = settings["coefficient_steps"]
    return f"""# {FILE_NAME}: {network} pretrained with Volume Fusion on {vf["dataset"]}

Self-supervised weights of encoder and decoder for 3D segmentation with nnU-Net v2; no labels were used.

| | |
|---|---|
| network | {network}, {vf["num_input_channels"]} input channels |
| images | {vf["num_cases"]} cases of {vf["dataset"]}, fold {vf["fold"]} |
| channels | {", ".join(vf["channel_names"].values())} |
| preprocessing | nnU-Net's, {vf["configuration"]} of {vf["plans"]["plans_name"]} |
| normalisation | {", ".join(vf["normalization_schemes"])} |
| spacing | {" x ".join(f"{mm:.3g}" for mm in vf["spacing"])} mm |
| patch | {" x ".join(map(str, vf["patch_size"]))} voxels |
| versions | {", ".join(f"{name} {version}" for name, version in vf["versions"].items())} |

## Pretext task

Dice on fixed validation samples by fusion coefficient (mean {mean:.3f}):

| {" | ".join(f"{label}/{steps}" for label in range(len(dice)))} |
|{"---|" * len(dice)}
| {" | ".join(f"{value:.3f}" for value in dice)} |

![curves](progress.png)
![what the network saw and answered](preview.png)

## How to use

```bash
pip install nnunetv2-vf
eval "$(nnUNetv2_vf env)"
nnUNetv2_extract_fingerprint -d ID
nnUNetv2_vf plan -d ID --like {FILE_NAME}      # prints the commands that come next
```

## Settings

| setting | value |
|---|---|
{chr(10).join(f"| {name} | {value} |" for name, value in settings.items())}

## Cite

- Wang et al., MIS-FM: 3D Medical Image Segmentation using Foundation Models Pretrained on a Large-Scale Unannotated
  Dataset, arXiv 2306.16925, 2023; IEEE Transactions on Image Processing 34, 2025 (Volume Fusion, PCT-Net)
- Isensee et al., nnU-Net: a self-configuring method for deep learning-based biomedical image segmentation, Nature
  Methods 18, 2021

{_AUTHORS}

- Licence of the weights: TO BE FILLED IN
- Where the images come from, and on what terms: TO BE FILLED IN
- Who made this, and whom to ask: TO BE FILLED IN
"""
