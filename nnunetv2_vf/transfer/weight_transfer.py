"""Copy pretrained weights into a network of another shape, and report what happened to each tensor."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from nnunetv2_vf.network_parts import HEADS
from nnunetv2_vf.transfer.shared_tensors import storage_key
from nnunetv2_vf.transfer.tensor_rules import fit_tensor

TRANSFERRED, ADAPTED, RANDOM = "transferred", "adapted", "left at random"
# Decoders number their stages from the deepest one, so a level has another number in a deeper network.
_DECODER_STAGE = re.compile(r"^decoder\.(stages|transpconvs|ups|seg_layers)\.(\d+)(?=\.)")


@dataclass(frozen=True)
class TensorOutcome:
    """What happened to one tensor of the target network."""

    name: str
    elements: int
    kind: str  # TRANSFERRED, ADAPTED or RANDOM
    detail: str = ""
    fits: bool = True  # False if the pretrained tensor has another shape and no rule changes it


def transfer_weights(
    pretrained: Mapping[str, Tensor],
    network: nn.Module,
    encoder_only: bool = False,
    random_tensors: frozenset[str] = frozenset(),
) -> list[TensorOutcome]:
    """Copy pretrained weights into a network and fit them to its shapes.

    Args:
        pretrained: weights of the pretrained network. If it is of another class, tensors with the same name and a
            shape that fits are transferred.
        network: changed in place; tensors without a counterpart keep their values.
        encoder_only: if True, the decoder keeps its values.
        random_tensors: names of tensors in ``pretrained`` that were never trained.

    Returns:
        one entry for each tensor of the network; a tensor with several names has one entry.
    """
    input_weights = {f"{key}.weight" for key in getattr(network, "keys_to_in_proj", ())}
    encoder_prefixes = tuple(getattr(network, key, "encoder") + "." for key in ("key_to_encoder", "key_to_stem"))
    additional_stages = _count_decoder_stages(pretrained) - _count_decoder_stages(network.state_dict())

    def transfer(name: str, tensor: Tensor) -> TensorOutcome:
        outcome = functools.partial(TensorOutcome, name, tensor.numel())
        pretrained_name = _pretrained_name(name, additional_stages)
        if encoder_only and not name.startswith(encoder_prefixes) and HEADS not in name:
            return outcome(RANDOM, "decoder")
        if pretrained_name not in pretrained:
            return outcome(RANDOM, "not in the pretrained network")
        module_name, _, parameter = name.rpartition(".")
        module = network.get_submodule(module_name)
        source = pretrained[pretrained_name]
        fitted, detail = fit_tensor(source, tensor.shape, module, parameter, name in input_weights)
        if fitted is None:
            return outcome(RANDOM, detail, fits=False)
        tensor.copy_(fitted)
        if pretrained_name in random_tensors:
            return outcome(RANDOM, "at random in the pretrained file already")
        return outcome(ADAPTED if detail else TRANSFERRED, detail)

    return [transfer(name, tensor) for name, tensor in _unique_tensors(network)]


def _unique_tensors(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield each tensor of a network once, under its first name."""
    seen = set()
    for name, tensor in network.state_dict().items():
        if storage_key(tensor) not in seen:
            seen.add(storage_key(tensor))
            yield name, tensor


def _count_decoder_stages(names: Iterable[str]) -> int:
    matches = [_DECODER_STAGE.match(name) for name in names]
    return 1 + max((int(match[2]) for match in matches if match and match[1] == "stages"), default=-1)


def _pretrained_name(name: str, additional_stages: int) -> str:
    """Return the name of the tensor at the same level of a pretrained network with additional decoder stages."""
    return _DECODER_STAGE.sub(lambda match: f"decoder.{match[1]}.{int(match[2]) + additional_stages}", name)


def transferred_share(outcomes: Sequence[TensorOutcome]) -> float:
    """Return the share of parameters that come from pretraining, adapted or not; heads do not count."""
    body = [outcome for outcome in outcomes if HEADS not in outcome.name]
    transferred = sum(outcome.elements for outcome in body if outcome.kind != RANDOM)
    return transferred / sum(outcome.elements for outcome in body)


def format_table(outcomes: Sequence[TensorOutcome]) -> str:
    """Return a table of tensors and parameters by outcome; without the heads, which fine-tuning always starts new."""
    body = [outcome for outcome in outcomes if HEADS not in outcome.name]
    total = sum(outcome.elements for outcome in body)
    rows = [("", "tensors", "parameters", "share")]
    for label, members in _group_by_outcome(body).items():
        parameters = sum(member.elements for member in members)
        rows.append((label, str(len(members)), str(parameters), f"{parameters / total:.2%}"))
    width = max(len(row[0]) for row in rows)
    return "\n".join(f"{label:<{width}}{n:>9}{p:>12}{share:>9}" for label, n, p, share in rows)


def _group_by_outcome(outcomes: Sequence[TensorOutcome]) -> dict[str, list[TensorOutcome]]:
    """Group by outcome, and under each outcome by detail; the keys are the labels of the table's rows."""
    groups: dict[str, list[TensorOutcome]] = {}
    for kind in (TRANSFERRED, ADAPTED, RANDOM):
        groups[kind] = [outcome for outcome in outcomes if outcome.kind == kind]
        for outcome in groups[kind]:
            if outcome.detail:
                detail = outcome.detail if outcome.fits else "other features"
                groups.setdefault(f"  {detail}", []).append(outcome)
    return groups
