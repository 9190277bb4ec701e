"""Quarantine of bad cases: report each one once; stop the training if there are too many."""

from __future__ import annotations

import json
from pathlib import Path

from nnunetv2_vf.errors import UserError


class Quarantine:
    """Cases that can never be used, each with the reason. Training draws other cases instead.

    Args:
        limit: the largest share of a dataset's cases that may be in quarantine.
        file: gets the list of cases if they exceed the limit.

    Attributes:
        cases: case -> reason.
        reported: all cases that gave no sub-volume, also those that may give one at the next draw.
    """

    def __init__(self, limit: float, file: Path):
        self.cases: dict[str, str] = {}
        self.reported: set[str] = set()
        self.limit = limit
        self.file = file

    def add(self, case: str, reason: str, unusable: bool) -> str | None:
        """Take note of a case that gave no sub-volume; put it into quarantine if it is unusable.

        Returns:
            a line for the log, or None if the case was reported before.
        """
        is_known = case in (self.cases if unusable else self.reported)
        self.reported.add(case)
        if unusable:
            self.cases.setdefault(case, reason)
        if is_known:
            return None
        consequence = "quarantined, other cases are used" if unusable else "such sub-volumes are skipped"
        return f"WARNING: case {case} {reason}; {consequence}"

    def require_within_limit(self, num_cases: int) -> None:
        """Raise UserError, and write the list, if too many of a dataset's cases are in quarantine."""
        if len(self.cases) > self.limit * num_cases:
            reasons = "; ".join(f"{case} {reason}" for case, reason in sorted(self.cases.items()))
            listed = f"listed in {self.file}"
            try:
                self.file.write_text(json.dumps(self.cases, indent=1, sort_keys=True))
            except OSError as error:
                listed = f"below ({self.file} was not written: {error})"
            raise UserError(
                f"{len(self.cases)} of {num_cases} cases cannot be used, more than {self.limit:.0%}; repair the cases "
                f"{listed} and preprocess again, or raise the limit (nnUNet_vf_quarantine_limit=0.5): {reasons}"
            )
