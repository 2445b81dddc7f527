#!/usr/bin/env bash
# The 130M model of the paper (arXiv 2603.05369): 134 million parameters.
#
#   [VARIABLE=VALUE ...] bash examples/pretrain_130m.sh [--dry-run] [placement] [prores|plain] [schedule] [flags]
#
# examples/launcher.sh lists the words and the variables, docs/launch.md explains them.

set -euo pipefail

NAME=130m

LAYERS=${LAYERS:-12}
HIDDEN_SIZE=${HIDDEN_SIZE:-768}
FFN_HIDDEN_SIZE=${FFN_HIDDEN_SIZE:-2048}
HEADS=${HEADS:-12}
LEARNING_RATE=${LEARNING_RATE:-2e-3}

# One node of 8 GPUs, data parallel: 14 GB a GPU, nearly all of it activations.
MICRO_BATCH_SIZE=${MICRO_BATCH_SIZE:-32}

# shellcheck source=examples/launcher.sh
source "$(dirname "${BASH_SOURCE[0]}")/launcher.sh"
launch "$@"
