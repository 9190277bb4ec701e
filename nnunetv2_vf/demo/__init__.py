"""The whole method on generated volumes, in a few minutes, on any machine: ``nnUNetv2_vf demo``.

Start reading in :mod:`.journey`, which runs the commands; :mod:`.phantoms` generates the volumes.

May import: everything but the trainers, which nnU-Net finds by itself.
"""
