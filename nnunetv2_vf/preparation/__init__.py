"""From a raw dataset to preprocessed cases, on several machines, with nnU-Net's own functions for each case.

nnU-Net's commands do the same on one machine, and start from the beginning after a crash. Start reading in
:mod:`.preprocess`::

    raw_cases     the cases of a raw dataset: images, label, and whether they have changed
    fingerprint   nnUNetv2_vf fingerprint: nnU-Net's fingerprint of all cases or of a random sample
    preprocess    nnUNetv2_vf preprocess: the cases of a configuration; those that are done are skipped

May import: the ground (errors, nnunet_folders, parts, process_pool). Imports no other wing.
"""
