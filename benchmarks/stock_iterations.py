"""Losses of the first iterations of stock nnUNetTrainer, which has no setting for a short run.

python benchmarks/stock_iterations.py DATASET PLANS ITERATIONS OUT.json [--device cpu]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from nnunetv2.run.run_training import get_trainer_from_args


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset")
    parser.add_argument("plans")
    parser.add_argument("iterations", type=int)
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    device = torch.device(args.device)
    trainer = get_trainer_from_args(args.dataset, "3d_fullres", 0, "nnUNetTrainer", args.plans, device=device)
    trainer.on_train_start()
    losses = [float(trainer.train_step(next(trainer.dataloader_train))["loss"]) for _ in range(args.iterations)]
    trainer.on_train_end()
    args.out.write_text(json.dumps([round(loss, 3) for loss in losses]))


if __name__ == "__main__":
    main()
