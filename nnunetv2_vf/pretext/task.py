"""A batch of the chosen pretext: the input of the network, its targets, its loss, and what its output channels mean.

The network has K + 1 output channels for the fusion classes, then one for each restored image channel; a pretext
without fusion or without a mask lacks the former or the latter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nnunetv2_vf.pretext.fusion import fuse_batch
from nnunetv2_vf.pretext.masking import RestorationLoss, RestorationTarget, hide
from nnunetv2_vf.settings import VFSettings

# Without fusion, as published, only hidden voxels count. With fusion, visible ones count a little: our choice, not
# compared with others.
_VISIBLE_WEIGHT = {"masked": 0.0, "fusion+masked": 0.1}


class PretextBatch(NamedTuple):
    """Network input and targets. A target that the pretext does not use is None."""

    data: Tensor  # B, C, D, H, W
    fusion_map: Tensor | None = None  # B, D, H, W; uint8
    restoration: RestorationTarget | None = None


def make_batch(tensors: Mapping[str, Tensor], settings: VFSettings, device: torch.device) -> PretextBatch:
    """Return input and targets on ``device``, without waiting for a GPU.

    Args:
        tensors: of :func:`nnunetv2_vf.pretext.loader.collate`; they are not changed.
    """
    tensors = {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}
    if settings.has_fusion:
        volume, fusion_map = fuse_batch(tensors, settings.coefficient_steps), tensors["fusion_map"]
    else:
        volume, fusion_map = tensors["volume"], None
    if not settings.has_mask:
        return PretextBatch(volume, fusion_map)
    restoration = RestorationTarget(volume, tensors["mask"])
    return PretextBatch(hide(restoration), fusion_map, restoration)


def output_names(settings: VFSettings, channels: int) -> list[str]:
    """Return the names of the network's output channels: ``fusion_0_of_4``, ..., ``restored_0``, ...

    Args:
        channels: number of image channels.
    """
    steps = settings.coefficient_steps
    fusion = [f"fusion_{label}_of_{steps}" for label in range(settings.num_fusion_classes)]
    return fusion + [f"restored_{channel}" for channel in range(channels if settings.has_mask else 0)]


def split_output(output: Tensor, settings: VFSettings) -> tuple[Tensor, Tensor]:
    """Return the logits of the fusion classes and the restored intensities; either may have no channels.

    Args:
        output: (B, channels, D, H, W), of the network.
    """
    classes = settings.num_fusion_classes
    return output[:, :classes], output[:, classes:]


class PretextLoss(nn.Module):
    """The loss of a pretext with a mask: nnU-Net's loss of the fusion classes plus the weighted restoration loss.

    Args:
        fusion_loss: nnU-Net's loss of the fusion classes; not used without fusion.
        scale_weights: of the outputs of deep supervision, as in nnU-Net's loss; (1,) without deep supervision.
    """

    def __init__(self, fusion_loss: nn.Module, scale_weights: Sequence[float], settings: VFSettings):
        super().__init__()
        self.fusion_loss = fusion_loss
        self.restoration_loss = RestorationLoss(_VISIBLE_WEIGHT[settings.pretext], scale_weights)
        self.settings = settings

    def forward(
        self, outputs: Tensor | list[Tensor], classes: Tensor | list[Tensor] | None, restoration: RestorationTarget
    ) -> Tensor:
        """Return the loss.

        Args:
            outputs: of the network, a list with deep supervision, the largest first.
            classes: the fusion maps, in the form that ``fusion_loss`` expects; None without fusion.
        """
        scales = outputs if isinstance(outputs, (list, tuple)) else [outputs]
        parts = [split_output(output, self.settings) for output in scales]
        loss = self.restoration_loss([restored for _, restored in parts], restoration)
        if not self.settings.has_fusion:
            return loss
        logits = [logits for logits, _ in parts]
        fusion_loss = self.fusion_loss(logits if isinstance(outputs, (list, tuple)) else logits[0], classes)
        return fusion_loss + self.settings.reconstruction_weight * loss
