#!/usr/bin/env bash
# Installs what is needed on a GPU machine without a network, from a folder of wheels.
#
#   bash scripts/install_wheels.sh FOLDER            # into the Python that runs, or that PYTHON names
#   bash scripts/install_wheels.sh FOLDER TARGET     # into the folder TARGET, beside that Python
#
# The folder is made by scripts/collect_wheels.sh, on a machine with a network. Wheels that were cut
# into pieces to travel (X.whl.part-00, X.whl.part-01, ...) are joined; SHA256SUMS is checked where
# it is there. Installed is what the Python lacks, or has in a version that does not do; its torch,
# and what was built for it, stay. A wheel for another Python ends it before anything is installed.
# Then the doctor looks at the result.
#
# TARGET is for a Python whose own folder must not be changed: it is put on PYTHONPATH. What is in it
# is replaced by the next installation.
#
# Settings (environment variables):
#   PYTHON   The Python to install into; else python3.
#   TMPDIR   Where pieces are joined; else /tmp.
#
# Exit codes: 0 installed, and the doctor finds all that is needed; 2 the folder or the Python cannot
# be used; 1 anything else, also that the doctor misses something.

set -euo pipefail

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
# The order of pieces is that of their names.
export LC_ALL=C

say() { printf '[wheels] %s\n' "$*" >&2; }

die() {
  printf 'error: %s\n' "${*:2}" >&2
  exit "$1"
}

(($# == 1 || $# == 2)) || die 2 "give the folder of wheels, and a target folder if one is wanted"
folder=$1 target=${2:-}
[[ -d $folder ]] || die 2 "$folder: no such folder"
[[ -z $target || -d $target || ! -e $target ]] || die 2 "$target: is not a folder"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null ||
  die 2 "$python is no Python 3.12 or newer: name one in PYTHON"

unset PIP_CONSTRAINT PIP_USER PIP_TARGET PIP_PREFIX PIP_REQUIRE_VIRTUALENV

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

# Joins the pieces of each cut wheel, in the scratch folder.
join_pieces() {
  local piece name
  shopt -s nullglob
  for piece in "$folder"/*.whl.part-*; do
    name=${piece##*/}
    name=${name%.part-*}
    [[ -e $folder/$name ]] || cat "$piece" >>"$scratch/$name"
  done
  for name in "$scratch"/*.whl; do
    say "joined ${name##*/}"
    "$python" -m zipfile --test "$name" >/dev/null 2>&1 ||
      die 2 "${name##*/}: a piece is missing or damaged in $folder"
  done
}

# The sums are of whole wheels, wherever they lie now.
check_sums() {
  local sum name place
  [[ -f $folder/SHA256SUMS ]] || return 0
  while read -r sum name; do
    place=$folder/$name
    [[ -e $place ]] || place=$scratch/$name
    [[ -e $place ]] || die 2 "$name is named in $folder/SHA256SUMS, and is not there"
    printf '%s  %s\n' "$sum" "$place"
  done <"$folder/SHA256SUMS" >"$scratch/sums"
  sha256sum --check --quiet "$scratch/sums" >"$scratch/failed" 2>/dev/null ||
    die 2 "damaged on the way: $(cut -d : -f 1 "$scratch/failed" | xargs -r -n 1 basename | paste -sd ' ')"
}

tell_other_torch() {
  local built here
  [[ -f $folder/TORCH ]] || return 0
  built=$(<"$folder/TORCH")
  here=$("$python" -c 'from importlib.metadata import version; print(version("torch"))')
  [[ ${here%%+*} == "$built" ]] ||
    say "collected for torch $built, and this is $here: Transformer Engine may not load"
}

join_pieces
check_sums
"$python" "$repo/scripts/choose_wheels.py" "$folder" "$scratch" >"$scratch/chosen"
tell_other_torch
mapfile -t chosen <"$scratch/chosen"

install() {
  "$python" -m pip install --disable-pip-version-check --no-input --quiet --progress-bar off \
    --no-index --no-deps "$@" ||
    die 1 "pip failed, see above; with a folder as second argument this Python is left as it is"
}

if ((${#chosen[@]} == 0)); then
  say "nothing to install: $python has everything"
else
  say "installing ${#chosen[@]} wheels${target:+ into $target}:" \
    "$(sed -E 's|.*/||; s|^([^-]+)-([^-]+)-.*|\1==\2|' "$scratch/chosen" | paste -sd ' ')"
  if [[ -n $target ]]; then
    # At once: pip would not put a second package into a folder that several share.
    install --target "$target" --upgrade "${chosen[@]}"
  else
    install "${chosen[@]}"
  fi
fi

need=cpu
[[ -z $(find "$folder" -name 'transformer_engine_torch-*.whl*' -print -quit) ]] || need=cpu,te
path=${target:+$(cd "$target" 2>/dev/null && pwd):}$repo
say "to use it: export PYTHONPATH=$path"
PYTHONPATH=$path${PYTHONPATH:+:$PYTHONPATH} "$python" -m megatron_prores.doctor --need "$need"
