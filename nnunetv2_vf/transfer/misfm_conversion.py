"""A released network of MIS-FM, converted; and the checks for every release."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nnunetv2_vf.errors import UserError
from nnunetv2_vf.fmunet import FMUNet
from nnunetv2_vf.pct_net import PCTNet

Network = type[PCTNet] | type[FMUNet]
_NOT_DESCRIBED = ("strides", "norm_op", "norm_op_kwargs")  # they follow from the mode, or are always the same


@dataclass(frozen=True)
class Conversion:
    """A released network: how to build it, and its weights with the names of our network."""

    network: Network
    mode: int
    input_channels: int
    num_classes: int
    arch_kwargs: dict[str, Any]  # plain data, as in plans
    state_dict: dict[str, Tensor]

    @property
    def architecture(self) -> dict[str, Any]:
        """The network as an entry ``architecture`` of plans."""
        return {
            "network_class_name": f"{self.network.__module__}.{self.network.__name__}",
            "arch_kwargs": self.arch_kwargs,
            "_kw_requires_import": ["norm_op"] if "norm_op" in self.arch_kwargs else [],
        }

    def __str__(self) -> str:
        described = {name: value for name, value in self.arch_kwargs.items() if name not in _NOT_DESCRIBED}
        arguments = ", ".join(f"{name} {value}" for name, value in described.items())
        parameters = sum(tensor.numel() for tensor in self.state_dict.values()) / 1e6
        return (
            f"{self.network.__name__} of resolution mode {self.mode}, {self.input_channels} input channels, "
            f"{self.num_classes} output channels, {arguments}; {parameters:.1f} M parameters"
        )


def require_finite_tensors(released: Mapping[Any, Any]) -> None:
    """Raise UserError unless a state dict holds only finite tensors under names."""
    others = [
        str(name) for name, value in released.items() if not (isinstance(name, str) and isinstance(value, Tensor))
    ]
    if others:
        raise UserError(f"the checkpoint is no release of MIS-FM: unexpected {_shorten_list(sorted(others))}")
    for name, value in released.items():
        if not value.isfinite().all():
            raise UserError(f"the checkpoint holds NaN or infinity in {name}")


def not_released(network: Network, reason: str) -> UserError:
    """Return the error that a checkpoint is not MIS-FM's release of a network."""
    return UserError(f"the checkpoint is not MIS-FM's {network.__name__}: {reason}")


def require_none_unexpected(names: Sequence[str], network: Network) -> None:
    """Raise UserError if there are names of tensors that no release of the network has."""
    if names:
        raise not_released(network, f"unexpected {_shorten_list(sorted(names))}")


def axis_length(state: Mapping[str, Tensor], network: Network, tensor: str, axis: int) -> int:
    """Return the length of an axis of a tensor that describes the network.

    Raises:
        UserError: the tensor is missing or has fewer axes.
    """
    if tensor not in state:
        raise not_released(network, f"it lacks the tensor that {network.__name__} calls {tensor}")
    shape = tuple(state[tensor].shape)
    if axis >= len(shape):
        raise not_released(network, f"the tensor that {network.__name__} calls {tensor} has the shape {shape}")
    return shape[axis]


def require_complete(converted: Conversion) -> None:
    """Raise UserError unless names, shapes and types are those of the network that the arguments describe."""
    kwargs = {key: value for key, value in converted.arch_kwargs.items() if key != "norm_op"}
    try:
        with torch.device("meta"):
            network = converted.network(converted.input_channels, num_classes=converted.num_classes, **kwargs)
    except ValueError as error:
        raise not_released(converted.network, str(error)) from error
    expected = {name: _format_type(tensor) for name, tensor in network.state_dict().items()}
    found = {name: _format_type(tensor) for name, tensor in converted.state_dict.items()}
    wrong = [
        f"{tensor} {found.get(tensor, 'missing')} (expected {expected.get(tensor, 'nothing')})"
        for tensor in sorted({*expected, *found})
        if expected.get(tensor) != found.get(tensor)
    ]
    if wrong:
        name = converted.network.__name__
        raise UserError(f"the checkpoint does not fit the {name} that its tensors describe: {_shorten_list(wrong)}")


def _shorten_list(entries: list[str]) -> str:
    """Join entries for a message; of many, only the first three."""
    hidden = len(entries) - 3
    return ", ".join(entries[:3]) + (f" and {hidden} more" if hidden > 0 else "")


def _format_type(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
