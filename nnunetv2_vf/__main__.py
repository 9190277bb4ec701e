"""Let ``python -m nnunetv2_vf`` run the command ``nnUNetv2_vf``."""

from nnunetv2_vf.cli import main

if __name__ == "__main__":
    main()
