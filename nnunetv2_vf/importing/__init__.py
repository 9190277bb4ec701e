"""Folders of unlabelled volumes become an nnU-Net raw dataset: ``nnUNetv2_vf import``.

Start reading in :mod:`.dataset`. The data's path through the modules::

    sources     finds volume files and DICOM series in the given folders; reads no images
    worker      imports one source, in a process of its own (process_pool):
      readers     read the images: NIfTI, NRRD, MetaImage, DICOM
      volumes     checks that a volume can be trained on, and says why not
      body_mask   finds the body, which becomes label 1
    journal     remembers which sources are done, so that an interrupted import can continue
    dataset     merges all of this into images, labels, dataset.json and import_report.csv
    picture     draws some volumes with the outline of the body

May import: the ground (errors, nnunet_folders). Knows nothing of torch, of training or of the other wings.
"""
