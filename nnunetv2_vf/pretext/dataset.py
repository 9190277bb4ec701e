"""The dataset of pretext samples.

Sample i is a pure function of (cases, settings, stream, i): it is the same with any number of workers, on any rank and
after any resume. No global random state is used.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from nnunetv2_vf.errors import UserError
from nnunetv2_vf.pretext.augmentation import draw_augmentation
from nnunetv2_vf.pretext.cases import PreprocessedCases, RejectedCase, RejectedCaseError
from nnunetv2_vf.pretext.fusion import draw_fusion_map
from nnunetv2_vf.pretext.masking import draw_mask
from nnunetv2_vf.pretext.subvolumes import SubvolumeSampler
from nnunetv2_vf.settings import VFSettings

# The streams of samples. Validation samples ignore the seed setting, so that runs can be compared.
TRAINING, VALIDATION = 0, 1

_MAX_CASES = 100  # cases that are tried for one sample


class PretextDataset(Dataset):
    """Pretext samples from the preprocessed cases of one nnU-Net dataset.

    A sample is a dict with these items:

    - with fusion: ``foreground``, ``background``: sub-volumes (C, D, H, W), float32; ``fusion_map``: (D, H, W), uint8;
      the parameters of :func:`nnunetv2_vf.pretext.augmentation.draw_augmentation`;
    - without fusion: ``volume``: a sub-volume (C, D, H, W), float32;
    - with a mask: ``mask``: (D, H, W), bool;
    - ``cases``: the names of the one or two cases of the sub-volumes;
    - ``rejected``: a list of :class:`nnunetv2_vf.pretext.cases.RejectedCase`, tried before these cases.

    If none of 100 cases can be used, the sample has only the item ``rejected``.

    Args:
        cases: nnU-Net's dataset; images are read with its own ``load_case``.
        patch_size: (D, H, W) in voxels.
        stream: TRAINING or VALIDATION.
        channels: required number of channels; None: any number.

    Raises:
        UserError: there are fewer cases than one sample needs.
    """

    def __init__(
        self,
        cases: PreprocessedCases,
        patch_size: Sequence[int],
        settings: VFSettings,
        stream: int,
        channels: int | None = None,
    ):
        if len(cases.identifiers) < settings.cases_per_sample:
            raise UserError(
                f"pairing {settings.pairing!r} needs at least {settings.cases_per_sample} cases, not "
                f"{len(cases.identifiers)}"
            )
        self.cases = cases
        self.settings = settings
        self.stream = stream
        self.subvolumes = SubvolumeSampler(cases, patch_size, settings, channels)
        # Cases that this process has found unusable. Skipping them saves time. It changes a sample only if the file
        # system failed while such a case was read.
        self._unusable: set[str] = set()

    def __getitem__(self, index: int) -> dict[str, Any]:
        seed = self.settings.seed if self.stream == TRAINING else 0
        key = (seed, self.stream, index)
        rng = np.random.default_rng(key)
        subvolumes, cases, rejected = self._draw_subvolumes(key, rng)
        if len(subvolumes) < self.settings.subvolumes_per_sample:
            return {"rejected": rejected}
        sample: dict[str, Any] = {}
        if self.settings.has_fusion:
            sample["foreground"], sample["background"] = subvolumes
            sample["fusion_map"] = draw_fusion_map(self.subvolumes.patch_size, self.settings, rng)
            sample |= draw_augmentation(len(subvolumes[0]), self.settings, rng)
        else:
            (sample["volume"],) = subvolumes
        if self.settings.has_mask:
            sample["mask"] = draw_mask(self.subvolumes.patch_size, self.settings, rng)
        return {**sample, "cases": cases, "rejected": rejected}

    def _draw_subvolumes(
        self, key: tuple[int, int, int], rng: np.random.Generator
    ) -> tuple[list[Tensor], list[str], list[RejectedCase]]:
        """Return the sub-volumes (fewer if no case is left), the cases they come from, and the rejected cases.

        Each case has a random generator of its own, seeded with the sample's key and the number of the attempt. So
        the sample does not depend on how many crops of a rejected case were drawn.
        """
        needed = self.settings.subvolumes_per_sample
        crops_per_case = needed // self.settings.cases_per_sample
        subvolumes: list[Tensor] = []
        used: list[str] = []
        rejected: list[RejectedCase] = []
        cases = itertools.islice(_shuffle(self.cases.identifiers, rng), _MAX_CASES)
        for attempt, case in enumerate(cases):
            if case in self._unusable:
                continue
            try:
                crops = self.subvolumes.draw(case, crops_per_case, _case_generator(key, attempt))
            except RejectedCaseError as error:
                rejected.append(RejectedCase(case, error.reason, error.unusable))
                if error.unusable:
                    self._unusable.add(case)
                continue
            subvolumes += crops
            used.append(case)
            if len(subvolumes) == needed:
                break
        return subvolumes, used, rejected


def _case_generator(key: tuple[int, int, int], attempt: int) -> np.random.Generator:
    """Return the random generator of a sample's attempt with a case.

    The number of the attempt is not simply appended to the key: NumPy fills short seeds up with zeros, so the
    generator of the first attempt would draw the same numbers as the generator of the sample.
    """
    return np.random.default_rng(np.random.SeedSequence(key, spawn_key=(attempt,)))


def _shuffle(names: Sequence[str], rng: np.random.Generator) -> Iterator[str]:
    """Yield all names in random order.

    They are drawn one by one: a permutation of 110,000 names takes longer than a crop, and few are needed.
    """
    drawn: set[int] = set()
    while len(drawn) < len(names):
        index = int(rng.integers(len(names)))
        if index not in drawn:
            drawn.add(index)
            yield names[index]
