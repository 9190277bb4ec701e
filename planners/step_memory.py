"""GPU memory of one training step, counted on fake tensors: needs no GPU and no data, takes a second or two.

nnU-Net's planner estimates memory by comparing feature map sizes with a reference U-Net. That does not hold for
attention.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from nnunetv2_vf.transfer.architectures import build_network, network_name

GIB = 2**30
USABLE_FRACTION = 0.9  # of the GPU memory; CUDA's context, cuDNN's workspaces and fragmentation take the rest
_ADAM_STATES = 2  # per parameter

# nnU-Net's planners (ExperimentPlanner, ResEncUNetPlanner) put this many elements of convolution outputs on 8 GB, in
# a batch of 2. nnU-Net's own networks are measured by these numbers, so that they get the patches its users know.
_NNUNET_ELEMENTS = {"PlainConvUNet": 560_000_000, "ResidualEncoderUNet": 680_000_000}
_NNUNET_BYTES = 8 * GIB
_NNUNET_BATCH_SIZE = 2


@dataclass(frozen=True)
class StepMemory:
    """Peak memory in bytes of nnU-Net's uncompiled training step on CUDA (autocast to half precision, Adam).

    Attributes:
        parameters: weights, their gradients and the optimiser's state.
        activations: tensors that autograd keeps for the backward pass, with the half-precision copies of the weights.
        transient: memory that the backward pass adds before it frees any: a gradient of the largest feature map.
    """

    parameters: int
    activations: int
    transient: int

    @property
    def total(self) -> int:
        return self.parameters + self.activations + self.transient

    def growth_within(self, available: float) -> float:
        """Return the factor by which batch or patch can grow until the step takes ``available`` bytes.

        Activations grow almost linearly with the number of voxels; the parameters do not grow.
        """
        return (available - self.parameters) / (self.total - self.parameters)


def measure_architecture(
    architecture: Mapping[str, Any], channels: int, classes: int, patch: Sequence[int], batch_size: int
) -> StepMemory:
    """Return the memory of a training step of a network.

    Args:
        architecture: the entry ``architecture`` of a plan.
        channels: input channels.
        classes: output channels.
        patch: D, H, W in voxels.
    """
    build = functools.partial(build_network, architecture, channels, classes)
    elements_on_8_gb = _NNUNET_ELEMENTS.get(network_name(architecture))
    if elements_on_8_gb is None:
        return measure_step(functools.partial(build, device="cpu"), channels, patch, batch_size)
    network: Any = build()
    elements = network.compute_conv_feature_map_size(patch) * batch_size / _NNUNET_BATCH_SIZE
    activations = int(elements / elements_on_8_gb * USABLE_FRACTION * _NNUNET_BYTES)
    return StepMemory(parameters=0, activations=activations, transient=0)


def measure_step(build: Callable[[], nn.Module], channels: int, patch: Sequence[int], batch_size: int) -> StepMemory:
    """Count the memory of one training step with nnU-Net's Dice and cross-entropy loss.

    Args:
        build: makes the network (PCT-Net or a convolutional network), with deep supervision if it is trained with it.
        channels: input channels.
        patch: D, H, W in voxels.
    """
    kept: dict[Any, Any] = {}  # holds each storage: a freed one could pass its id on to another and hide it

    def keep(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            storage = tensor.untyped_storage()
            kept[storage._cdata] = storage
        return tensor

    # Fake CPU tensors work with every build of torch. CUDA's kernels keep 3 to 5 % less: their dropout mask takes one
    # byte per element, the CPU's takes two.
    with FakeTensorMode(), torch.autocast("cpu", torch.float16), _FusedAttention():
        network = build().train()
        dice = {"batch_dice": True, "do_bg": False, "smooth": 1e-5, "ddp": False}
        loss = DC_and_CE_loss(dice, {}, dice_class=MemoryEfficientSoftDiceLoss)
        data = torch.empty(batch_size, channels, *patch)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            outputs = network(data)
            for output in outputs if isinstance(outputs, list) else [outputs]:
                loss(output, torch.empty(batch_size, 1, *output.shape[2:], dtype=torch.int16))
        weights = sum(p.numel() * p.element_size() for p in network.parameters())
    sizes = [storage.nbytes() for storage in kept.values()]
    return StepMemory((2 + _ADAM_STATES) * weights, sum(sizes), max(sizes))


class _FusedAttention(TorchFunctionMode):
    """Use CUDA's fused kernel for attention with a bias. The CPU's kernel is not fused and keeps all weights."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        query, key, value = args
        bias = kwargs["attn_mask"].expand(query.shape[0], query.shape[1], -1, -1)
        return torch.ops.aten._scaled_dot_product_efficient_attention(
            query, key, value, bias, compute_log_sumexp=True, dropout_p=kwargs["dropout_p"]
        )[0]
