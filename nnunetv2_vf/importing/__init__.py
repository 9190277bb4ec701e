"""Make an nnU-Net raw dataset from folders of unlabelled volumes: ``nnUNetv2_vf import``.

Start reading in :mod:`.pipeline`. In the order in which an import uses them::

    pipeline      the whole import: find sources, import each in a process, merge; handles Ctrl-C
    settings      which volumes are accepted, and how files are written
    search        finds volume files and DICOM folders; reads no images
      sources       one unit of work: a file, the channels of a case, or a folder of DICOM files
      layouts       names of labels in common datasets, and names in BIDS
    job           one run of the command: its sources, settings, journal and files
    state         decides which sources are finished
      journal       one line per finished source, so that an interrupted import can continue
      description   dataset.json
    worker        imports one source, in one of several processes:
      readers       chooses the reader for the format of a file; reads NRRD and MetaImage
        nifti         reads and checks NIfTI and Analyze files
        dicom         reads and checks DICOM series
      volumes       checks that a volume is fit for training, and repairs what can be repaired
        label_maps    recognises label maps, which are no images
      body_mask     finds the body, which becomes label 1
      case_files    writes images and labels
      images        helpers for SimpleITK
    merge         makes the dataset from the results of all sources:
      channels      names the channels
      report        import_report.csv and the printed summary
      picture       some volumes with the outline of the body

May import: the ground (errors, nnunet_folders, parts, process_pool). Imports neither torch, nor training code, nor
other wings.
"""
