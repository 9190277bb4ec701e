from __future__ import annotations

import pytest

from nnunetv2_vf.errors import UserError
from nnunetv2_vf.importing.settings import Selection


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"keep": ("nan",)}, "no check 'nan'; use duplicates"),
        ({"min_size": 0}, "--min-size is 0"),
        ({"max_spacing": 0.0}, "--max-spacing is 0.0"),
        ({"min_range": -1.0}, "--min-range is -1.0"),
    ],
)
def test_illegal_values_are_rejected(wrong, message):
    with pytest.raises(UserError, match=message):
        Selection(**wrong)
