"""Small networks with random weights: nnU-Net's U-Nets, PCT-Net and FMUNet."""

from __future__ import annotations

import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from torch import nn

from nnunetv2_vf.five_level_network import MODES
from nnunetv2_vf.fmunet import FMUNet
from nnunetv2_vf.pct_net import PCTNet
from nnunetv2_vf.transfer.architectures import build_network


class OwnUNet(PlainConvUNet):
    """A network of a user's own. Like many, it computes with tensors when it is built, which "meta" tensors cannot."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.drop_path_rates = [rate.item() for rate in torch.linspace(0, 0.1, 3)]


def unet(
    channels=1,
    kernels=((3, 3, 3),) * 3,
    strides=((1, 1, 1), (2, 2, 2), (2, 2, 2)),
    features=4,
    residual=False,
    classes=5,
):
    """Return nnU-Net's U-Net or residual encoder U-Net with instance norm and one stage for each kernel."""
    stages = len(kernels)
    kwargs = {
        "n_stages": stages,
        "features_per_stage": [features] * stages,
        "conv_op": "torch.nn.modules.conv.Conv3d",
        "kernel_sizes": kernels,
        "strides": strides,
        "n_blocks_per_stage" if residual else "n_conv_per_stage": [2] * stages,
        "n_conv_per_stage_decoder": [1] * (stages - 1),
        "conv_bias": True,
        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "nonlin": "torch.nn.LeakyReLU",
    }
    name = "ResidualEncoderUNet" if residual else "PlainConvUNet"
    entry = {
        "network_class_name": f"dynamic_network_architectures.architectures.unet.{name}",
        "arch_kwargs": kwargs,
        "_kw_requires_import": ["conv_op", "norm_op", "nonlin"],
    }
    return randomise(build_network(entry, channels, classes, device="cpu"))


def pct_net(mode=0, channels=1, window=3):
    return randomise(PCTNet(channels, (4, 8, 8, 16, 32), MODES[mode], 5, window_sizes=(window,) * 3))


def fmunet(mode=0, channels=1):
    return randomise(FMUNet(channels, (4, 8, 8, 16, 32), MODES[mode], 5))


def randomise(network: nn.Module) -> nn.Module:
    """Draw all parameters at random, also biases and norms, which are constant in new networks; switch to eval mode."""
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2)
    return network.eval()
