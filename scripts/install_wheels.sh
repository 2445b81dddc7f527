#!/usr/bin/env bash
# Install what is needed on a GPU machine without a network, from a folder of wheels.
#
#   bash scripts/install_wheels.sh FOLDER            # into the Python that runs, or that PYTHON names
#   bash scripts/install_wheels.sh FOLDER TARGET     # into the folder TARGET, beside that Python
#
# scripts/collect_wheels.sh makes the folder, on a machine with a network. Wheels that were cut into
# pieces to travel (X.whl.part-00, X.whl.part-01, ...) are joined, and SHA256SUMS is checked where it
# is there. Installed is what the Python lacks, or has in a version that does not do; its torch, and
# what was built for it, stay (requirements.py). Then the doctor looks at the result.
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
shopt -s nullglob
export LC_ALL=C # the order of pieces is that of their names

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}

say() { printf '[wheels] %s\n' "$*" >&2; }

die() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

(($# == 1 || $# == 2)) || die "give the folder of wheels, and a target folder if one is wanted"
folder=$1 target=${2:-}
[[ -d $folder ]] || die "$folder: no such folder"
[[ -z $target || -d $target || ! -e $target ]] || die "$target: is not a folder"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null ||
  die "$python is no Python 3.12 or newer: name one in PYTHON"
unset PIP_CONSTRAINT PIP_USER PIP_TARGET PIP_PREFIX PIP_REQUIRE_VIRTUALENV

# All wheels side by side: links to those that are whole, and what the pieces of the others give.
folder=$(cd "$folder" && pwd)
whole=$(mktemp -d)
trap 'rm -rf "$whole"' EXIT
for wheel in "$folder"/*.whl; do ln -s "$wheel" "$whole"; done
for piece in "$folder"/*.whl.part-*; do
  name=${piece##*/} name=${name%.part-*}
  [[ -L $whole/$name ]] || cat "$piece" >>"$whole/$name"
done
[[ -n $(ls -A "$whole") ]] || die "$folder: no wheel in it"
if [[ -f $folder/SHA256SUMS ]]; then
  bad=$(cd "$whole" && sha256sum --check --quiet "$folder/SHA256SUMS" 2>/dev/null) ||
    die "missing in $folder, or damaged: $(cut -d : -f 1 <<<"$bad" | paste -sd ' ')"
fi
for wheel in "$whole"/*.whl; do
  [[ ! -L $wheel ]] || continue
  say "joined ${wheel##*/}"
  "$python" -m zipfile --test "$wheel" >/dev/null 2>&1 ||
    die "${wheel##*/}: a piece is missing or damaged in $folder"
done
if [[ -f $folder/TORCH ]]; then
  here=$("$python" -c '
import torch
print(torch.__version__.split("+")[0], "with CUDA", torch.version.cuda)' 2>/dev/null) || here=none
  # What was collected before CUDA was noted says the version alone.
  [[ "$here " == "$(<"$folder/TORCH") "* ]] ||
    say "collected for torch $(<"$folder/TORCH"), and this is $here: Transformer Engine may not load"
fi

"$python" -P "$repo/scripts/requirements.py" install --wheels "$whole" ${target:+--target "$target"}

need=cpu
[[ -z $(compgen -G "$whole/transformer_engine_torch-*") ]] || need=cpu,te
path=${target:+$(cd "$target" 2>/dev/null && pwd):}$repo
say "to use it: export PYTHONPATH=$path"
PYTHONPATH=$path${PYTHONPATH:+:$PYTHONPATH} "$python" -m megatron_prores.doctor --need "$need"
