"""The pretext tasks: Volume Fusion (arXiv 2306.16925: fuse two sub-volumes, predict the coefficient), hidden blocks.

Start with :mod:`.fusion` and :mod:`.masking`. The data passes through the modules in this order::

    in a worker process
        cases         read the image of a preprocessed case; retry if the file system fails
        subvolumes    draw sub-volumes: crop, flip, resize to the patch
        fusion        draw the fusion map
        masking       draw the mask: which blocks are hidden
        augmentation  draw the parameters of contrast, gamma and inversion
        dataset       build a sample from these: sample i is the same in every run
        loader        collect the samples of a rank into batches

    on the training device
        augmentation  change the intensities of a batch
        fusion        fuse a batch: X = a * foreground + (1 - a) * background
        masking       hide blocks
        task          input, targets and loss of the chosen pretext; what the output channels mean

    results
        report        confusion matrix and Dice of the predicted fusion classes, restored share of hidden blocks
        pictures      samples with their predictions, and the report

May import: settings and errors. Does not import nnU-Net or the other wings.
"""
