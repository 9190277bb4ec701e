"""Read settings from a plans file and from environment variables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import Field
from difflib import get_close_matches
from typing import Any

from nnunetv2_vf.errors import UserError
from nnunetv2_vf.settings.legal_values import parse_value


def read_plans(plans: Mapping[str, Any], section: str, known: Mapping[str, Field[Any]]) -> dict[str, Any]:
    """Return the values in a section of a plans file, parsed; an absent section has none.

    Args:
        known: the dataclass field of every legal setting, by its name.

    Raises:
        UserError: the section is not a JSON object, or a name or a value is not legal.
    """
    content = plans.get(section, {})
    if not isinstance(content, Mapping):
        raise UserError(f'{section!r} in the plans is {content!r}; legal: settings as {{"name": value}}')
    return {
        name: parse_value(_find_field(name, known, "in the plans"), value, f"{name} in the plans")
        for name, value in content.items()
    }


def read_environment(
    environment: Mapping[str, str],
    prefix: str,
    known: Mapping[str, Field[Any]],
    variables_of_other_trainings: Mapping[str, str],
) -> dict[str, Any]:
    """Return the values of all environment variables that start with ``prefix``, parsed.

    Args:
        known: the dataclass field of every legal setting, by its name.
        variables_of_other_trainings: the variable of each setting that only another training has, by the setting's
            name.

    Raises:
        UserError: a name or a value is not legal.
    """
    values = {}
    for variable, text in environment.items():
        name = _setting_name(variable, prefix)
        if name is None:
            continue
        if name in variables_of_other_trainings:
            other = variables_of_other_trainings[name]
            raise UserError(f"{variable} is not a setting of this training; set {other} instead")
        values[name] = parse_value(_find_field(name, known, f"from {variable}"), text, variable)
    return values


def _setting_name(variable: str, prefix: str) -> str | None:
    lowered = variable.lower()  # Windows shows every name in capitals
    if not lowered.startswith(prefix.lower()):
        return None
    name = lowered[len(prefix) :]
    # The prefix of pretraining, nnUNet_vf_, is also the start of the variables of fine-tuning.
    return None if name.startswith("finetune_") else name


def _find_field(name: str, known: Mapping[str, Field[Any]], source: str) -> Field[Any]:
    if name not in known:
        similar = get_close_matches(name, known, n=1)
        hint = f"did you mean {similar[0]}? " if similar else ""
        raise UserError(f"unknown setting {name!r} {source}; {hint}legal: {', '.join(known)}")
    return known[name]
