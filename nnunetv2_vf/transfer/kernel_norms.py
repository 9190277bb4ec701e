"""Pretrained kernels at the norm of new ones, so that fine-tuning turns them as fast as training from scratch does.

A convolution that a normalisation follows does the same at any norm of its kernel, but a step of the optimiser turns
a kernel of twice the norm half as far (Adam), or a quarter (SGD): it has a lower learning rate than a new one (van
Laarhoven, "L2 Regularization versus Batch and Weight Normalization", arXiv 1706.05350). Kernels that were pretrained
with Adam have grown, most of all in the decoder: docs/label_efficiency.md has by how much, and what it costs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import cast

import torch
from dynamic_network_architectures.building_blocks.simple_conv_blocks import ConvDropoutNormReLU
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.instancenorm import _InstanceNorm

from nnunetv2_vf.network_parts import part_of


def kernel_factors(network: nn.Module, fresh: nn.Module, parts: Collection[str]) -> dict[str, float]:
    """By what to multiply kernels to give them the norms of another network's.

    Those of nnU-Net's convolution blocks (U-Net, ResEnc) that an instance norm follows at once; one factor for all
    filters of a kernel, so that their rates are those of new ones on average.

    Args:
        fresh: the same network with new weights.
        parts: ``encoder``, ``decoder`` or both.

    Returns:
        Name of the convolution -> factor; kernels of norm 0 have no direction to keep and are left out.
    """
    factors = {}
    for (name, conv), (_, new) in zip(_before_instance_norms(network), _before_instance_norms(fresh), strict=True):
        norm, norm_of_new = (float(kernel.detach().double().norm()) for kernel in (conv.weight, new.weight))
        if part_of(name) in parts and norm > 0 and norm_of_new > 0:
            factors[name] = norm_of_new / norm
    return factors


@torch.no_grad()
def scale_kernels(network: nn.Module, factors: Mapping[str, float]) -> None:
    """Multiply kernels; what the network computes stays the same but for rounding and the normalisation's epsilon."""
    for name, factor in factors.items():
        cast(_ConvNd, network.get_submodule(name)).weight.mul_(factor)


def _before_instance_norms(network: nn.Module) -> Iterator[tuple[str, _ConvNd]]:
    """Each convolution once, with its name; an encoder that a decoder lists too is the encoder."""
    for name, module in network.named_modules():
        if isinstance(module, ConvDropoutNormReLU):
            conv, *others = (layer for layer in module.all_modules if not isinstance(layer, _DropoutNd))
            # with running statistics it would follow the kernel's norm only after a while
            if others and isinstance(others[0], _InstanceNorm) and not others[0].track_running_stats:
                yield f"{name}.conv", cast(_ConvNd, conv)
