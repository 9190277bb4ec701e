"""``nnUNetv2_vf demo``: the whole journey on generated volumes, in a few minutes, on any machine.

Start reading in :mod:`.journey`, which runs the commands; :mod:`.phantoms` generates the volumes.

May import: everything but the trainers, which nnU-Net finds by itself.
"""
