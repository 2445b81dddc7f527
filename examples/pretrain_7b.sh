#!/usr/bin/env bash
# The 7B model of the paper (arXiv 2603.05369): 6.74 billion parameters.
#
#   [VARIABLE=VALUE ...] bash examples/pretrain_7b.sh [--dry-run] [placement] [prores|plain] [schedule] [flags]
#
# examples/launcher.sh lists the words and the variables, docs/launch.md explains them.

set -euo pipefail

NAME=7b

LAYERS=${LAYERS:-32}
HIDDEN_SIZE=${HIDDEN_SIZE:-4096}
FFN_HIDDEN_SIZE=${FFN_HIDDEN_SIZE:-11008}
HEADS=${HEADS:-32}
LEARNING_RATE=${LEARNING_RATE:-3e-4}

# Four nodes of 8 GPUs of 80 GB, data parallel: 43 GB a GPU for weights, gradients and optimizer
# (51 GB on one node), 10 GB for activations. Tensor or pipeline ranks would only add communication;
# GPUs of 40 GB need TP=2 or PP=2.
MICRO_BATCH_SIZE=${MICRO_BATCH_SIZE:-2}

# shellcheck source=examples/launcher.sh
source "$(dirname "${BASH_SOURCE[0]}")/launcher.sh"
launch "$@"
