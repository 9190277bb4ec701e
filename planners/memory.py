"""GPU memory of a training step, counted on fake tensors: no GPU, no data, a second or two.

nnU-Net's own planner compares feature map sizes with a reference U-Net; attention does not fit that yardstick.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

GIB = 2**30
_ADAM_STATES = 2  # per parameter


@dataclass(frozen=True)
class StepMemory:
    """Bytes of an uncompiled training step of nnU-Net on CUDA (autocast to half precision, Adam), at its peak."""

    parameters: int  # weights, gradients and the optimiser's state
    activations: int  # what autograd keeps for the backward pass, half-precision copies of the weights included
    transient: int  # what the backward pass adds before it frees anything: a gradient of the largest feature map

    @property
    def total(self) -> int:
        return self.parameters + self.activations + self.transient


def measure_step(build: Callable[[], nn.Module], batch_size: int, channels: int, patch: Sequence[int]) -> StepMemory:
    """Count what one training step with nnU-Net's Dice and cross-entropy loss keeps in memory.

    Args:
        build: makes the network (a PCT-Net or a convolutional one); with deep supervision if that is how it is trained.
        channels: of the input.
        patch: D, H, W in voxels.
    """
    kept: dict[Any, Any] = {}  # storages stay referenced, so that none is counted twice or under a recycled name

    def keep(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            storage = tensor.untyped_storage()
            kept[storage._cdata] = storage
        return tensor

    # Fake tensors of the CPU, which every build of torch has. CUDA's kernels keep 3 to 5 % less: one byte of a
    # dropout's mask, where the CPU's keep two.
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
    """Take the kernel that CUDA takes for attention with a bias; a CPU takes the plain one, which keeps all weights."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        query, key, value = args
        bias = kwargs["attn_mask"].expand(query.shape[0], query.shape[1], -1, -1)
        return torch.ops.aten._scaled_dot_product_efficient_attention(
            query, key, value, bias, compute_log_sumexp=True, dropout_p=kwargs["dropout_p"]
        )[0]
