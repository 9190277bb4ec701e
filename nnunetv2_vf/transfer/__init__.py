"""Pretrained weights for any target: write, read, check, adapt, convert and describe them.

Start reading in :mod:`.artifact`, the format of ``vf_pretrained.pth``.

Files of weights::

    artifact             writes and reads vf_pretrained.pth; reads nnU-Net's checkpoints like artifacts
    metadata             the entry "vf" of an artifact: network, plans, data and settings of pretraining
    nnssl_plan           the entry "nnssl_adaptation_plan", for nnU-Net's nnssl commands
    safe_loading         reads files without running code that they may hold
    safetensors_files    reads and writes artifacts as safetensors
    shared_tensors       tensors that have several names
    hub, hub_push        weights from and to the Hugging Face Hub
    architectures        accepts only known networks and layers from files; builds networks
    info, model_card     describe a file in the terminal, and as a page to share

Weights and the plans of a target dataset::

    target_plans         reads the plans of the target
    network_fit          refuses weights that do not fit the target's network
    differences          lists what differs between the data and plans of pretraining and target
    suggested_commands   the commands that messages suggest
    pretrained_weights   finds, checks and loads the weights that -pretrained_weights names
    kernel_norms         scales pretrained kernels to the norm of freshly initialised ones

``nnUNetv2_vf adapt`` changes weights to fit other plans::

    adapt                reads a file, transfers its weights, writes the result
    weight_transfer      copies weights into a network and reports on each tensor
    tensor_rules         fits one tensor to another shape: input channels, kernels, attention windows

``nnUNetv2_vf convert`` makes artifacts from checkpoints of other projects::

    convert              recognises the project
    convert_misfm        tells MIS-FM's networks apart by the names of their weights
    misfm_pct_net        renames the weights of its PCT-Net
    misfm_position_bias  undoes a mistake in the position bias of its PCT-Net
    misfm_fmunet         renames the weights of its FMUNet
    misfm_conversion     the result, and the checks for both
    convert_nnssl        translates the names of networks in DKFZ's nnssl to those in nnU-Net's plans

May import: the networks and the ground. Knows nothing of the trainers or of the other wings.
"""
