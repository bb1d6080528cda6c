#!/bin/sh
# Installs this source into a new virtual environment, as the image does.
#
# usage: docker/install.sh FOLDER [EXTRA]

set -eu
folder=$1
extra=${2:-}
cd "$(dirname "$0")/.."
python3 -m venv "$folder"
"$folder/bin/pip" install --no-cache-dir --quiet \
  --constraint requirements/constraints.txt ".${extra:+[$extra]}"
"$folder/bin/neo-jax" --help >/dev/null
