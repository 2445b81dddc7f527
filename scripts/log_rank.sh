#!/usr/bin/env bash
# What a rank is started through: its standard output and standard error go to a log of its own.
#
#   log_rank.sh DIRECTORY COMMAND...      # DIRECTORY/rank<RANK>.log; RANK and WORLD_SIZE as torchrun sets them
#
# The first and the last rank are shown as well: Megatron prints what concerns all on the first, and
# losses on the last. The process becomes the command: signals and exit code are the command's.

set -euo pipefail

log=$1/rank$RANK.log
shift
mkdir -p "$(dirname "$log")"
if ((RANK == 0 || RANK == WORLD_SIZE - 1)); then
  # A signal to all processes of the rank is for the rank, which has more to say then.
  exec "$@" > >(
    trap '' HUP INT QUIT TERM USR1
    exec tee -a "$log"
  ) 2>&1
fi
exec "$@" >>"$log" 2>&1
