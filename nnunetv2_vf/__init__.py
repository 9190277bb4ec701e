"""Volume Fusion pretraining for stock nnU-Net v2. This is the map of the package.

Five wings, one per step of the method. Each wing's docstring lists its modules::

    importing    folders of unlabelled volumes -> a raw dataset of nnU-Net
    preparation  raw dataset -> nnU-Net's fingerprint and preprocessed cases, on several machines
    pretext      preprocessed case -> two fused sub-volumes and their fusion classes, which the network predicts
    training     what both trainers share: ranks, checkpoints, resuming, monitoring, schedules
    transfer     vf_pretrained.pth: write, read safely, compare with a target's plans, adapt, convert

nnU-Net finds and runs two kinds of classes. In the repository their folders lie beside this package; the installed
package contains them::

    trainers     VFPretrainTrainer pretrains, VFFinetuneTrainer fine-tunes
    planners     PCTNetPlanner and FMUNetPlanner plan these networks, LikePlanner that of pretrained weights

Networks. Plans store their dotted paths, so they never move::

    pct_net              PCTNet, the network of the paper
    window_attention     its attention layers
    fmunet               FMUNet, the convolutional network of the journal version
    five_level_network   what both share: levels, resolution modes, encoder and decoder

Entrances::

    cli            the command nnUNetv2_vf (also: python -m nnunetv2_vf)
    distributed    training on several ranks: torchrun -m nnunetv2_vf.distributed
    doctor         nnUNetv2_vf doctor: checks installation, dataset, plans and weights
    preview        nnUNetv2_vf preview: draws training samples
    demo           nnUNetv2_vf demo: the whole method on generated phantoms

The ground, which everything may use::

    settings          every setting of both trainings: defaults, legal values, sources
    nnunet_folders    finds a dataset and its plans in nnU-Net's folders
    nnunet_commands   runs nnU-Net's commands; the value of nnUNet_extTrainer
    network_parts     encoder, decoder or heads: the part that a weight belongs to
    parts             shares work among machines: parts, journals, locks
    process_pool      runs a function on many items in several processes
    durable_files     writes files that survive crashes and power loss
    errors            errors that a user can correct

Who may import whom (checked by ``lint-imports``):

- entrances -> planners and trainers -> wings -> networks -> ground. Imports go only in this direction.
- The five wings are independent of one another. ``importing`` does not use torch.
- ``pretext`` and the networks know nothing of nnU-Net. Nothing imports a trainer: nnU-Net finds them by itself.

Importing ``nnunetv2_vf`` itself imports neither torch nor nnU-Net.
"""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("nnunetv2-vf")
except PackageNotFoundError:  # a source tree on PYTHONPATH, not installed
    __version__ = "0+unknown"
