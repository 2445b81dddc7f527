#!/usr/bin/env bash
# Checks the project: style, types, shell scripts, then the tests.
#
#   bash tests/run.sh                 # everything
#   bash tests/run.sh --quick         # the same checks, but only the tests in tests/unit
#   bash tests/run.sh --gpu           # only the tests in tests/gpu, for a machine with GPUs
#   bash tests/run.sh -k warmup       # what is left of the arguments goes to pytest
#   bash tests/run.sh --random-models 200 --random-seed 7    # as many random models, of that seed
#
# The first run makes the environment (scripts/setup.sh, which see for its settings). A check that
# fails does not keep the tests from running, but fails the whole: exit code 0 means all is well.

set -euo pipefail

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$repo"

selection=all
case ${1:-} in
  --quick | --gpu)
    selection=${1#--}
    shift
    ;;
esac

started=$SECONDS
PYTHON=$(bash scripts/setup.sh)
# The environment may serve several clones: this one's code comes first.
export PYTHONPATH=$repo${PYTHONPATH:+:$PYTHONPATH}

failed=0
summary=()

# step NAME COMMAND...: runs it, and notes for the end how it went and how long it took.
step() {
  local name=$1 start=$SECONDS code=0 outcome=ok
  shift
  printf '\n== %s\n' "$name"
  "$@" || code=$?
  if ((code != 0)); then
    outcome="FAILED (exit code $code)"
    failed=1
  fi
  summary+=("$(printf '%-12s %s, %d s' "$name" "$outcome" $((SECONDS - start)))")
}

skip_step() {
  printf '\n== %s\nskipped: %s\n' "$1" "$2"
  summary+=("$(printf '%-12s skipped: %s' "$1" "$2")")
}

# The shellcheck of the environment, or else the machine's own.
find_shellcheck() {
  local beside
  beside=$(dirname "$PYTHON")/shellcheck
  if [[ -x $beside ]]; then echo "$beside"; else command -v shellcheck; fi
}

check_shell_scripts() {
  local shellcheck places=() place scripts=()
  if ! shellcheck=$(find_shellcheck); then
    skip_step shellcheck "no shellcheck command on this machine"
    return
  fi
  # Named places, not the whole clone: a virtual environment's own scripts are not ours.
  for place in scripts tests examples tools .ci/run; do
    [[ ! -e $place ]] || places+=("$place")
  done
  mapfile -t scripts < <(find "${places[@]}" \( -name '*.sh' -o -name '*.sbatch' -o -path .ci/run \) | sort)
  step shellcheck "$shellcheck" "${scripts[@]}"
}

summary+=("$(printf '%-12s ok, %d s' environment $((SECONDS - started)))")
if [[ $selection != gpu ]]; then
  step "ruff check" "$PYTHON" -m ruff check .
  step "ruff format" "$PYTHON" -m ruff format --check .
  step mypy "$PYTHON" -m mypy
  check_shell_scripts
fi

if [[ $selection == gpu ]] &&
  ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "error: --gpu: no GPU was found on this machine, every test would be skipped" >&2
  exit 2
fi

# What pyproject.toml names, or the paths among the arguments, if there is no other selection. A file
# per worker at a time, as its tests share what they set up. The first files take longest: their order
# stays. The tests wait more than they compute, so that a worker per core does not crowd them.
cores=$(nproc)
selected=(--numprocesses $((cores < 8 ? cores : 8)) --dist loadfile --no-loadscope-reorder)
case $selection in
  quick) selected+=(tests/unit) ;;
  # Its runs share one GPU, several at a time as it is.
  gpu) selected=(tests/gpu --numprocesses 0) ;;
esac
# pytest ends with each skipped test's reason (-ra) and its closing line. It exits with 5 when there
# was no test to run: a failure as well.
step pytest "$PYTHON" -m pytest -ra --durations=15 "${selected[@]}" "$@"

printf '\n'
printf '[tests] %s\n' "${summary[@]}"
if ((failed)); then
  echo "[tests] something FAILED, see above"
else
  echo "[tests] all is well, $((SECONDS - started)) s"
fi
exit "$failed"
