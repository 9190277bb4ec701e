"""Settings of pretraining (VFPretrainTrainer) with their defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from nnunetv2_vf.settings.legal_values import setting
from nnunetv2_vf.settings.shared import OPTIMIZER_DESCRIPTION, OPTIMIZERS, TrainingSettings

PRETEXTS = ("fusion", "masked", "fusion+masked")
JOINT_MASK_FRACTION = 0.3  # where three quarters of the voxels are hidden, few coefficients can be recognised
_OF_FUSION = (
    "coefficient_steps",
    "fusion_map",
    "pairing",
    "contrast_probability",
    "contrast_lower",
    "contrast_upper",
    "gamma",
    "invert_probability",
)
_OF_BOXES = ("box_count", "box_min_side", "box_max_fraction")
_OF_BLOCKS = ("block_side", "block_foreground")
_OF_MASK = ("mask_side", "mask_fraction")
_PRECISION_DESCRIPTION = (
    "precision of matrix products and convolutions; "
    "auto: bf16 on GPUs that support it, fp16 on other GPUs, fp32 on CPUs"
)


@dataclass(frozen=True, kw_only=True)
class VFSettings(TrainingSettings):
    """Settings of pretraining: what the network learns, from which crops, and how.

    Defaults: Volume Fusion and optimiser as in arXiv 2306.16925, hidden blocks as in arXiv 2410.23132, schedule as in
    nnU-Net.
    """

    prefix: ClassVar[str] = "nnUNet_vf_"
    section: ClassVar[str] = "volume_fusion"

    optimizer: str = setting("adam", OPTIMIZER_DESCRIPTION, choices=OPTIMIZERS)
    initial_lr: float = setting(1e-3, "highest learning rate; it decays during the training", low=1e-12, high=10)
    weight_decay: float = setting(1e-5, "weight decay", low=0, high=1)
    precision: str = setting(
        "auto", _PRECISION_DESCRIPTION, choices=("auto", "bf16", "fp16", "tf32", "fp32"), can_change=True
    )
    fused_optimizer: str = setting(
        "on",
        "on: the optimiser updates all weights in one kernel and never waits for the GPU; no effect on Apple GPUs",
        choices=("on", "off"),
        can_change=True,
    )
    seed: int = setting(
        0,
        "seed of the initial weights, the training samples and dropout; validation samples do not depend on it",
        low=0,
        high=2**32 - 1,
    )
    batch_per_gpu: int = setting(
        0, "samples per batch on each rank; 0: the batch size of the plans, split among the ranks", low=0, high=4096
    )
    quarantine_limit: float = setting(
        0.05, "share of the cases that may be unusable before the training stops", low=0, high=1, can_change=True
    )

    # The pretext task
    pretext: str = setting(
        "fusion",
        "fusion: predict the fusion coefficient of each voxel; masked: restore hidden blocks; fusion+masked: both",
        choices=PRETEXTS,
    )
    coefficient_steps: int = setting(
        4, "K: the fusion coefficients are 0, 1/K, ..., 1, and each is a class", low=1, high=100
    )
    fusion_map: str = setting(
        "boxes",
        "shape of the regions with one coefficient; boxes: random boxes (2023 paper); blocks: a grid (2025 paper)",
        choices=("boxes", "blocks"),
    )
    pairing: str = setting(
        "same",
        "same: take both sub-volumes from one case; different: take them from two cases",
        choices=("same", "different"),
    )
    box_count: tuple[int, int] = setting((10, 40), "boxes: number of boxes", low=1, high=1000)
    box_min_side: int = setting(8, "boxes: shortest side in voxels", low=1)
    box_max_fraction: float = setting(0.625, "boxes: longest side, as a fraction of the patch", low=0.01, high=1)
    block_side: tuple[int, int] = setting((8, 32), "blocks: side in voxels", low=1)
    block_foreground: float = setting(0.7, "blocks: share of the blocks whose class is not 0", low=0, high=1)

    mask_side: int = setting(16, "hidden blocks: side in voxels", low=1)
    mask_fraction: float = setting(
        0.75, "hidden blocks: their share; the default with fusion+masked is 0.3", low=0.01, high=0.99
    )
    reconstruction_weight: float = setting(
        1.0, "fusion+masked: weight of the restored intensities in the loss; the fusion classes have 1", low=0, high=100
    )

    # Crops and augmentation
    crop_scale: tuple[float, float] = setting(
        (0.7, 1.5), "size of a crop relative to the patch, drawn for each axis", low=0.1, high=10
    )
    flip_probability: float = setting(0.5, "probability of a flip, for each axis", low=0, high=1)
    contrast_probability: float = setting(
        1.0, "probability of the contrast change between two percentiles", low=0, high=1
    )
    contrast_lower: tuple[float, float] = setting((0.1, 2.0), "contrast change: lower percentile", low=0, high=50)
    contrast_upper: tuple[float, float] = setting((98.0, 99.9), "contrast change: upper percentile", low=50, high=100)
    gamma: tuple[float, float] = setting((0.7, 1.5), "exponent of the gamma correction", low=0.1, high=10)
    invert_probability: float = setting(
        0.25, "probability that the intensities of both sub-volumes are inverted", low=0, high=1
    )

    @classmethod
    def _adapt_defaults(cls, defaults: dict[str, Any], chosen: Mapping[str, Any]) -> dict[str, Any]:
        defaults = super()._adapt_defaults(defaults, chosen)
        if chosen.get("pretext") == "fusion+masked":
            return {**defaults, "mask_fraction": JOINT_MASK_FRACTION}
        return defaults

    @property
    def has_fusion(self) -> bool:
        """True if the network predicts fusion classes."""
        return self.pretext != "masked"

    @property
    def has_mask(self) -> bool:
        """True if the network restores hidden blocks."""
        return self.pretext != "fusion"

    @property
    def without_effect(self) -> list[str]:
        """Names of the settings that the chosen pretext and fusion map do not use."""
        is_used = {
            _OF_FUSION: self.has_fusion,
            _OF_BOXES: self.has_fusion and self.fusion_map == "boxes",
            _OF_BLOCKS: self.has_fusion and self.fusion_map == "blocks",
            _OF_MASK: self.has_mask,
            ("reconstruction_weight",): self.has_fusion and self.has_mask,
        }
        return [name for names, used in is_used.items() if not used for name in names]

    @property
    def deciding_settings(self) -> str:
        return f"pretext = {self.pretext}" + (f" and fusion_map = {self.fusion_map}" if self.has_fusion else "")

    @property
    def num_fusion_classes(self) -> int:
        """Number of fusion classes, K + 1; 0 in a pretext without fusion."""
        return self.coefficient_steps + 1 if self.has_fusion else 0

    @property
    def subvolumes_per_sample(self) -> int:
        return 2 if self.has_fusion else 1

    @property
    def cases_per_sample(self) -> int:
        """The number of cases that the sub-volumes of a sample come from."""
        return 2 if self.has_fusion and self.pairing == "different" else 1
