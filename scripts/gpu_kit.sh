#!/usr/bin/env bash
# The first hour on a GPU machine without a network: install what is missing, and prove what has never
# run on a GPU. docs/gpu_kit.md says what each line of the report proves.
#
#   bash scripts/gpu_kit.sh A     # megatron-core alone, local layers: at most eight minutes
#   bash scripts/gpu_kit.sh B     # with Transformer Engine: FP8, graphs, 1.3B and 7B
#   bash scripts/gpu_kit.sh A --device cpu    # a rehearsal of every step at a small size
#
# What follows the stage goes to studies/gpu_kit.py: --output, --minutes, --steps. The same command
# goes on after a cut.
#
# Settings (environment variables):
#   PYTHON       The machine's Python with its torch; else python3.
#   KIT_WHEELS   The folder that scripts/collect_wheels.sh has made; else wheels. Where there is none,
#                the Python has everything.
#   KIT_TARGET   Where the wheels are installed; else a folder in TMPDIR (/tmp), one for each stage.

set -euo pipefail

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
wheels=${KIT_WHEELS:-wheels}
target=${KIT_TARGET:-${TMPDIR:-/tmp}/prores-kit-$UID-${1:-}}
path=$repo

if [[ -d $wheels && ${1:-} == [AB] ]]; then
  if [[ ! -d $target ]]; then
    # It ends with the doctor, who has a step of his own here: what matters is that there is Megatron.
    PYTHON=$python bash "$repo/scripts/install_wheels.sh" "$wheels" "$target.part" >&2 ||
      [[ -d $target.part/megatron ]] || exit 2
    mv "$target.part" "$target"
  fi
  path=$target:$path
elif [[ -n ${KIT_WHEELS:-} ]]; then
  printf 'error: KIT_WHEELS=%s: no such folder\n' "$KIT_WHEELS" >&2
  exit 2
fi
export PYTHONPATH=$path${PYTHONPATH:+:$PYTHONPATH}
exec "$python" -m studies.gpu_kit "$@"
