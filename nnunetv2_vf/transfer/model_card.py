"""``MODEL_CARD.md``: a page beside an artifact that tells other people what they need to know before they use it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nnunetv2_vf.fmunet import FMUNET_PATH
from nnunetv2_vf.pct_net import PCT_NET_PATH
from nnunetv2_vf.settings import VFSettings
from nnunetv2_vf.transfer.architectures import can_be_planned, network_name
from nnunetv2_vf.transfer.artifact import ARTIFACT_NAME
from nnunetv2_vf.transfer.metadata import describe_pretext, format_spacing
from nnunetv2_vf.transfer.pretrained_weights import describe_origin
from nnunetv2_vf.transfer.suggested_commands import finetune_command

CARD_NAME = "MODEL_CARD.md"
TO_BE_FILLED_IN = "TO BE FILLED IN"  # by the author, in the last section
LICENCE = "Licence of the weights"
AUTHORS_ENTRIES = (LICENCE, "Origin of the images, and their terms of use", "Author and contact")
_AUTHORS_SECTION = "## Licence and data"
_VOLUME_FUSION = """Wang et al., MIS-FM: 3D Medical Image Segmentation using Foundation Models Pretrained on a
  Large-Scale Unannotated Dataset, arXiv 2306.16925, 2023; IEEE Transactions on Image Processing 34, 2025 (Volume
  Fusion, PCT-Net, FMUNet)"""
_MASKED_AUTOENCODING = """Wald et al., Revisiting MAE pre-training for 3D medical image segmentation, arXiv 2410.23132,
  2024"""
_NNUNET = """Isensee et al., nnU-Net: a self-configuring method for deep learning-based biomedical image segmentation,
  Nature Methods 18, 2021"""


def write_model_card(path: Path, metadata: Mapping[str, Any]) -> None:
    """Write the model card of an artifact.

    An existing card keeps its section "Licence and data", which the author fills in.

    Args:
        metadata: the entry ``vf`` of the artifact.
    """
    card = _make_card(metadata)
    if path.is_file():
        # An author may have saved the card in another encoding: such bytes stay as they are.
        filled_in = path.read_text(encoding="utf-8", errors="surrogateescape").partition(_AUTHORS_SECTION)[2]
        generated, _, empty_section = card.partition(_AUTHORS_SECTION)
        card = generated + _AUTHORS_SECTION + (filled_in or empty_section)
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(card, encoding="utf-8", errors="surrogateescape")
    unfinished.replace(path)


def _make_card(metadata: Mapping[str, Any]) -> str:
    network = network_name(metadata["architecture"])
    settings = VFSettings.resolve({VFSettings.section: metadata["settings"]}, {})
    used = {name: value for name, value in settings.as_dict().items() if name not in settings.without_effect}
    settings_rows = "\n".join(f"| {name} | {value} |" for name, value in used.items())
    authors_entries = "\n".join(f"- {entry}: {TO_BE_FILLED_IN}" for entry in AUTHORS_ENTRIES)
    return f"""# {network} pretrained with {describe_pretext(metadata)} on {metadata["dataset"]}

Self-supervised weights of encoder and decoder for 3D segmentation with nnU-Net v2, trained without labels.
{_origin(metadata)}
| | |
|---|---|
| network | {network} |
| images | {metadata["num_cases"]} cases of {metadata["dataset"]}, fold {metadata["fold"]} |
| channels | {", ".join(metadata["channel_names"].values())} |
| preprocessing | nnU-Net's, {metadata["configuration"]} of {metadata["plans"]["plans_name"]} |
| normalisation | {", ".join(metadata["normalization_schemes"])} |
| spacing | {format_spacing(metadata["spacing"])} |
| patch | {" x ".join(map(str, metadata["patch_size"]))} voxels |
| versions | {", ".join(f"{name} {version}" for name, version in metadata["versions"].items())} |

## Pretext task

{_scores(metadata)}

![training curves](progress.png)
![samples and predictions](preview.png)

## How to use

```bash
pip install nnunetv2-vf
eval "$(nnUNetv2_vf env)"
nnUNetv2_vf pull USER/NAME -o .     # if these weights are on the Hugging Face Hub; needs 'nnunetv2-vf[hub]'
{_commands(metadata)}
```

## Settings

| setting | value |
|---|---|
{settings_rows}

## Cite

{_citations(metadata["architecture"], settings)}

{_AUTHORS_SECTION}

{authors_entries}
"""


def _origin(metadata: Mapping[str, Any]) -> str:
    """Return a sentence about the weights that the pretraining started from; nothing for new weights."""
    pretrained = metadata.get("pretrained")  # older files do not have it
    if pretrained is None:
        return ""
    origin = describe_origin(pretrained)
    return f"The training started from other weights, whose licence and data count too: {origin}.\n"


def _scores(metadata: Mapping[str, Any]) -> str:
    """Return the scores of the pretext on fixed validation samples."""
    dice, share = metadata["pretext_dice_per_class"], metadata.get("pretext_restored_share")
    of_training = " of the training cases (fold all has no others)" if metadata["fold"] == "all" else ""
    samples = f"fixed validation samples{of_training}"
    parts = []
    if dice:
        steps = metadata["settings"]["coefficient_steps"]
        parts.append(f"""Dice on {samples} by fusion coefficient (mean {sum(dice) / len(dice):.3f}):

| {" | ".join(f"{label}/{steps}" for label in range(len(dice)))} |
|{"---|" * len(dice)}
| {" | ".join(f"{value:.3f}" for value in dice)} |""")
    if share:
        parts.append(
            f"Share of the variance of the hidden blocks that the network restores, on {samples}, for each channel: "
            + ", ".join(f"{value:.3f}" for value in share)
        )
    return "\n\n".join(parts)


def _citations(architecture: Mapping[str, Any], settings: VFSettings) -> str:
    """Return the papers of the pretext, of the network and of nnU-Net as a list."""
    is_of_misfm = architecture["network_class_name"] in (PCT_NET_PATH, FMUNET_PATH)
    is_cited = {
        _VOLUME_FUSION: settings.has_fusion or is_of_misfm,
        _MASKED_AUTOENCODING: settings.has_mask,
        _NNUNET: True,
    }
    return "\n".join(f"- {paper}" for paper, cited in is_cited.items() if cited)


def _commands(metadata: Mapping[str, Any]) -> str:
    if can_be_planned(metadata["architecture"]):
        return f"nnUNetv2_vf plan -d ID --like {ARTIFACT_NAME}      # prints the next commands"
    command = finetune_command("ID", metadata["configuration"], 0, "PLANS", ARTIFACT_NAME)
    name = metadata["architecture"]["network_class_name"]
    return f"# plan --like and adapt refuse this network: use PLANS with {name}\n{command}"
