#!/usr/bin/env bash
# The paper's ablation of schedules (arXiv 2603.05369, table 6): the 350M model, 60,000 iterations of 98
# sequences, with each schedule and length of warmup, and without ProRes.
#
#   bash examples/schedule_ablation.sh SCHEDULE [W] [--dry-run] [placement] [flags]
#   bash examples/schedule_ablation.sh plain [--dry-run] [placement] [flags]
#   bash examples/schedule_ablation.sh --job NUMBER ...  # a run of the table, as in a Slurm job array
#   bash examples/schedule_ablation.sh --list            # their numbers and words
#
# W is the whole warmup in iterations, else 24000. examples/launcher.sh lists the words and the
# variables, docs/launch.md explains them.

set -euo pipefail

# shellcheck source=examples/launcher.sh
source "$(dirname "${BASH_SOURCE[0]}")/launcher.sh"

choose_job ablation "$@"
is_one_of "${chosen[0]}" plain "${SCHEDULES[@]}" ||
  fail "${chosen[0]}: choose one of plain ${SCHEDULES[*]}, or --job and a number (--list shows them)"

NAME=ablation # in studies/paper/runs.toml
if [[ ${chosen[1]:-} =~ ^[1-9][0-9]*$ ]]; then
  NAME=ablation_${chosen[1]}
  unset 'chosen[1]'
fi

launch "${chosen[@]}"
