#!/usr/bin/env bash
# The 1B model of the paper (arXiv 2603.05369): 1.36 billion parameters.
#
#   [VARIABLE=VALUE ...] bash examples/pretrain_1b.sh [--dry-run] [placement] [prores|plain] [schedule] [flags]
#
# examples/launcher.sh lists the words and the variables, docs/launch.md explains them.

set -euo pipefail

NAME=1b

LAYERS=${LAYERS:-24}
HIDDEN_SIZE=${HIDDEN_SIZE:-2048}
FFN_HIDDEN_SIZE=${FFN_HIDDEN_SIZE:-5632}
HEADS=${HEADS:-32}
LEARNING_RATE=${LEARNING_RATE:-6e-4}

# One node of 8 GPUs, data parallel: 10 GB a GPU for weights, gradients and optimizer, 15 GB for
# activations.
MICRO_BATCH_SIZE=${MICRO_BATCH_SIZE:-8}

# shellcheck source=examples/launcher.sh
source "$(dirname "${BASH_SOURCE[0]}")/launcher.sh"
launch "$@"
