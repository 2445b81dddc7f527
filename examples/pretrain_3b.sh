#!/usr/bin/env bash
# The 3B model of the paper (arXiv 2603.05369): 2.69 billion parameters.
#
#   [VARIABLE=VALUE ...] bash examples/pretrain_3b.sh [--dry-run] [placement] [prores|plain] [schedule] [flags]
#
# examples/launcher.sh lists the words and the variables, docs/launch.md explains them.

set -euo pipefail

NAME=3b

LAYERS=${LAYERS:-32}
HIDDEN_SIZE=${HIDDEN_SIZE:-2560}
FFN_HIDDEN_SIZE=${FFN_HIDDEN_SIZE:-6848}
HEADS=${HEADS:-32}
LEARNING_RATE=${LEARNING_RATE:-6e-4}

# Two nodes of 8 GPUs, data parallel: 18 GB a GPU for weights, gradients and optimizer (20 GB on one
# node), 12 GB for activations.
MICRO_BATCH_SIZE=${MICRO_BATCH_SIZE:-4}

# shellcheck source=examples/launcher.sh
source "$(dirname "${BASH_SOURCE[0]}")/launcher.sh"
launch "$@"
