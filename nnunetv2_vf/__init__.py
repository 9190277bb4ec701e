"""Volume Fusion pretraining inside stock nnU-Net v2.

The pipeline, and the module of each step::

    folders of unlabelled volumes: NIfTI, NRRD, MetaImage, DICOM
        | sources     what there is
        | readers     read it, whatever its format
        | volumes     decide whether it is fit
        | body        find the body: label 1
        | unlabelled  the raw dataset, with a report; nnU-Net's own commands plan and preprocess it
        v
    unlabelled case, preprocessed by nnU-Net
        | sampling   crop two sub-volumes of one case, flip and resize them to the patch; draw all parameters
        | augment    contrast, gamma, inversion: batched, on the trainer's device
        | fusion     X = a * foreground + (1 - a) * background; the target of a voxel is Y = K * a
        v
    trainers.VFPretrainTrainer: nnU-Net's own network, loss, schedule, logging and checkpoints, K + 1 classes
        | training_step   in the precision that the device has, waiting for nothing
        | weights    vf_pretrained.pth, and a model_card
        v
    any target: its plans and dataset are a target
        | planners.LikePlanner   its plans take the pretrained topology; or:
        | adapt                  the weights take its plans' topology
        v
    nnUNetv2_train ... -tr VFFinetuneTrainer -pretrained_weights vf_pretrained.pth
        | compatibility       says what differs, and refuses what cannot work
        | kernel_norms        lets pretrained kernels learn as fast as new ones
        | finetune_schedule   what is trained when, and how fast

PCT-Net, the network of the paper::

    planners.PCTNetPlanner   decides the topology; planning fits patch and batch to what memory counts
        | plans name pct_net (and its window_attention) as the architecture
        v
    any nnU-Net trainer; trainers.VFFinetuneTrainer has the recipe (optimizer) it needs

Both trainers are a long_training: on several machines (distributed, ranks), with checkpoints that cannot be lost, under
the signals of a cluster (interruption) and with an eye on steps, cases and waiting (watch).

Beside the road: convert and nnssl read other projects' weights, trust says what a file may name, info tells what it
is, doctor whether all is well.

Importing the package imports neither torch nor nnU-Net.
"""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("nnunetv2-vf")
except PackageNotFoundError:  # a source tree on PYTHONPATH, not installed
    __version__ = "0+unknown"
