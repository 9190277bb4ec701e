"""Experiment planners for ``nnUNetv2_vf plan``: nnU-Net's planning with another network in the 3D configurations.

Start reading in :mod:`.topology_planner`::

    pct_net_planner     plans PCT-Net
    fmunet_planner      plans FMUNet (--network FMUNet)
    five_level_planner  the base of both: chooses the resolution mode
    like_planner        plans the network of pretrained weights (--like)
    topology_planner    the base of all: nnU-Net's planner, with another network and memory estimate
    memory_fitting      chooses the patch and batch size that fit into the GPU memory
    step_memory         estimates the GPU memory of one training step

May import: transfer, the networks and the ground.
"""
