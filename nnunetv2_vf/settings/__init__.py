"""Settings of the two trainings: frozen dataclasses, validated once, printed at the start, recorded in checkpoints.

The modules::

    pretraining    VFSettings: every setting of VFPretrainTrainer with its default, such as the learning rate
    finetuning     FinetuneSettings: the same for VFFinetuneTrainer; recipes of some networks
    shared         what both have in common; combines sources, compares with a checkpoint
    sources        reads settings from a plans file and from environment variables
    legal_values   declares one setting; parses and validates its value

A value comes from the first of these sources that has one:

1. the environment: ``nnUNet_vf_<setting>``, for fine-tuning ``nnUNet_vf_finetune_<setting>``;
2. the plans file: section ``volume_fusion``, for fine-tuning ``volume_fusion_finetune``;
3. the defaults that belong to a chosen optimiser (:data:`.shared.OPTIMIZER_DEFAULTS`) or to the schedule sawtooth;
4. for fine-tuning, the recipe of the network (:data:`.finetuning.FINETUNE_RECIPES`);
5. the default in the dataclass.

A range is written ``low,high`` in the environment and ``[low, high]`` in a plans file. May import: errors.
"""

from nnunetv2_vf.settings.finetuning import FINETUNE_RECIPES, FinetuneSettings
from nnunetv2_vf.settings.pretraining import VFSettings
from nnunetv2_vf.settings.shared import TrainingSettings

__all__ = ["FINETUNE_RECIPES", "FinetuneSettings", "TrainingSettings", "VFSettings"]
