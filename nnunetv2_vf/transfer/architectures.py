"""The entry ``architecture`` of plans: check which network it names, and build that network.

nnU-Net's ``get_network_from_plans`` imports the names in this entry and calls them with the entry's arguments. An entry
from somebody else's file could therefore run any code, so only the networks and layers listed here are accepted. Plans
in ``nnUNet_preprocessed`` are the user's own and are not checked.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from torch import nn

from nnunetv2_vf.errors import UserError
from nnunetv2_vf.pct_net import PCT_NET_PATH
from nnunetv2_vf.transfer.safe_loading import malformed_file_errors

_NETWORKS = (
    "dynamic_network_architectures.architectures.unet.PlainConvUNet",
    "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet",
    "dynamic_network_architectures.architectures.primus.Primus",
    PCT_NET_PATH,
)
_LAYER = re.compile(
    r"torch\.nn\.(modules\.(conv|batchnorm|instancenorm|dropout|activation)\.)?"
    r"(Conv[123]d|BatchNorm[123]d|InstanceNorm[123]d|Dropout[123]?d?|LeakyReLU|ReLU|PReLU|ELU|SELU|GELU|SiLU|Mish)"
)


def require_known_architecture(architecture: Any, file: Path | str) -> None:
    """Raise UserError unless an entry ``architecture`` names only 3D networks and layers that are listed here.

    Args:
        architecture: of unknown type and content.
        file: where it comes from, for the message.
    """
    with malformed_file_errors(file):
        name, kwargs = architecture["network_class_name"], architecture["arch_kwargs"]
        layers = {key: kwargs.get(key) for key in architecture["_kw_requires_import"]}
    if name not in _NETWORKS:
        raise UserError(f"{file} names the network {name!r}; legal: {', '.join(_NETWORKS)}")
    for key, layer in layers.items():
        if layer is not None and not (isinstance(layer, str) and _LAYER.fullmatch(layer)):
            raise UserError(
                f"{file} names {layer!r} as the {key} of its network; legal: convolutions, batch and instance norms, "
                "dropouts and common activations of torch.nn"
            )
    if not str(kwargs.get("conv_op", "3d")).endswith("3d"):
        raise UserError(f"{file} holds weights of a network with {kwargs['conv_op']}; legal: 3D networks")


def can_be_planned(architecture: Mapping[str, Any]) -> bool:
    """Return True if plans can be made for the network: it is 3D and takes patches of many sizes (Primus does not)."""
    strides = architecture["arch_kwargs"].get("strides", ())
    return bool(strides) and all(not isinstance(stride, int) and len(stride) == 3 for stride in strides)


def network_name(architecture: Mapping[str, Any]) -> str:
    """Return the name of the network's class, such as ``PlainConvUNet``."""
    return str(architecture["network_class_name"]).rpartition(".")[2]


def build_network(
    architecture: Mapping[str, Any],
    input_channels: int,
    num_classes: int,
    device: str = "meta",
    deep_supervision: bool | None = True,
) -> nn.Module:
    """Build the network of an entry ``architecture``.

    Args:
        device: on "meta" the network has shapes, but no weights.
        deep_supervision: None for networks without this argument.

    Raises:
        UserError: the network does not exist or does not accept these arguments.
    """
    try:
        with torch.device(device):
            return get_network_from_plans(
                architecture["network_class_name"],
                architecture["arch_kwargs"],
                architecture["_kw_requires_import"],
                input_channels,
                num_classes,
                allow_init=device != "meta",
                deep_supervision=deep_supervision,
            )
    except (ImportError, TypeError, ValueError, AssertionError) as error:
        raise UserError(f"cannot build the network {architecture['network_class_name']}: {error}") from error
