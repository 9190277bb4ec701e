from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from foreign_checkpoints import FEATURES, WINDOWS, fmunet_release, misfm_network, misfm_release, released_index
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

from nnunetv2_vf.cli import main
from nnunetv2_vf.errors import UserError
from nnunetv2_vf.five_level_network import MODES
from nnunetv2_vf.fmunet import FMUNet
from nnunetv2_vf.transfer.artifact import read_artifact
from nnunetv2_vf.transfer.convert_misfm import convert_state_dict


@pytest.mark.parametrize("mode", [0, 1, 2])
def test_the_arguments_of_the_network_are_read_from_the_tensors(mode):
    released = misfm_release(mode)
    converted = convert_state_dict(released)
    assert converted.mode == mode
    assert (converted.input_channels, converted.num_classes) == (2, 3)
    assert converted.arch_kwargs == {
        "features_per_stage": list(FEATURES),
        "strides": [list(stride) for stride in MODES[mode]],
        "depths": [2, 2, 2],
        "num_heads": [4, 8, 16],
        "window_sizes": list(WINDOWS),
        "norm_op": "torch.nn.modules.batchnorm.BatchNorm3d",
        "norm_op_kwargs": {"affine": True},
    }
    target = misfm_network(mode)
    target.load_state_dict(converted.state_dict)
    assert torch.equal(target.encoder.stem.bias, released[f"embeddings.{mode}.proj.bias"].float())


def test_every_pair_of_tokens_keeps_its_position_bias():
    released = misfm_release(0)
    target = misfm_network(0)
    target.load_state_dict(convert_state_dict(released).state_dict)
    for level, stage in ((2, target.encoder.stages[2]), (4, target.encoder.stages[4])):
        attention = stage.attention[1].attention
        w = attention.window_size
        table = released[f"pyramid_ct.convtrans_e{level}.trans.blocks.1.attn.relative_position_bias_table"].float()
        assert len(released_index(w).unique()) < (2 * w - 1) ** 3  # the released offsets share rows
        converted_bias = attention.position_bias[attention.index.reshape(w**3, w**3)]
        assert torch.equal(converted_bias, table[released_index(w)])


TABLE = "pyramid_ct.convtrans_e2.trans.blocks.0.attn.relative_position_bias_table"
INDEX = TABLE.replace("bias_table", "index")


@pytest.mark.parametrize(
    ("change", "mode", "message"),
    [
        ({"pyramid_ct.extra.weight": torch.ones(1)}, 1, "unexpected pyramid_ct.extra.weight"),
        ({"pyramid_ct.extra.norm_layer.weight": torch.ones(1)}, 1, "unexpected pyramid_ct.extra.norm_layer.weight"),
        ({"embeddings.1.proj.bias": "text"}, 1, "unexpected embeddings.1.proj.bias"),
        ({"embeddings.2.note": "text"}, 1, "unexpected embeddings.2.note"),
        ({3: torch.ones(1)}, 1, "unexpected 3"),
        ({"embeddings.1.proj.bias": torch.full((4,), torch.nan)}, 1, "NaN or infinity in embeddings.1.proj.bias"),
        ({"embeddings.1.proj.bias": torch.ones(5)}, 1, r"encoder.stem.bias \(5,\) float32 \(expected \(4,\)"),
        ({"embeddings.1.proj.bias": torch.ones(4).long()}, 1, r"encoder.stem.bias \(4,\) int64 \(expected \(4,\)"),
        ({"pyramid_ct.up4.up.0.bias": None}, 1, r"decoder.ups.0.up.0.bias missing \(expected \(32,\)"),
        ({"embeddings.1.proj.weight": None}, 1, "lacks the tensor that PCTNet calls .*encoder.stem.weight"),
        ({TABLE: torch.ones(125)}, 1, f"unexpected {TABLE}"),
        ({TABLE: torch.ones(125, 0)}, 1, f"unexpected {TABLE}"),
        ({TABLE: torch.ones(124, 4)}, 1, f"unexpected {TABLE}"),
        ({INDEX: torch.eye(27)}, 1, f"unexpected {TABLE}"),
        ({INDEX: torch.ones(10**6).long()}, 1, f"unexpected {TABLE}"),
        ({INDEX: released_index(2)}, 1, f"unexpected {TABLE}"),
        ({INDEX: None}, 1, f"unexpected {TABLE}"),
        ({}, 0, "--mode 0, but .* trained with resolution mode 1"),
        (
            {"embeddings.1.conv0.conv_conv.0.num_batches_tracked": torch.tensor(0)},
            None,
            r"take resolution_mode .*--mode 0\|1\|2",
        ),
    ],
)
def test_unexpected_tensors_are_listed_and_rejected(change, mode, message):
    released = {name: value for name, value in {**misfm_release(1), **change}.items() if value is not None}
    with pytest.raises(UserError, match=message):
        convert_state_dict(released, mode)


@pytest.mark.parametrize("mode", [0, 1, 2])
def test_fmunet_is_recognised_and_its_arguments_are_read_from_the_tensors(mode):
    released = fmunet_release(mode, depth=1)
    converted = convert_state_dict(released)
    assert (converted.mode, converted.input_channels, converted.num_classes) == (mode, 2, 3)
    strides = [list(stride) for stride in MODES[mode]]
    assert converted.arch_kwargs == {"features_per_stage": list(FEATURES), "strides": strides, "depth": 1}
    network = FMUNet(2, FEATURES, MODES[mode], 3, depth=1)
    network.load_state_dict(converted.state_dict)
    assert torch.equal(network.decoder.bottom.convs[0][3].bias, released["decoder.de_conv4.conv_list.0.3.bias"].float())
    assert torch.equal(network.decoder.ups[3].up[0][3].bias, released["decoder.upcat0.up.2.bias"].float())


@pytest.mark.parametrize(
    ("change", "mode", "message"),
    [
        ({"encoder.extra.weight": torch.ones(1)}, None, "unexpected encoder.extra.weight"),
        ({"project.bias": torch.ones(4).long()}, None, r"encoder.stem.bias \(4,\) int64 \(expected \(4,\) float32"),
        ({"project.bias": torch.full((4,), torch.nan)}, None, "NaN or infinity in project.bias"),
        ({"project.bias": torch.ones(5)}, None, r"encoder.stem.bias \(5,\) float32 \(expected \(4,\)"),
        ({"project.weight": None}, None, "lacks the tensor that FMUNet calls encoder.stem.weight"),
        ({"project.weight": torch.ones(4)}, None, r"FMUNet calls encoder.stem.weight has the shape \(4,\)"),
        ({"encoder.en_conv2.conv_list.0.3.weight": torch.tensor(1.0)}, None, r"stages.2.* has the shape \(\)"),
        ({"encoder.en_conv0.conv_list.0.3.weight": torch.ones(4, 4, 3, 1, 3)}, None, r"kernels .*legal: .* \(mode 2\)"),
        ({"out_layers.0.3.weight": torch.ones(3)}, None, "MIS-FM's FMUNet: unexpected out_layers.0.3.weight"),
        ({}, 0, "--mode 0, but the kernels are those of resolution mode 1"),
    ],
)
def test_tensors_that_no_fmunet_has_are_rejected(change, mode, message):
    released = {name: value for name, value in {**fmunet_release(1), **change}.items() if value is not None}
    with pytest.raises(UserError, match=message):
        convert_state_dict(released, mode)


def test_a_pct_net_with_a_tensor_of_other_axes_is_rejected():
    released = {**misfm_release(1), "embeddings.1.proj.weight": torch.ones(4)}
    with pytest.raises(UserError, match=r"MIS-FM's PCTNet: the tensor .* encoder.stem.weight has the shape \(4,\)"):
        convert_state_dict(released)


@pytest.mark.parametrize(("released", "found"), [({}, "none"), ({"unet.weight": torch.ones(1)}, "unet.weight")])
def test_a_checkpoint_of_neither_network_is_rejected(released, found):
    with pytest.raises(UserError, match=f"neither PCT-Net nor FMUNet of MIS-FM.*embeddings.*en_conv.*it has {found}"):
        convert_state_dict(released, 1)


def test_the_command_writes_an_artifact_that_nnunet_can_build(tmp_path, capsys):
    # MIS-FM trains with PyMIC, which stores scores as numpy numbers
    score = {"iteration": 100, "valid_pred": np.float32(0.9), "best": np.float64(0.9), "optimizer_state_dict": {}}
    torch.save({"model_state_dict": misfm_release(1), **score}, tmp_path / "release.pt")
    main(["convert", str(tmp_path / "release.pt"), "-o", str(tmp_path / "out.pth")])
    out = capsys.readouterr().out
    assert "resolution mode 1, 2 input channels, 3 output channels" in out
    assert f"nnUNetv2_vf plan -d ID --like {tmp_path / 'out.pth'}" in out
    artifact = read_artifact(tmp_path / "out.pth")
    assert artifact["vf"]["converted_from"]["project"] == "MIS-FM"
    target = misfm_network(1)
    load_pretrained_weights(target, tmp_path / "out.pth")
    assert torch.equal(target.encoder.stem.weight, artifact["network_weights"]["encoder.stem.weight"])
    build(artifact).load_state_dict(artifact["network_weights"])


def build(artifact: dict, **kwargs) -> torch.nn.Module:
    vf = artifact["vf"]
    architecture = vf["architecture"]
    return get_network_from_plans(
        architecture["network_class_name"],
        architecture["arch_kwargs"],
        architecture["_kw_requires_import"],
        vf["num_input_channels"],
        vf["num_classes"],
        **kwargs,
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no file"),
        (b"not a checkpoint", "cannot be loaded safely: it is damaged"),
        ({"state": {}}, "neither 'model_state_dict' nor 'nnssl_adaptation_plan'"),
        ({"model_state_dict": {}, "written_by": Path("x")}, "loading it would run pathlib"),  # would run code to load
    ],
)
def test_other_files_are_rejected_and_nothing_is_written(tmp_path, content, message):
    path = tmp_path / "release.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(SystemExit, match=message):
        main(["convert", str(path), "-o", str(tmp_path / "out.pth")])
    assert not (tmp_path / "out.pth").exists()


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("no/such/folder/out.pth", "the folder no/such/folder does not exist; make it: mkdir -p no/such/folder"),
        (".", ". is a folder; name a file in it"),
        ("release.pt", "release.pt is the input file; give the output another name"),
    ],
)
def test_an_output_that_cannot_be_written_is_rejected(tmp_path, monkeypatch, output, message):
    monkeypatch.chdir(tmp_path)
    torch.save({"model_state_dict": misfm_release(1)}, "release.pt")
    before = Path("release.pt").read_bytes()
    with pytest.raises(SystemExit, match=message):
        main(["convert", "release.pt", "-o", output])
    assert Path("release.pt").read_bytes() == before


@pytest.mark.parametrize(
    ("network", "mode", "num_outputs"), [("pctnet", 0, 1), ("pctnet", 1, 4), ("fmunet", 0, 4), ("fmunet", 1, 4)]
)
def test_outputs_of_the_original_code_are_reproduced(network, mode, num_outputs, tmp_path, real_data):
    """Compare with outputs of MIS-FM's own code, in ``fixtures`` beside the folder of real test data."""
    path = real_data.parent / "fixtures" / f"misfm_{network}_mode{mode}.pt"
    if not path.is_file():
        pytest.skip(f"no {path}")
    fixture = torch.load(path, weights_only=True)
    main(["convert", str(path), "-o", str(tmp_path / "out.pth"), "--mode", str(mode)])
    artifact = read_artifact(tmp_path / "out.pth")
    converted = build(artifact, deep_supervision=True).eval()
    converted.load_state_dict(artifact["network_weights"])
    with torch.no_grad():
        outputs = converted(fixture["input_int8"].float() * fixture["input_scale"])
    published = list(zip(fixture["outputs_strided"], fixture["strides"], strict=True))
    assert len(published) == num_outputs
    for output, (expected, step) in zip(outputs[: len(published)], published, strict=True):
        torch.testing.assert_close(output[..., ::step, ::step, ::step], expected, atol=1e-4, rtol=0)
