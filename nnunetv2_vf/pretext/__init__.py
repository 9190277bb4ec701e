"""The pretext task of Volume Fusion: what the network sees and has to predict (arXiv 2306.16925).

Start reading in :mod:`.fusion`. The data's path through the modules::

    sampling      crops two sub-volumes of a preprocessed case and draws all random parameters, in a worker
    augmentation  changes contrast, gamma and sign of a batch, on the trainer's device
    fusion        draws the fusion map; fuses the batch: X = a * foreground + (1 - a) * background
    report        counts how often the network predicts the right fusion class
    pictures      draws samples, predictions and the report

May import: settings and errors. Knows nothing of nnU-Net or of the other wings.
"""
