"""Quarantine of bad cases: report each once, and stop the training if there are too many."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from nnunetv2_vf.errors import UserError


class Quarantine:
    """Cases that cannot be used, each with the reason. Training draws other cases instead.

    Args:
        limit: the largest share of a dataset's cases that may be in quarantine.
        file: gets the list of cases if they exceed the limit.
    """

    def __init__(self, limit: float, file: Path):
        self.cases: dict[str, str] = {}
        self.limit = limit
        self.file = file

    def add(self, reasons: Mapping[str, str]) -> list[str]:
        """Add cases, given as case -> reason. Return a line for the log for each new case."""
        new = {case: reason for case, reason in reasons.items() if case not in self.cases}
        self.cases.update(new)
        return [f"WARNING: case {case} {reason}; quarantined, other cases are used" for case, reason in new.items()]

    def require_below_limit(self, num_cases: int) -> None:
        """Raise UserError, and write the list, if too many of a dataset's cases are in quarantine."""
        if len(self.cases) > self.limit * num_cases:
            reasons = "; ".join(f"{case} {reason}" for case, reason in sorted(self.cases.items()))
            self.file.write_text(json.dumps(self.cases, indent=1, sort_keys=True))
            raise UserError(
                f"{len(self.cases)} of {num_cases} cases cannot be used, more than {self.limit:.0%}; repair the cases "
                f"listed in {self.file} and preprocess again, or raise the limit "
                f"(nnUNet_vf_quarantine_limit=0.5): {reasons}"
            )
