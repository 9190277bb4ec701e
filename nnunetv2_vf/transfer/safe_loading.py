"""What files from elsewhere may say: a closed list of networks and layers, since nnU-Net calls what is named there.

``weights_only=True`` keeps a file's pickle from running code, but nnU-Net's ``get_network_from_plans`` looks up names
from a plan's architecture and calls them with the plan's arguments. Plans in ``nnUNet_preprocessed`` are the user's own
and are not asked.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nnunetv2_vf.errors import UserError

_NETWORKS = (
    "dynamic_network_architectures.architectures.unet.PlainConvUNet",
    "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet",
    "dynamic_network_architectures.architectures.primus.Primus",
    "nnunetv2_vf.pct_net.PCTNet",
)
_LAYER = re.compile(
    r"torch\.nn\.(modules\.(conv|batchnorm|instancenorm|dropout|activation)\.)?"
    r"(Conv[123]d|BatchNorm[123]d|InstanceNorm[123]d|Dropout[123]?d?|LeakyReLU|ReLU|PReLU|ELU|SELU|GELU|SiLU|Mish)"
)


def require_known_architecture(architecture: Any, file: Path | str) -> None:
    """Raise UserError unless a plan's entry ``architecture`` names nothing but 3D networks and layers known here."""
    with as_described(file):
        name, kwargs = architecture["network_class_name"], architecture["arch_kwargs"]
        layers = {key: kwargs.get(key) for key in architecture["_kw_requires_import"]}
    if name not in _NETWORKS:
        raise UserError(f"{file} names the network {name!r}; legal: {', '.join(_NETWORKS)}")
    for key, layer in layers.items():
        if layer is not None and not (isinstance(layer, str) and _LAYER.fullmatch(layer)):
            raise UserError(f"{file} names {layer!r} as the {key} of its network; legal: layers of torch.nn")
    if str(kwargs.get("conv_op", "3d"))[-2:] != "3d":
        raise UserError(f"{file} holds weights of a network with {kwargs['conv_op']}; legal: 3D networks")


def can_be_planned(architecture: Mapping[str, Any]) -> bool:
    """Whether a network takes patches of many sizes, so that plans can be made for it: not Primus."""
    strides = architecture["arch_kwargs"].get("strides", ())
    return bool(strides) and all(isinstance(stride, int) or len(stride) == 3 for stride in strides)


@contextmanager
def as_described(file: Path | str) -> Iterator[None]:
    """Whatever goes wrong within, because entries of a file are missing or of another kind, is one UserError."""
    try:
        yield
    except UserError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise UserError(f"{file} is not what its entries say: {type(error).__name__} {error}") from error
