#!/usr/bin/env bash
# The paper's schedule ablation (arXiv 2603.05369): the 130M model with each of the twelve schedules.
#
#   bash examples/schedule_ablation.sh SCHEDULE [--dry-run] [placement] [flags]
#   bash examples/schedule_ablation.sh NUMBER ...   # job 0 to 11 of the study, as in a Slurm job array
#   bash examples/schedule_ablation.sh --list       # the jobs
#
# The run to compare them with is "examples/pretrain_130m.sh plain". examples/launcher.sh lists the
# variables, docs/launch.md explains them.

set -euo pipefail

# shellcheck source=examples/launcher.sh
source "$(dirname "${BASH_SOURCE[0]}")/launcher.sh"

JOBS=("${SCHEDULES[@]}")
choose_job "$@"
is_one_of "${chosen[0]}" "${SCHEDULES[@]}" ||
  fail "${chosen[0]}: choose one of ${SCHEDULES[*]}, or a job from 0 to 11 (--list shows them)"

NAME=schedule

LAYERS=${LAYERS:-12}
HIDDEN_SIZE=${HIDDEN_SIZE:-768}
FFN_HIDDEN_SIZE=${FFN_HIDDEN_SIZE:-2048}
HEADS=${HEADS:-12}
LEARNING_RATE=${LEARNING_RATE:-2e-3}

# One node of 8 GPUs, data parallel: 14 GB a GPU.
MICRO_BATCH_SIZE=${MICRO_BATCH_SIZE:-32}

launch "${chosen[@]}"
