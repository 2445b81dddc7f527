#!/usr/bin/env bash
# Collect, on a machine with a network, the wheels that a GPU machine without one needs. Counterpart
# of scripts/install_wheels.sh, which installs them there.
#
#   bash scripts/collect_wheels.sh FOLDER
#
# That machine has Linux x86-64, Python 3.12, and torch; everything else that pyproject.toml asks for
# is collected, in the versions of constraints.txt, and Transformer Engine. That one's part for torch
# is built here, against the same torch, which takes the compiler of CUDA (nvcc) and about ten minutes
# on two cores; no GPU. Files above 60 MB are cut into pieces. What is in FOLDER already is kept, so
# a build is not made twice, and what has broken off goes on.
#
# Settings (environment variables):
#   PRORES_TORCH      The torch of that machine, 2.11.0 if nothing is said. What is built for one
#                     does not load into another.
#   PRORES_TE         The version of Transformer Engine; 2.20.2. none leaves it out.
#   PRORES_BUILD_VENV A virtual environment with that torch; else FOLDER.build, made and kept: 5 GB.
#   PYTHON            The Python 3.12 to make it from; else python3.12.
#   CUDA_HOME         Where bin/nvcc is, of the CUDA version that torch has; else /usr/local/cuda.
#   MAX_JOBS          Compilers at a time; 2. Each takes up to 4 GB of memory.
#   PRORES_PIECE_MB   The largest file, 60 MB.
#
# Exit codes: 0 collected; 2 a setting is wrong; 1 anything else.

set -euo pipefail
shopt -s nullglob
export LC_ALL=C

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
torch=${PRORES_TORCH:-2.11.0}
te=${PRORES_TE:-2.20.2}
piece_mb=${PRORES_PIECE_MB:-60}
cuda=${CUDA_HOME:-/usr/local/cuda}

say() { printf '[wheels] %s\n' "$*" >&2; }

die() {
  printf 'error: %s\n' "${*:2}" >&2
  exit "$1"
}

(($# == 1)) || die 2 "give the folder that the wheels are to go into"
[[ -d $1 || ! -e $1 ]] || die 2 "$1: is not a folder"
for setting in "PRORES_TORCH=$torch" "PRORES_TE=$te"; do
  [[ ${setting#*=} =~ ^[0-9]+(\.[0-9]+)+$ || $setting == PRORES_TE=none ]] ||
    die 2 "$setting: give a version, such as 2.11.0"
done
[[ $piece_mb =~ ^[1-9][0-9]*$ ]] || die 2 "PRORES_PIECE_MB=$piece_mb: give a whole number above 0"
venv=${PRORES_BUILD_VENV:-$1.build}
python=$venv/bin/python
[[ -z ${PRORES_BUILD_VENV:-} || -x $python ]] ||
  die 2 "PRORES_BUILD_VENV=$venv: no virtual environment"
built=("$1"/transformer_engine_torch-"$te"-cp312-*.whl)
[[ $te == none || -n ${built[*]} || -x $cuda/bin/nvcc ]] ||
  die 2 "no $cuda/bin/nvcc, which Transformer Engine is built with: name CUDA's folder in CUDA_HOME," \
    "or leave it out with PRORES_TE=none"

unset PIP_CONSTRAINT PIP_USER PIP_TARGET PIP_PREFIX PYTHONPATH
mkdir -p "$1"
folder=$(cd "$1" && pwd)

pip() { "$python" -m pip "$1" --quiet --disable-pip-version-check "${@:2}"; }

if [[ ! -x $python ]]; then
  base=${PYTHON:-python3.12}
  "$base" -c 'import sys, venv; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null ||
    die 2 "$base is no Python 3.12 that can make virtual environments: name one in PYTHON"
  "$base" -m venv "$venv"
fi
if [[ $("$python" -c 'import torch; print(torch.__version__.split("+")[0])' 2>&1) != "$torch" ]]; then
  [[ -z ${PRORES_BUILD_VENV:-} ]] || die 2 "PRORES_BUILD_VENV=$venv does not hold torch $torch"
  say "getting torch $torch, to build against and to leave out: about 3 GB"
  pip install "torch==$torch" numpy packaging setuptools wheel pybind11 ninja
fi

wanted=()
if [[ $te != none ]]; then
  # Spelt as in its metadata: an older pip finds no core_cu13.
  wanted=("transformer_engine[pytorch,core-cu13]==$te")
  if ((${#built[@]} == 0)); then
    say "building transformer_engine_torch $te, about ten minutes on two cores"
    # As NVIDIA's own build, with the headers of the CUDA packages that torch has brought.
    includes=("$venv"/lib/python3.12/site-packages/nvidia/*/include)
    CPATH=$(IFS=: && echo "${includes[*]}") CUDA_HOME=$cuda NVTE_FRAMEWORK=pytorch \
      MAX_JOBS=${MAX_JOBS:-2} pip wheel --no-deps --no-build-isolation --wheel-dir "$folder" \
      "transformer_engine_torch==$te" || die 1 "the build failed, see above"
  fi
fi

# Whole again what an earlier start has cut: pip can only look into whole wheels.
for first in "$folder"/*.whl.part-00; do
  cat "${first%00}"* >"${first%.part-00}"
  rm "${first%00}"*
done
mapfile -t names < <(
  "$python" -P "$repo/scripts/requirements.py" collect "$folder" "${wanted[@]}"
)
((${#names[@]})) || die 1 "pip finds no versions that get along with torch $torch, see above"
say "downloading ${#names[@]} packages"
# For Python 3.12 on any Linux of the last years.
platforms=(--platform=manylinux{_2_28,_2_27,_2_26,_2_24,_2_17,2014,_2_12,2010,_2_5,1}_x86_64)
pip download --no-deps --only-binary :all: --implementation cp --python-version 3.12 \
  "${platforms[@]}" --dest "$folder" "${names[@]}"

# The same version is built for several CUDAs, and what is built for one does not load with another.
"$python" -c 'import torch; print(torch.__version__.split("+")[0], "with CUDA", torch.version.cuda)' \
  >"$folder/TORCH"
(cd "$folder" && sha256sum -- *.whl >SHA256SUMS)
for wheel in "$folder"/*.whl; do
  (($(stat --dereference --format %s "$wheel") > piece_mb * 1000000)) || continue
  split --bytes "${piece_mb}MB" --numeric-suffixes "$wheel" "$wheel.part-"
  rm "$wheel"
done
say "$(wc -l <"$folder/SHA256SUMS") wheels in $folder, $(du -sh "$folder" | cut -f 1);" \
  "there: bash scripts/install_wheels.sh ${folder##*/}"
