#!/usr/bin/env bash
# Installs the project and what it lacks into a Python that already holds a torch, and keeps that
# torch: for an image (the Dockerfile runs it), where there is no use for a virtual environment.
#
#   bash scripts/install_in_place.sh packages   # what pyproject.toml asks for and is not there
#   bash scripts/install_in_place.sh project    # the project itself, from this folder
#
# Torch, and what was built for it (Transformer Engine, Apex, flash-attn, triton, CUDA's libraries),
# keep their versions, or nothing is installed. Another package is replaced only where its version
# does not do; that is told. What is new comes in the versions of constraints.txt, if these get along
# with what is there, else in the newest that do.
#
# Settings (environment variables):
#   PYTHON   The Python to install into; else python3.
#
# Exit codes: 0 installed; 2 this Python cannot be used; 1 anything else.

set -euo pipefail

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}

say() { printf '[install] %s\n' "$*"; }

die() {
  printf 'error: %s\n' "${*:2}" >&2
  exit "$1"
}

ask() { "$python" -P "$repo/scripts/requirements.py" "$@"; }

pip_install() {
  "$python" -m pip install --disable-pip-version-check --no-input --no-cache-dir \
    --quiet --progress-bar off "$@"
}

# NVIDIA's images give pip the versions of all that they were built with, by PIP_CONSTRAINT; also of
# packages that were only needed for that, and of some that are too old here (packaging 23.2).
unset PIP_CONSTRAINT PIP_USER PIP_TARGET PIP_PREFIX PYTHONPATH

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

check_python() {
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null ||
    die 2 "$python is no Python 3.12 or newer: choose another image, or name one in PYTHON"
  "$python" -c 'import torch' 2>"$scratch/error" ||
    die 2 "$python has no torch that can be imported ($(tail -n 1 "$scratch/error"))"
}

install_packages() {
  local line
  ask missing >"$scratch/missing"
  ! grep -qE '^torch[^a-z0-9_-]' "$scratch/missing" ||
    die 2 "$python has torch $(ask builds | sed -n 's/^torch==//p'), and" \
      "$(grep -E '^torch[^a-z0-9_-]' "$scratch/missing") is needed: choose a newer image"
  ask builds >"$scratch/builds"
  ask absent >"$scratch/absent"
  ask installed >"$scratch/before"
  say "keeping: $(paste -sd ' ' "$scratch/builds")"
  if [[ -s $scratch/missing ]]; then
    say "installing: $(paste -sd ' ' "$scratch/missing")"
    if ! pip_install --constraint "$scratch/builds" --constraint "$scratch/absent" \
      --requirement "$scratch/missing"; then
      say "the versions of constraints.txt do not get along with this Python's: taking others"
      pip_install --constraint "$scratch/builds" --requirement "$scratch/missing" ||
        die 1 "pip failed, see above"
    fi
  fi
  ask installed >"$scratch/after"
  # Lines of "before" that are gone: another version is there now, or none.
  while read -r line; do
    say "replaced: $line by $(grep -E "^${line%%==*}==" "$scratch/after" || echo nothing)"
  done < <(grep -vxFf "$scratch/after" "$scratch/before" || true)
  ask builds >"$scratch/builds-after"
  grep -qvxFf "$scratch/builds-after" "$scratch/builds" &&
    die 1 "pip has replaced what it was to keep: $(grep -vxFf "$scratch/builds-after" "$scratch/builds")"
  [[ -z $(ask missing) ]] || die 1 "still missing: $(ask missing | paste -sd ' ')"
}

install_project() {
  local isolation=()
  # What builds a project is taken from here where it is new enough, else pip gets it for the build.
  ! "$python" -c 'import setuptools; assert int(setuptools.__version__.split(".")[0]) >= 77' \
    2>/dev/null || isolation=(--no-build-isolation)
  pip_install --no-deps "${isolation[@]}" --editable "$repo"
  # A user who is not root cannot write the caches of compiled Python later.
  "$python" -m compileall -q "$repo/megatron_prores" "$repo/tools" "$repo/pretrain_gpt_prores.py"
}

check_python
case ${1:-} in
  packages) install_packages ;;
  project) install_project ;;
  *) die 2 "${1:-no word given}: give packages or project" ;;
esac
say "done"
