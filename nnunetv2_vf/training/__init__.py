"""What both trainers share: trainings of weeks that survive signals, full disks and damaged files.

Start reading in :mod:`.resumable_trainer`, the base class of both trainers.

    preflight          checks everything that a training needs before it writes its first file
    step               one training step: precision, gradient scaling, clipping
    optimizer          makes the optimiser that the settings name
    finetune_schedule  the learning rate of encoder, decoder and heads in every epoch of fine-tuning
    resumable_trainer  nnU-Net's trainer, with checkpoints that continue at the very step
    checkpoints        finds the newest checkpoint that is not damaged
    signals            SIGTERM, SIGUSR1 and Ctrl-C save and leave
    ranks              the processes of a distributed training
    monitoring         counts non-finite steps, unusable cases and time spent waiting for data
    progress_plot      draws progress.png

May import: the ground. Knows nothing of the pretext, of transfer or of the other wings; the trainers put these together.
"""
