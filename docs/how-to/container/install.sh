#!/usr/bin/env bash
# Install the package into a new virtual environment; both container files run this.
#
#   install.sh SOURCE FOLDER    SOURCE: a clone of the repository
set -euo pipefail
source=$1 folder=$2
python3 -m venv "$folder"
"$folder/bin/python" -m pip install --no-cache-dir --constraint "$source/constraints.txt" \
    "$source[hub,tensorboard,mlflow]"
# The path is the same for every Python version, so that the containers can name it.
ln -s "$("$folder/bin/python" -I -c 'import nnunetv2_vf.trainers as t; print(*t.__path__)')" "$folder/trainers"
