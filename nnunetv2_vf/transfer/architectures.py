"""The entry ``architecture`` of plans: check which network it names, and build that network.

nnU-Net's ``get_network_from_plans`` imports the names in this entry and calls them with the entry's arguments. An entry
from somebody else's file could therefore run any code, so only the networks and layers listed here are accepted. Plans
in ``nnUNet_preprocessed`` are the user's own and are not checked.

One network can have several names. Files and plans may hold any of them; whoever reads or writes an entry passes it
through :func:`canonical_architecture`, so that two names of one network are equal everywhere else.
"""

from __future__ import annotations

import functools
import inspect
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from pydoc import locate
from typing import Any

import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from torch import nn

from nnunetv2_vf.errors import UserError
from nnunetv2_vf.fmunet import FMUNET_PATH
from nnunetv2_vf.pct_net import PCT_NET_PATH
from nnunetv2_vf.transfer.safe_loading import malformed_file_errors

PLAIN_UNET, _RESIDUAL_ENCODER_UNET, _PRIMUS = (
    f"dynamic_network_architectures.architectures.{name}"
    for name in ("unet.PlainConvUNet", "unet.ResidualEncoderUNet", "primus.Primus")
)
_NETWORKS = (PLAIN_UNET, _RESIDUAL_ENCODER_UNET, _PRIMUS, PCT_NET_PATH, FMUNET_PATH)
# Other names under which nnU-Net finds these networks. It gives the first one to plans from before its version 2.5.
_OTHER_NAMES = {
    "dynamic_network_architectures.architectures.residual_unet.ResidualEncoderUNet": _RESIDUAL_ENCODER_UNET,
    **{name.rpartition(".")[2]: name for name in (PLAIN_UNET, _RESIDUAL_ENCODER_UNET, _PRIMUS)},
}
_GIVEN_BY_NNUNET = ("input_channels", "num_classes", "deep_supervision")  # arguments of networks that plans lack
_LAYER = re.compile(
    r"torch\.nn\.(modules\.(conv|batchnorm|instancenorm|dropout|activation)\.)?"
    r"(Conv[123]d|BatchNorm[123]d|InstanceNorm[123]d|Dropout[123]?d?|LeakyReLU|ReLU|PReLU|ELU|SELU|GELU|SiLU|Mish)"
)


def canonical_architecture(architecture: Mapping[str, Any]) -> dict[str, Any]:
    """Return an entry ``architecture`` in which a known network has the name that nnU-Net's plans now give it."""
    return {**architecture, "network_class_name": canonical_network(architecture["network_class_name"])}


def complete_arguments(architecture: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a network, with short names of layers, and with the defaults of PCT-Net and FMUNet.

    A file may hold a default that plans leave out. Both describe the same network.
    """
    arguments = {name: canonical_layer(value) for name, value in architecture["arch_kwargs"].items()}
    if architecture["network_class_name"] not in (PCT_NET_PATH, FMUNET_PATH):
        return arguments
    parameters = inspect.signature(locate(architecture["network_class_name"])).parameters  # type: ignore[arg-type]
    defaults = {
        name: parameter.default
        for name, parameter in parameters.items()
        if parameter.default is not parameter.empty and name not in _GIVEN_BY_NNUNET
    }
    layers = {name: f"torch.nn.{value.__name__}" for name, value in defaults.items() if isinstance(value, type)}
    plain: dict[str, Any] = json.loads(json.dumps({**defaults, **layers}))  # lists, as in plans
    return {**plain, **arguments}


def canonical_network(name: str) -> str:
    """Return the name that nnU-Net's plans now give to a network; other networks keep their name."""
    return _OTHER_NAMES.get(name, name)


def canonical_layer(value: Any) -> Any:
    """Return the short name of a layer: ``torch.nn.Conv3d`` for ``torch.nn.modules.conv.Conv3d``.

    Args:
        value: of any argument of a network; what is no name of a layer is returned as it is.
    """
    match = _LAYER.fullmatch(value) if isinstance(value, str) else None
    return f"torch.nn.{match[3]}" if match else value


def require_known_architecture(architecture: Any, file: Path | str) -> None:
    """Raise UserError unless an entry ``architecture`` names only 3D networks and layers that are listed here.

    Args:
        architecture: of unknown type and content.
        file: where it comes from, for the message.
    """
    with malformed_file_errors(file):
        problem = _find_unknown(architecture)
    if problem:
        raise UserError(f"{file} {problem}")


def _find_unknown(architecture: Mapping[str, Any]) -> str | None:
    """Return what an entry ``architecture`` names that is not listed here, for a message after the name of a file."""
    name, kwargs = canonical_network(architecture["network_class_name"]), architecture["arch_kwargs"]
    if name not in _NETWORKS:
        return f"names the network {name!r}; legal: {', '.join(_NETWORKS)}"
    layers = {key: kwargs.get(key) for key in architecture["_kw_requires_import"]}
    for key, layer in layers.items():
        if layer is not None and not (isinstance(layer, str) and _LAYER.fullmatch(layer)):
            return (
                f"names {layer!r} as the {key} of its network; legal: convolutions, batch and instance norms, dropouts "
                "and common activations of torch.nn"
            )
    if not str(kwargs.get("conv_op", "3d")).endswith("3d"):
        return f"holds weights of a network with {kwargs['conv_op']}; legal: 3D networks"
    missing = layers.keys() - kwargs.keys()
    return f"lacks the argument {min(missing)} of its network" if missing else None


def is_known(architecture: Mapping[str, Any]) -> bool:
    """Return True if ``plan --like`` and ``adapt`` may build the network of a file."""
    return _find_unknown(architecture) is None


def can_be_planned(architecture: Mapping[str, Any]) -> bool:
    """Return True if ``plan --like`` can plan the network: it is known and takes patches of many sizes, unlike Primus.

    Whoever suggests ``plan --like`` asks here first.
    """
    strides = architecture["arch_kwargs"].get("strides", ())
    takes_many_sizes = bool(strides) and all(not isinstance(stride, int) and len(stride) == 3 for stride in strides)
    return takes_many_sizes and is_known(architecture)


def refusal_warning(architecture: Mapping[str, Any], file: str) -> str | None:
    """Return a warning if ``plan --like`` and ``adapt`` will refuse a file of weights; None if they take it.

    Args:
        architecture: of the user's own plans, by which the file will be trained.
        file: its name, for the message.
    """
    problem = _find_unknown(architecture)
    if problem is None:
        return None
    return (
        "WARNING: nnUNetv2_vf plan --like and adapt will refuse the weights of this training, because "
        f"{file} {problem}. Only trainings with plans of the same network can start from it: nnUNetv2_train ... "
        "-pretrained_weights"
    )


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
        device: on "meta" the network has shapes, but no weights. A network of the user's own that cannot be built
            there, because it reads values of tensors, is built on the CPU.
        deep_supervision: None for networks without this argument.

    Raises:
        UserError: the network does not exist or does not accept these arguments.
    """
    name = canonical_network(architecture["network_class_name"])
    build = functools.partial(
        get_network_from_plans,
        name,
        architecture["arch_kwargs"],
        architecture["_kw_requires_import"],
        input_channels,
        num_classes,
        deep_supervision=deep_supervision,
    )
    try:
        if device == "meta" and name not in _NETWORKS:
            return _build_on_meta_or_cpu(build)
        with torch.device(device):
            return build(allow_init=device != "meta")
    except TypeError as error:
        raise UserError(
            f"cannot build the network {architecture['network_class_name']}: {error}; legal: {_legal_arguments(name)}"
        ) from error
    except KeyError as error:
        message = f"its entry _kw_requires_import names {error}, which is no argument in arch_kwargs"
        raise UserError(f"cannot build the network {architecture['network_class_name']}: {message}") from error
    except Exception as error:  # a wrong argument, such as a stride of 0, may raise anything
        raise UserError(f"cannot build the network {architecture['network_class_name']}: {error}") from error


def _legal_arguments(name: str) -> str:
    """Return the arguments that plans may give to the network of this dotted path."""
    network: Any = locate(name)
    return ", ".join(key for key in inspect.signature(network).parameters if key not in _GIVEN_BY_NNUNET)


def _build_on_meta_or_cpu(build: Callable[..., nn.Module]) -> nn.Module:
    """Build a network of the user's own on "meta" or, if that fails, on the CPU; the random state is kept."""
    try:
        with torch.device("meta"):
            return build(allow_init=False)
    except Exception:  # its code may raise anything
        with torch.random.fork_rng(devices=[]):
            return build()
