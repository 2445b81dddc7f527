#!/usr/bin/env bash
# The 350M model of the paper (arXiv 2603.05369): 368 million parameters.
#
#   [VARIABLE=VALUE ...] bash examples/pretrain_350m.sh [--dry-run] [placement] [prores|plain] [schedule] [flags]
#
# examples/launcher.sh lists the words and the variables, docs/launch.md explains them.

set -euo pipefail

NAME=350m

LAYERS=${LAYERS:-24}
HIDDEN_SIZE=${HIDDEN_SIZE:-1024}
FFN_HIDDEN_SIZE=${FFN_HIDDEN_SIZE:-2736}
HEADS=${HEADS:-16}
LEARNING_RATE=${LEARNING_RATE:-1e-3}

# One node of 8 GPUs, data parallel: 18 GB a GPU, nearly all of it activations.
MICRO_BATCH_SIZE=${MICRO_BATCH_SIZE:-16}

# shellcheck source=examples/launcher.sh
source "$(dirname "${BASH_SOURCE[0]}")/launcher.sh"
launch "$@"
