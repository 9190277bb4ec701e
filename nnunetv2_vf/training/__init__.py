"""What both trainers share: trainings of weeks that survive signals, full disks and damaged files.

Start reading in :mod:`.resumable_trainer`, the base class of both trainers.

    preflight          checks everything that a training needs before it writes its first file
    step               one training step: precision, gradient scaling, clipping
    optimizer          makes the optimiser that the settings name
    finetune_schedule  the learning rate of encoder, decoder and heads in every epoch of fine-tuning
    distributed_trainer  nnU-Net's trainer on any number of ranks
    resumable_trainer  builds on it: signals, checkpoints that continue at the very step, full disks
    random_state       saves and restores the random generators of a process
    checkpoints        finds the newest checkpoint that is not damaged
    signals            SIGTERM, SIGUSR1 and Ctrl-C save and leave
    ranks              the processes of a distributed training
    monitoring         counts non-finite steps, unusable cases and time spent waiting for data
    progress_plot      draws progress.png

May import: the ground. Knows nothing of the other wings: the trainers combine them with this one.
"""
