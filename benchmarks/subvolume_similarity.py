"""How alike the two sub-volumes of a sample are, by the size of the patch.

    python benchmarks/subvolumes_alike.py PREPROCESSED --patch 40 56 40 [--samples 60]

PREPROCESSED is the folder of a configuration's cases, nnUNet_preprocessed/Dataset004_Hippocampus/nnUNetPlans_3d_fullres
for one. Prints the share of voxels that are padding (0) in both, and the share of samples whose two sub-volumes
correlate by more than 0.5: there is nothing to learn from either.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class

from nnunetv2_vf.pretext.sampling import VALIDATION, FusionDataset
from nnunetv2_vf.settings import VFSettings

ALIKE = 0.5  # correlation


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preprocessed", type=Path)
    parser.add_argument("--patch", nargs=3, type=int, required=True, metavar=("D", "H", "W"))
    parser.add_argument("--samples", type=int, default=60)
    args = parser.parse_args()
    cases = infer_dataset_class(str(args.preprocessed))(str(args.preprocessed))
    dataset = FusionDataset(cases, args.patch, VFSettings(), VALIDATION)
    samples = (dataset[i] for i in range(args.samples))
    pairs = [(sample["foreground"].numpy(), sample["background"].numpy()) for sample in samples]
    padding = np.mean([((a == 0) & (b == 0)).mean() for a, b in pairs])
    alike = np.mean([np.corrcoef(a.ravel(), b.ravel())[0, 1] > ALIKE for a, b in pairs])
    print(f"patch {args.patch}: padding in both {padding:.2f} of the voxels, alike {alike:.2f} of {len(pairs)} samples")


if __name__ == "__main__":
    main()
