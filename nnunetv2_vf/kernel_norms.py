"""Pretrained kernels at the norm of new ones, so that fine-tuning turns them as fast as training from scratch does.

A convolution that a normalisation follows does the same at any norm of its kernel, but a step of the optimiser turns
a kernel that has grown to twice its norm half as far (Adam), or a quarter (SGD): it has a lower learning rate than a
new one (van Laarhoven, "L2 Regularization versus Batch and Weight Normalization", arXiv 1706.05350). Long pretraining
makes kernels grow; docs/label_efficiency.md has what that costs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from dynamic_network_architectures.building_blocks.simple_conv_blocks import ConvDropoutNormReLU
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm


@torch.no_grad()
def match_kernel_norms(network: nn.Module, fresh: nn.Module) -> list[float]:
    """Scale the kernels that an instance normalisation follows, with their biases, to the norms of another network's.

    What the network computes stays the same, but for rounding and the normalisation's epsilon. Kernels before a batch
    normalisation (PCT-Net) are left alone: its running statistics are of the norm that they have.

    Args:
        fresh: the same network with new weights.

    Returns:
        The factor of each kernel that was scaled.
    """
    factors = []
    for conv, like in zip(_before_instance_norms(network), _before_instance_norms(fresh), strict=True):
        norm = conv.weight.norm()
        if norm == 0:  # there is no direction to keep
            continue
        factor = like.weight.norm().to(norm.device) / norm
        conv.weight.mul_(factor)
        if conv.bias is not None:
            conv.bias.mul_(factor)
        factors.append(float(factor))
    return factors


def _before_instance_norms(network: nn.Module) -> Iterator[_ConvNd]:
    for module in network.modules():
        norm = getattr(module, "norm", None) if isinstance(module, ConvDropoutNormReLU) else None
        if isinstance(norm, _InstanceNorm) and not norm.track_running_stats:
            yield cast(_ConvNd, module.conv)
