"""Scale pretrained kernels to the norm of freshly initialised ones, so that fine-tuning changes both equally fast.

If a normalisation follows a convolution, the norm of the kernel does not change the result. It does change the learning
rate: a step of the optimiser turns a kernel of twice the norm by half the angle (Adam), or a quarter (SGD). See van
Laarhoven, "L2 Regularization versus Batch and Weight Normalization", arXiv 1706.05350. Adam makes kernels grow during
pretraining, most of all in the decoder: docs/explanation/trials.md says by how much, and what that costs.
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
    """Return the factor that gives each kernel the norm of its freshly initialised counterpart.

    Only kernels of nnU-Net's convolution blocks (U-Net, ResEnc) that an instance norm follows directly get a factor.
    All filters of a kernel get the same one, so that their learning rates are right on average.

    Args:
        fresh: the same network with new weights.
        parts: ``encoder``, ``decoder`` or both.

    Returns:
        name of the convolution -> factor, without kernels whose norm is 0.
    """
    factors = {}
    pairs = zip(_normalized_convolutions(network), _normalized_convolutions(fresh), strict=True)
    for (name, convolution), (_, fresh_convolution) in pairs:
        norm, fresh_norm = (float(conv.weight.detach().double().norm()) for conv in (convolution, fresh_convolution))
        if part_of(name) in parts and norm > 0 and fresh_norm > 0:
            factors[name] = fresh_norm / norm
    return factors


@torch.no_grad()
def scale_kernels(network: nn.Module, factors: Mapping[str, float]) -> None:
    """Multiply kernels; the network's output changes only by rounding and by the epsilon of the normalisation."""
    for name, factor in factors.items():
        cast(_ConvNd, network.get_submodule(name)).weight.mul_(factor)


def _normalized_convolutions(network: nn.Module) -> Iterator[tuple[str, _ConvNd]]:
    """Yield name and module of each convolution that an instance norm follows directly.

    Each comes once: convolutions of the encoder, which nnU-Net's decoder lists too, have their name in the encoder.
    """
    for name, module in network.named_modules():
        if isinstance(module, ConvDropoutNormReLU):
            convolution, *others = (layer for layer in module.all_modules if not isinstance(layer, _DropoutNd))
            # A norm with running statistics would adjust to a scaled kernel only after many steps.
            if others and isinstance(others[0], _InstanceNorm) and not others[0].track_running_stats:
                yield f"{name}.conv", cast(_ConvNd, convolution)
