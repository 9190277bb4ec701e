"""Experiment planners of this project, for ``nnUNetv2_vf plan``."""
