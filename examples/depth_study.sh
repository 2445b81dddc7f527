#!/usr/bin/env bash
# The paper's depth study (arXiv 2603.05369): the 71M model's width, 12 to 120 layers (71 to 411
# million parameters), with and without ProRes.
#
#   bash examples/depth_study.sh LAYERS [--dry-run] [placement] [prores|plain] [schedule] [flags]
#   bash examples/depth_study.sh NUMBER ...     # job 0 to 11 of the study, as in a Slurm job array
#   bash examples/depth_study.sh --list         # the jobs
#
# examples/launcher.sh lists the words and the variables, docs/launch.md explains them.

set -euo pipefail

# shellcheck source=examples/launcher.sh
source "$(dirname "${BASH_SOURCE[0]}")/launcher.sh"

JOBS=()
for layers in 12 24 48 72 96 120; do JOBS+=("$layers prores" "$layers plain"); done
choose_job "$@"
depth=${chosen[0]}
is_one_of "$depth" 12 24 48 72 96 120 ||
  fail "$depth: choose one of 12 24 48 72 96 120 layers, or a job from 0 to 11 (--list shows them)"

NAME=depth_$depth

LAYERS=${LAYERS:-$depth}
HIDDEN_SIZE=${HIDDEN_SIZE:-512}
FFN_HIDDEN_SIZE=${FFN_HIDDEN_SIZE:-1368}
HEADS=${HEADS:-8}
LEARNING_RATE=${LEARNING_RATE:-2e-3}
# A warmup of 1000 iterations a layer would be longer than the training of the deepest.
WARMUP_ITERS_PER_LAYER=${WARMUP_ITERS_PER_LAYER:-$((depth < 96 ? 1000 : 500))}

# One node of 8 GPUs, data parallel: 22 GB a GPU with 120 layers.
MICRO_BATCH_SIZE=${MICRO_BATCH_SIZE:-$((depth < 72 ? 16 : 8))}

launch "${chosen[@]:1}"
