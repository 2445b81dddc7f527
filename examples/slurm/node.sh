#!/usr/bin/env bash
# One task of a job, the only one on its node: runs a command, and tells job.sh how it ended.
#
#   bash examples/slurm/node.sh COMMAND...

set -uo pipefail

trap : USR1 TERM # the run has got them as well; this waits for its end
"$@"
code=$?
# On a line of its own: the run may have been ended in the middle of one.
((code == 0)) ||
  printf '\nslurm: node %s (%s) ended with code %s\n' "${SLURM_NODEID:-0}" "${SLURMD_NODENAME:-$HOSTNAME}" "$code"
# srun ends all nodes with the first that fails. Where another has brought that about, it gets the time
# to say why; unless this one knows it (job.sh: final_codes), or is alone.
[[ $code =~ ^(0|2|16|17|75|130)$ || ${SLURM_NNODES:-1} == 1 ]] || sleep 10
# Saved on a signal is no failure: for one, srun would kill the nodes that are just ending.
((code != 75)) || code=0
exit "$code"
