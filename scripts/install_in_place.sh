#!/usr/bin/env bash
# Install the project and what it lacks into a Python that already holds a torch, and keep that torch:
# for an image (the Dockerfile runs it), where there is no use for a virtual environment.
#
#   bash scripts/install_in_place.sh packages   # what pyproject.toml asks for and is not there
#   bash scripts/install_in_place.sh project    # the project itself, from this folder
#
# requirements.py says what is kept, and which versions are taken. PYTHON (environment variable) is
# the Python to install into; else python3.
#
# Exit codes: 0 installed; 2 this Python cannot be used; 1 anything else.

set -euo pipefail

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}

die() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null ||
  die "$python is no Python 3.12 or newer: choose another image, or name one in PYTHON"
reason=$("$python" -c 'import torch' 2>&1) ||
  die "$python has no torch that can be imported (${reason##*$'\n'})"

# NVIDIA's images give pip the versions of all that they were built with, by PIP_CONSTRAINT; also of
# packages that were only needed for that, and of some that are too old here (packaging 23.2).
unset PIP_CONSTRAINT PIP_USER PIP_TARGET PIP_PREFIX PYTHONPATH

case ${1:-} in
  packages) "$python" -P "$repo/scripts/requirements.py" install ;;
  project)
    options=(--quiet --disable-pip-version-check --no-cache-dir --no-deps --editable "$repo")
    # What builds the project is taken from here where it is new enough, else pip gets it.
    ! "$python" -c 'import setuptools as s; assert int(s.__version__.split(".")[0]) >= 77' \
      2>/dev/null || options+=(--no-build-isolation)
    "$python" -m pip install "${options[@]}"
    # A user who is not root cannot write the caches of compiled Python later.
    "$python" -m compileall -q "$repo/megatron_prores" "$repo/tools" "$repo/pretrain_gpt_prores.py"
    ;;
  *) die "${1:-no word given}: give packages or project" ;;
esac
