"""One pretrained file for any target network: write it, read it safely, compare it, adapt it, convert others' files.

Start reading in :mod:`.artifact`, the format of ``vf_pretrained.pth``.

    artifact        writes and reads vf_pretrained.pth, and reads nnU-Net's checkpoints
    safe_loading    refuses files that name anything but known networks and layers
    target_plans    the plans of the dataset that the weights are for, and the network they describe
    compatibility   refuses weights that do not fit, and lists what differs between pretraining and target
    adapt           changes weights to fit other plans: channels, kernels, stages, attention windows
    kernel_norms    scales pretrained kernels to the norm of freshly initialised ones
    convert_misfm, convert_nnssl   read the checkpoints of these projects
    info, model_card   describe a file of weights, on the terminal and as a page to share

May import: the networks and the ground. Knows nothing of the trainers or of the other wings.
"""
