#!/usr/bin/env bash
# Installs what tests/examples/test_slurm.py runs its own little cluster with, from Debian's packages.
# Nothing is started. Where it cannot be installed it says so and goes on: those tests are skipped.
#
#   bash tests/install_cluster_tools.sh

set -euo pipefail

commands=(slurmctld slurmd sbatch srun munged ip)
packages=(slurmctld slurmd slurm-client munge iproute2)
PATH=$PATH:/usr/sbin:/sbin

missing=()
for each in "${commands[@]}"; do command -v "$each" >/dev/null || missing+=("$each"); done
((${#missing[@]})) || exit 0

without() {
  echo "[cluster tools] not installed (missing: ${missing[*]}): $*; the Slurm tests will be skipped" >&2
  exit 0
}

command -v apt-get >/dev/null || without "no apt-get on this machine"
[[ $(id -u) == 0 ]] || without "that takes root"
log=$(mktemp)
trap 'rm -f "$log"' EXIT
# The packages start daemons of their own where nothing forbids it; a test brings up its own.
export DEBIAN_FRONTEND=noninteractive RUNLEVEL=1
if ! { apt-get update && apt-get install -y --no-install-recommends "${packages[@]}"; } >"$log" 2>&1; then
  tail -n 3 "$log" >&2
  without "apt-get failed, see above"
fi
echo "[cluster tools] installed: ${packages[*]}" >&2
