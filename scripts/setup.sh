#!/usr/bin/env bash
# Make the Python environment of this project, once, and print the path of its Python.
#
#   PYTHON=$(bash scripts/setup.sh)      # one line on standard output; the rest on standard error
#   export PYTHONPATH=$PWD               # the project itself is not installed
#   "$PYTHON" -m pytest
#
# The first run makes a virtual environment with the exact versions of constraints.txt, by pip: 6 GB
# on disk, 10 GB while it installs, a few minutes. Later runs take well under a second. What an
# interrupted run has left is made anew by the next; a second one waits for the first.
#
# None is made where the Python on PATH has all that pyproject.toml asks for (its dependencies and
# its "dev" extra). So a container keeps its own torch.
#
# Settings (environment variables):
#   PRORES_PYTHON  The Python to use (path or command); else one is looked for: 3.12, 3.13, newer.
#   PRORES_VENV    Where the virtual environment goes; else .venv in this clone. With it set, the
#                  Python on PATH is not taken. Clones may share one: each finds its own code
#                  through PYTHONPATH.
#   PRORES_SYSTEM_SITE_PACKAGES=1
#                  For a container with its own torch that lacks a few packages: the environment is
#                  made on top of the container's Python and only gets what is missing there. The
#                  container is not changed.
#
# Exit codes: 0 ready; 2 a setting is wrong; 1 anything else.

set -euo pipefail

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${PRORES_VENV:-$repo/.venv}
[[ $venv == /* ]] || venv=$PWD/$venv
python=$venv/bin/python
mark=$venv/.prores-setup.lock   # says that this script made the directory; also the lock
stamp=$venv/.prores-setup.stamp # written last: whole, and for which requirements

mode=own needed_gb=10 # measured: 6 GB when done, and 3 GB of downloads until all is unpacked
if [[ ${PRORES_SYSTEM_SITE_PACKAGES:-0} == 1 ]]; then mode=system needed_gb=2; fi
version='' # of PRORES_PYTHON, such as 3.12

main() {
  exec 3>&1 1>&2 # standard output is for the answer alone
  local base=''
  if [[ -n ${PRORES_PYTHON:-} ]]; then
    base=$(probe "$PRORES_PYTHON")
    [[ $base == 3.* ]] ||
      die 2 "PRORES_PYTHON=$PRORES_PYTHON cannot be used: it ${base#"no $PRORES_PYTHON "}"
    version=${base%% *} base=${base#* }
  fi
  [[ -n ${PRORES_VENV:-} ]] || answer_with_active_python
  # What is on PYTHONPATH would count as installed; a container's PIP_CONSTRAINT holds its own
  # versions; the others send packages elsewhere.
  unset PYTHONPATH PIP_CONSTRAINT PIP_USER PIP_TARGET PIP_PREFIX PIP_REQUIRE_VIRTUALENV
  answer_if_ready
  refuse_foreign_directory
  can_update || base=${base:-$(find_python)} # before anything is made
  mkdir -p "$venv" || die 1 "cannot make $venv; name another place in PRORES_VENV"
  lock
  answer_if_ready # another set-up may have finished while this one waited
  if can_update; then
    say "the requirements have changed: updating $venv"
    check_disk_space 2
  else
    [[ -n $base ]] || base=$(find_python)
    make_venv "$base"
  fi
  install_requirements </dev/null 3>&-
  say "done after $SECONDS s"
  answer "$python"
}

say() { printf '[setup] %s\n' "$*" >&2; }

die() {
  printf 'error: %s\n' "${*:2}" >&2
  exit "$1"
}

answer() {
  printf '%s\n' "$1" >&3
  exit 0
}

# project PYTHON COMMAND: asks requirements.py.
project() { "$1" -P "$repo/scripts/requirements.py" "${@:2}"; }

# ---- What is there already -----------------------------------------------------------------------

answer_if_ready() {
  # Its Python may be gone, or be another machine's: only running it tells.
  if [[ -f $stamp && $(<"$stamp") == "$version"* && -x $python ]] &&
    [[ $(project "$python" stamp "$mode" 2>/dev/null) == "$(<"$stamp")" ]]; then
    answer "$python"
  fi
}

# It was whole once, made in the same way, so that pip can bring it up to date.
can_update() {
  [[ -f $stamp && $(<"$stamp") == "$version"*" $mode "* && -x $python ]] &&
    "$python" -m pip --version >/dev/null 2>&1
}

# Takes the Python on PATH when it has everything.
answer_with_active_python() {
  local active lacking
  active=$(active_python) || return 0
  [[ ! ${active%/bin/*} -ef $venv ]] || return 0 # our own must follow constraints.txt
  lacking=$(project "$active" missing 2>/dev/null) || return 0
  if [[ -z $lacking ]]; then
    say "taking $active as it is: it has everything"
    answer "$active"
  elif [[ $mode == own && ! -f $stamp && ! $lacking =~ (^|$'\n')torch[^a-z-] ]]; then
    say "$active has torch, but lacks: ${lacking//$'\n'/, }"
    say "making an environment with another torch; PRORES_SYSTEM_SITE_PACKAGES=1 builds on that one"
  fi
}

# A directory of the user's is neither deleted from nor installed into.
refuse_foreign_directory() {
  [[ -e $venv && ! -e $mark ]] || return 0
  [[ -d $venv ]] || die 2 "$venv is not a directory; name another place in PRORES_VENV"
  [[ -n $(ls -A "$venv") ]] || return 0
  if [[ -x $python && -z $(project "$python" missing 2>&1) ]]; then
    say "taking $venv as it is: it has everything"
    answer "$python"
  fi
  die 2 "$venv was not made by this script, and is not an environment that has everything:" \
    "name another place in PRORES_VENV, or remove it if it holds nothing of yours"
}

# ---- Finding a Python ----------------------------------------------------------------------------

# probe PYTHON: prints "3.12 /its/real/path", or "no PYTHON" and why it cannot be used. It is run,
# because a file of that name proves nothing: a pyenv shim exists and fails. Python 2 reads this too.
probe() {
  local answer
  answer=$(env -u PYTHONPATH "$1" -c '
import os, sys
def has(*modules):
    try:
        return all(map(__import__, modules))
    except ImportError:
        return False
def reason():
    if sys.version_info < (3, 12):
        return "is Python %d.%d, and 3.12 or newer is needed" % sys.version_info[:2]
    import sysconfig
    if sys.implementation.name != "cpython" or sysconfig.get_config_var("Py_GIL_DISABLED"):
        return "is not the usual CPython, which the packages are built for"
    if not has("ssl", "ctypes", "zlib"):
        return "was built without ssl, ctypes or zlib"
    if not has("pip") and not (sys.argv[2] == "own" and has("venv", "ensurepip")):
        return "has neither pip nor ensurepip"
why, where = reason(), os.path.realpath(sys.executable)
print("no %s %s" % (sys.argv[1], why) if why else "%d.%d %s" % (sys.version_info[:2] + (where,)))
' "$1" "$mode" </dev/null 2>/dev/null) || answer="no $1 does not run"
  echo "$answer"
}

# The Python that the user's shell would run, if it is new enough.
active_python() {
  local name
  for name in ${PRORES_PYTHON:+"$PRORES_PYTHON"} python3 python; do
    # PYTHONPATH counts here: what is found through it is there to be used.
    "$name" -c 'import sys; sys.version_info < (3, 12) and sys.exit(1); print(sys.executable)' \
      </dev/null 2>/dev/null && return
  done
  return 1
}

# The places where people keep Pythons.
list_pythons() {
  local root home=${HOME:-/nonexistent}
  shopt -s nullglob
  type -aP python3 python python3.12 python3.13 python3.14 || true
  for root in "${PYENV_ROOT-}" "${UV_PYTHON_INSTALL_DIR-}" "${CONDA_PREFIX-}" \
    "${MAMBA_ROOT_PREFIX-}" "$home"/{.pyenv,.local/share/uv/python} \
    "$home"/{miniconda3,miniforge3,mambaforge,anaconda3,micromamba} /opt/conda; do
    [[ -z $root ]] || printf '%s\n' "$root"/{,*/,versions/*/,envs/*/}bin/python3
  done
}

# Prints the Python to make the environment from: 3.12 before 3.13 before newer, as more packages
# have wheels for the older.
find_python() {
  local found
  found=$(
    if [[ $mode == system ]]; then active_python || true; else list_pythons; fi |
      awk '!seen[$0]++' |
      while read -r each; do [[ ! -x $each ]] || probe "$each"; done |
      sort -s -V -k 1,1
  )
  if [[ $found != 3.* ]]; then
    say "no usable Python 3.12 or newer; looked at:"
    [[ -z $found ]] || printf '%s\n' "${found//no \//  /}" >&2
    cat >&2 <<'END'
Install one, in one of these ways for example; PRORES_PYTHON=/path/to/python3 names one elsewhere:
  apt-get install python3.13 python3.13-venv python3.13-dev   (Debian 13; on Ubuntu 24.04: 3.12)
  uv python install 3.12
  pyenv install 3.12
  conda create -n prores python=3.12
END
    die 1 "no usable Python 3.12 or newer was found, see above"
  fi
  [[ $found == 3.1[23]\ * ]] ||
    say "only a newer Python found: what has no wheel for it is built, which needs a C++ compiler"
  head -n 1 <<<"${found#* }"
}

# ---- Making the environment ----------------------------------------------------------------------

# One set-up at a time in one environment. pip inherits the lock: if this script is killed and pip
# lives on, the next set-up waits for that pip.
lock() {
  local code=0
  exec 9>>"$mark"
  flock -n -E 75 9 || code=$?
  if ((code == 75)); then
    say "another set-up is at work in $venv: waiting for it"
    code=0
    flock 9 || code=$?
  fi
  ((code == 0)) || say "no locks on this file system: make sure that no other set-up runs in $venv"
}

check_disk_space() {
  local free
  free=$(df -Pk "$venv" 2>/dev/null | awk 'NR == 2 { print int($4 / 1000000) }') || return 0
  ((${free:-$1} >= $1)) || die 1 "$1 GB of free disk are needed at $venv, and $free GB are there;" \
    "free some, or name another place in PRORES_VENV"
}

# make_venv PYTHON: an empty virtual environment, in place of what a broken-off set-up left.
make_venv() {
  local command=("$1" -m venv "$venv")
  if [[ -n $(find "$venv" -mindepth 1 -maxdepth 1 ! -path "$mark" | head -n 1) ]]; then
    say "$venv is half-made, or no longer works: making it anew"
    find "$venv" -mindepth 1 -maxdepth 1 ! -path "$mark" -exec rm -rf {} +
  fi
  say "making a virtual environment in $venv from $1"
  check_disk_space "$needed_gb"
  if [[ $mode == system ]]; then
    command+=(--system-site-packages --without-pip)
  elif ! "$1" -c 'import ensurepip, venv' 2>/dev/null; then # Debian has them in python3-venv
    "$1" -m pip install --quiet --target "$venv/virtualenv" virtualenv &&
      command=(env PYTHONPATH="$venv/virtualenv" "$1" -m virtualenv --quiet "$venv")
  fi
  "${command[@]}" </dev/null || die 1 "$1 could not make a virtual environment in $venv, see above"
}

install_requirements() {
  rm -f "$stamp"
  # pip's downloads go where the free space was checked: /tmp may be small.
  export TMPDIR=$venv/tmp
  mkdir -p "$TMPDIR"
  if [[ $mode == system ]]; then
    project "$python" install
  else
    say "installing with pip: about 3 GB to download the first time, 6 GB on disk, several minutes"
    project "$python" requirements >"$TMPDIR/requirements.txt" &&
      "$python" -m pip install --disable-pip-version-check --no-input \
        --constraint "$repo/constraints.txt" --requirement "$TMPDIR/requirements.txt"
  fi || die 1 "pip failed, see above; the next set-up goes on with what it has downloaded"
  rm -rf "$TMPDIR" "$venv/virtualenv"
  project "$python" stamp "$mode" >"$stamp.new"
  mv "$stamp.new" "$stamp"
}

main
