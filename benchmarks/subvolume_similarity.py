"""Similarity of the two sub-volumes of a training sample, for a given patch size.

    python benchmarks/subvolume_similarity.py PREPROCESSED --patch 40 56 40 [--samples 60]

PREPROCESSED is a folder of preprocessed cases, such as
nnUNet_preprocessed/Dataset004_Hippocampus/nnUNetPlans_3d_fullres. Prints the share of voxels that are padding (0) in
both sub-volumes, and the share of samples whose two sub-volumes correlate by more than 0.5. The network learns little
from either.

Duration: seconds. Needs: one CPU core.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from common import make_parser
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class

from nnunetv2_vf.pretext.dataset import VALIDATION, PretextDataset
from nnunetv2_vf.settings import VFSettings

MIN_CORRELATION = 0.5


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("preprocessed", type=Path, metavar="PREPROCESSED")
    parser.add_argument("--patch", nargs=3, type=int, required=True, metavar=("D", "H", "W"))
    parser.add_argument("--samples", type=int, default=60)
    args = parser.parse_args()
    cases = infer_dataset_class(str(args.preprocessed))(str(args.preprocessed))
    dataset = PretextDataset(cases, args.patch, VFSettings(), VALIDATION)
    samples = (dataset[i] for i in range(args.samples))
    pairs = [(sample["foreground"].numpy(), sample["background"].numpy()) for sample in samples]
    padding = np.mean([((a == 0) & (b == 0)).mean() for a, b in pairs])
    similar = np.mean([np.corrcoef(a.ravel(), b.ravel())[0, 1] > MIN_CORRELATION for a, b in pairs])
    print(f"patch {args.patch}: {padding:.2f} of the voxels are padding in both sub-volumes")
    print(f"{similar:.2f} of {len(pairs)} samples have sub-volumes that correlate by more than {MIN_CORRELATION}")


if __name__ == "__main__":
    main()
