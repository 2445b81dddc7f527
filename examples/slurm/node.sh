#!/usr/bin/env bash
# One task of a job, the only one on its node: runs a command, and tells job.sh how it ended.
#
#   bash examples/slurm/node.sh COMMAND...

set -uo pipefail

trap : USR1 TERM # the run has got them as well; this waits for its end
"$@"
code=$?
((code == 0)) || echo "slurm: node ${SLURM_NODEID:-0} (${SLURMD_NODENAME:-$HOSTNAME}) ended with code $code"
# Saved on a signal is no failure: for one, srun would kill the nodes that are just ending.
((code != 75)) || code=0
exit "$code"
