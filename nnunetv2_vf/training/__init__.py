"""Long trainings that survive signals, full disks and damaged files. Both trainers are built on this wing.

Start reading in :mod:`.resumable_trainer`, the base class of both trainers::

    distributed_trainer  nnU-Net's trainer on any number of ranks
    resumable_trainer    builds on it: signals, checkpoints that continue at the exact step, full disks
      random_state       saves and restores the random generators of a process
      checkpoints        finds the newest checkpoint that is not damaged
      signals            handles SIGTERM, SIGUSR1 and Ctrl-C: notes which one came
      ranks              the processes of a distributed training
      progress_plot      draws progress.png
      loggers            passes the logged values on to TensorBoard and MLflow

    optimizer            makes the optimiser that the settings name
    preflight            checks everything that a training needs before it writes its first file

Only pretraining. The method ``train_step`` of ``trainers/vf_pretrain_trainer.py`` uses these::

    step                 the optimiser step: precision, loss scaling, backward pass, gradient clipping
    non_finite_steps     counts steps with a non-finite gradient; stops after too many in a row
    quarantine           puts bad cases into quarantine; stops if there are too many
    monitoring           measures samples per second, GPU memory and the time spent waiting for data

Only fine-tuning::

    finetune_schedule    the learning rate of encoder, decoder and heads in every epoch

May import: the ground. Knows nothing of the other wings: the trainers combine them with this one.
"""
