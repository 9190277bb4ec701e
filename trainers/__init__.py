"""Trainers that nnU-Net finds through ``nnUNet_extTrainer``; ``nnUNetv2_vf env`` prints the line that sets it."""
