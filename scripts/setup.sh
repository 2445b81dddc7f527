#!/usr/bin/env bash
# Makes the Python environment that this project runs in, once, and tells where its Python is.
#
#   PYTHON=$(bash scripts/setup.sh)      # standard output: one line, the path of a Python
#   export PYTHONPATH=$PWD               # the project's own code is not installed, see below
#   "$PYTHON" -m pytest
#
# Everything it has to say goes to standard error. When nothing is to be done it takes well under a
# second. The first time it makes a virtual environment with the exact versions of constraints.txt:
# about 6 GB on disk, 10 GB while it installs. An interrupted set-up is made anew by the next.
#
# The Python that runs already is taken as it is, and nothing is made, when it has all that
# pyproject.toml asks for (its "dependencies" and "dev" extra). So a container keeps its own torch.
#
# Settings (environment variables):
#   PRORES_PYTHON  The Python to use (path or command); else one is looked for: 3.12, 3.13, newer.
#   PRORES_VENV    Where the virtual environment goes; else .venv in this clone. With it set, the
#                  Python that runs already is not looked at. Clones may share one: the project itself
#                  is not installed into it, each clone's code is found through PYTHONPATH.
#   PRORES_SYSTEM_SITE_PACKAGES=1
#                  For a container with its own torch that lacks a few packages: makes a virtual
#                  environment on top of it, which only has what is missing there. No package of the
#                  container is replaced, so the versions are its own, not those of constraints.txt.
#
# Writes nothing outside the virtual environment, but for pip's own cache.
# Exit codes: 0 ready; 2 a setting is wrong; 1 anything else.

set -euo pipefail

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${PRORES_VENV:-$repo/.venv}
[[ $venv == /* ]] || venv=$PWD/$venv
venv_python=$venv/bin/python

# The mark that this script made the directory: it deletes in no other. Also what it locks.
mark=$venv/.prores-setup.lock
# Written last: says that the environment is whole, and for which requirements.
stamp=$venv/.prores-setup.stamp
log=$venv/setup.log

# Measured: 6 GB when done, and 3 GB of downloads that pip keeps until all is unpacked.
needed_gb=10

# Whose packages count: the environment's own alone, or first those of the Python it is made from.
mode=own
# The modules that this Python must have. Debian's python3.12 lacks ensurepip until python3.12-venv
# is installed; a Python that was built without a library lacks that library's module.
needed_modules=(venv ensurepip ssl ctypes zlib)
if [[ ${PRORES_SYSTEM_SITE_PACKAGES:-0} == 1 ]]; then
  mode=system
  needed_gb=2
  needed_modules=(venv pip)
fi

# An update in place seldom changes more than a few packages.
needed_gb_update=2

wanted_version='' # of PRORES_PYTHON, such as 3.12; empty when any will do
torch_note=''     # that the Python that runs already has a torch, and what it lacks
pip_pid=''

main() {
  # Standard output is for the answer alone, whatever the programs below print.
  exec 3>&1 1>&2

  if [[ -n ${PRORES_PYTHON:-} ]]; then
    wanted_version=$(probe_python "$PRORES_PYTHON" "${needed_modules[@]}") ||
      die 2 "PRORES_PYTHON=$PRORES_PYTHON cannot be used: it ${wanted_version:-does not run}"
  fi
  if [[ -z ${PRORES_VENV:-} ]]; then
    answer_with_active_python
  fi
  answer_if_ready

  local base=''
  refuse_foreign_directory
  can_update || base=$(find_base_python)
  mkdir -p "$venv" || die 1 "cannot make $venv; name another place in PRORES_VENV"
  lock
  answer_if_ready # another set-up may have finished while this one waited
  if can_update; then
    say "the requirements have changed: updating $venv"
    check_disk_space "$needed_gb_update"
  else
    make_venv "${base:-$(find_base_python)}"
  fi
  install_requirements
  answer_if_ready
  die 1 "$venv is not complete after the installation; see $log"
}

# ---- What it says ------------------------------------------------------------------------------

say() { printf '[setup] %s\n' "$*" >&2; }

die() {
  printf 'error: %s\n' "${*:2}" >&2
  exit "$1"
}

# The one line on standard output, and the end.
answer() {
  printf '%s\n' "$1" >&3
  exit 0
}

# ---- Questions about the project and an environment --------------------------------------------

# project PYTHON COMMAND: asks about pyproject.toml and constraints.txt, see requirements.py.
project() {
  "$1" -P "$repo/scripts/requirements.py" "$2" "$mode"
}

# The virtual environment is whole and made for these requirements.
is_ready() {
  local current
  [[ -f $stamp && -x $venv_python ]] || return 1
  # Its Python may be gone, or be another machine's: only running it tells.
  current=$(project "$venv_python" stamp 2>/dev/null) || return 1
  [[ $current == "$(<"$stamp")" && $current == "$wanted_version"* ]]
}

# It was whole once, for other requirements, so pip can bring it up to date.
can_update() {
  local version
  [[ -f $stamp && -x $venv_python ]] || return 1
  version=$(probe_python "$venv_python" pip) || return 1
  # Of the wanted version, and made in the same mode.
  [[ $version == "$wanted_version"* && "$(<"$stamp")" == "$version $mode "* ]]
}

answer_if_ready() {
  ! is_ready || answer "$venv_python"
}

# Takes the Python that runs already when it has everything.
answer_with_active_python() {
  local python prefix lacking
  { read -r python && read -r prefix; } < <(active_python) || return 0
  # Our own environment, activated, is judged by its stamp: it must follow constraints.txt.
  [[ ! $prefix -ef $venv ]] || return 0
  lacking=$(project "$python" missing 2>/dev/null) || return 0
  if [[ -z $lacking ]]; then
    say "taking $python as it is: it has everything"
    answer "$python"
  fi
  # Not said yet: the environment may be there already.
  if [[ ! $lacking =~ (^|$'\n')torch[^a-z-] ]]; then
    torch_note="$python has torch, but lacks: ${lacking//$'\n'/, }"
  fi
}

# A directory of the user's is never deleted from or installed into; it may be taken as it is.
refuse_foreign_directory() {
  [[ -e $venv && ! -e $mark ]] || return 0
  [[ -d $venv ]] || die 2 "$venv is not a directory; name another place in PRORES_VENV"
  [[ -n $(ls -A "$venv") ]] || return 0
  if probe_python "$venv_python" >/dev/null && [[ -z $(project "$venv_python" missing 2>&1) ]]; then
    say "taking $venv as it is: it has everything"
    answer "$venv_python"
  fi
  die 2 "$venv was not made by this script, and is not an environment that has everything:" \
    "name another place in PRORES_VENV, or remove it if it holds nothing of yours"
}

# ---- Finding a Python --------------------------------------------------------------------------

# probe_python PYTHON MODULE...: prints its version, such as 3.12, or fails and prints what it lacks.
# It is run, because a file of that name proves nothing: a pyenv shim exists and fails. Prints
# nothing when it does not run. The code must also run in a Python 2.
probe_python() {
  env -u PYTHONPATH "$1" -c '
import sys
if sys.version_info < (3, 12):
    print("is Python %d.%d, and 3.12 or newer is needed" % sys.version_info[:2])
    sys.exit(1)
import importlib, sysconfig
if sys.implementation.name != "cpython" or sysconfig.get_config_var("Py_GIL_DISABLED"):
    print("is not the usual CPython, which the packages are built for")
    sys.exit(1)
for module in sys.argv[1:]:
    try:
        importlib.import_module(module)
    except ImportError:
        print("lacks the module %s" % module)
        sys.exit(1)
print("%d.%d" % sys.version_info[:2])
' "${@:2}" </dev/null 2>/dev/null
}

# The Python that the user's shell would run, if it is new enough: prints its path, then its prefix.
active_python() {
  local name
  for name in ${PRORES_PYTHON:+"$PRORES_PYTHON"} python3 python; do
    # PYTHONPATH counts here: what is found through it is there to be used.
    if "$name" -c 'import sys; sys.version_info < (3, 12) and sys.exit(1)
print(sys.executable); print(sys.prefix)' </dev/null 2>/dev/null; then
      return
    fi
  done
  return 1
}

# The places where people keep Pythons.
list_pythons() {
  local name home=${HOME:-/nonexistent}
  for name in python3 python python3.12 python3.13 python3.14; do
    type -aP "$name" || true
  done
  local root roots=(
    ${CONDA_PREFIX:+"$CONDA_PREFIX"}
    "$home"/{miniconda3,miniforge3,mambaforge,anaconda3,micromamba} /opt/conda
    ${MAMBA_ROOT_PREFIX:+"$MAMBA_ROOT_PREFIX"}
  )
  shopt -s nullglob
  for root in "${PYENV_ROOT:-$home/.pyenv}" "$home/.pyenv"; do
    printf '%s\n' "$root"/versions/*/bin/python3
  done
  for root in "${roots[@]}"; do
    printf '%s\n' "$root"/bin/python3 "$root"/envs/*/bin/python3
  done
  for root in "${UV_PYTHON_INSTALL_DIR:-$home/.local/share/uv/python}" \
    "$home/.local/share/uv/python"; do
    printf '%s\n' "$root"/*/bin/python3
  done
}

# Prints the Python to make the environment from. 3.12 before 3.13 before newer: the older, the more
# packages have wheels for it.
find_base_python() {
  local candidate answer best='' best_minor=99 refused=''
  if [[ -n ${PRORES_PYTHON:-} ]]; then
    echo "$PRORES_PYTHON"
    return
  fi
  while read -r candidate; do
    [[ -x $candidate ]] || continue
    if answer=$(probe_python "$candidate" "${needed_modules[@]}"); then
      if ((${answer#3.} < best_minor)); then
        best=$candidate best_minor=${answer#3.}
      fi
      ((best_minor > 12)) || break
    else
      refused+="  $candidate ${answer:-does not run}"$'\n'
    fi
  done < <(if [[ $mode == own ]]; then list_pythons; else active_python | head -n 1; fi | unique)
  if [[ -z $best ]]; then
    explain_no_python "$refused"
    exit 1
  fi
  ((best_minor <= 13)) ||
    say "only Python 3.$best_minor found: what has no wheel for it is built, which needs a C++ compiler"
  echo "$best"
}

unique() { awk '!seen[$0]++'; }

explain_no_python() {
  {
    echo "error: no usable Python 3.12 or newer was found"
    if [[ -n $1 ]]; then
      echo "Looked at:"
      printf '%s' "$1"
    fi
    if [[ $mode == system ]]; then
      echo "PRORES_SYSTEM_SITE_PACKAGES=1 builds on the python3 on PATH, which must be one of those."
      return
    fi
    cat <<'END'
Install one, for example in one of these ways, and start again:
  apt-get install python3.13 python3.13-venv python3.13-dev   (Debian 13; on Ubuntu 24.04: 3.12)
  uv python install 3.12
  pyenv install 3.12
  conda create -n prores python=3.12
One in another place is named by PRORES_PYTHON=/path/to/python3.
END
  } >&2
}

# ---- Making the environment --------------------------------------------------------------------

# One set-up at a time in one environment. pip inherits the lock: if this script is killed and pip
# lives on, the next set-up waits for that pip.
lock() {
  local code
  exec 9>>"$mark"
  if ! command -v flock >/dev/null; then
    say "no flock command here: make sure that no other set-up runs in $venv"
    return
  fi
  flock -n -E 75 9 && return
  while true; do
    code=0
    say "another set-up is at work in $venv: waiting for it"
    flock -w 15 -E 75 9 || code=$?
    ((code != 0)) || return 0
    if ((code != 75)); then
      say "this file system has no locks: make sure that no other set-up runs in $venv"
      return
    fi
  done
}

check_disk_space() {
  local free_kb
  free_kb=$(df -Pk "$venv" 2>/dev/null | awk 'NR == 2 { print $4 }') || return 0
  [[ $free_kb =~ ^[0-9]+$ ]] || return 0
  ((free_kb >= $1 * 1000 * 1000)) || die 1 "$1 GB of free disk are needed at $venv, and" \
    "$((free_kb / 1000 / 1000)) GB are there; free some, or name another place in PRORES_VENV"
}

# make_venv PYTHON: an empty virtual environment, in place of what a broken-off set-up left.
make_venv() {
  local python options=()
  if [[ -n $(find "$venv" -mindepth 1 -maxdepth 1 ! -path "$mark" | head -n 1) ]]; then
    say "$venv is half-made, or no longer works: making it anew"
    find "$venv" -mindepth 1 -maxdepth 1 ! -path "$mark" -exec rm -rf {} +
  fi
  if [[ -n $torch_note && $mode == own ]]; then
    say "$torch_note"
    say "so an environment with a torch of its own is made; to build on that torch instead, set"
    say "PRORES_SYSTEM_SITE_PACKAGES=1, or install what is lacking with its pip"
  fi
  say "making a virtual environment in $venv from $1"
  check_disk_space "$needed_gb"
  # Not by way of a symbolic link: from one outside its own folder, a Python makes an environment
  # that may take another Python's packages for the system's.
  python=$("$1" -c 'import os, sys; print(os.path.realpath(sys.executable))')
  [[ $mode == own ]] || options=(--system-site-packages --without-pip)
  # An empty array is an unset variable to older bashes, hence the ${...+...}.
  env -u PYTHONPATH "$python" -m venv ${options[@]+"${options[@]}"} "$venv" >"$log" 2>&1 </dev/null || {
    tail -n 15 "$log" >&2
    die 1 "$1 could not make a virtual environment in $venv"
  }
  # Or pip would install a second torch over the one that was to be kept.
  if [[ $mode == system && $(project "$venv_python" missing) != "$(project "$1" missing)" ]]; then
    die 1 "an environment made from $1 does not see all of its packages (it may be a virtual" \
      "environment itself): install what is lacking with its own pip"
  fi
}

install_requirements() {
  local requirements=$venv/setup-requirements.txt constraints=$repo/constraints.txt
  rm -f "$stamp"
  if [[ $mode == own ]]; then
    project "$venv_python" requirements >"$requirements"
    # A container's PIP_CONSTRAINT holds its own versions, which would contradict ours.
    unset PIP_CONSTRAINT
  else
    constraints=$venv/setup-constraints.txt
    project "$venv_python" missing >"$requirements"
    project "$venv_python" pins >"$constraints"
  fi
  # PYTHONPATH would make pip take packages there for installed; the others send them elsewhere.
  unset PYTHONPATH PIP_USER PIP_TARGET PIP_PREFIX
  # pip's downloads go where the free space was checked: /tmp may be small.
  mkdir -p "$venv/tmp"
  if [[ $mode == own ]]; then
    say "installing with pip: about 3 GB to download the first time, 6 GB on disk, several minutes"
  else
    say "installing with pip what the container lacks"
  fi
  say "pip's own words are in $log"
  trap stop_pip EXIT
  trap 'exit 129' HUP
  trap 'exit 130' INT
  trap 'exit 143' TERM
  TMPDIR=$venv/tmp "$venv_python" -m pip install \
    --disable-pip-version-check --no-input --progress-bar off --constraint "$constraints" \
    --requirement "$requirements" >"$log" 2>&1 </dev/null 3>&- &
  pip_pid=$!
  wait_for_pip
  rm -rf "$venv/tmp"
  project "$venv_python" stamp >"$stamp.new"
  mv "$stamp.new" "$stamp"
  say "done after $SECONDS s"
}

# Waits, with a sign of life every 15 s.
wait_for_pip() {
  local next=$((SECONDS + 15)) code=0 size
  while kill -0 "$pip_pid" 2>/dev/null; do
    sleep 0.2
    if ((SECONDS >= next)); then
      next=$((SECONDS + 15))
      size=$(du -sh "$venv" 2>/dev/null | cut -f 1) || true # files come and go under it
      say "$SECONDS s, ${size:-?} on disk; pip: $(tail -n 1 "$log" | cut -c 1-70)"
    fi
  done
  wait "$pip_pid" || code=$?
  pip_pid=''
  if ((code != 0)); then
    tail -n 15 "$log" >&2
    die 1 "pip failed (exit code $code); its last lines are above, all of them in $log"
  fi
}

# Called at the end, whatever it is: pip, in the background, would not notice a Ctrl-C by itself.
# shellcheck disable=SC2329  # the EXIT trap calls it
stop_pip() {
  [[ -n $pip_pid ]] || return 0
  kill "$pip_pid" 2>/dev/null || true
  wait "$pip_pid" 2>/dev/null || true
  say "stopped; the next set-up starts anew, with what pip has downloaded so far in its cache"
}

main
