#!/usr/bin/env bash
# ClimbMix as in the paper's table 7: 50 billion tokens of it, and 10 million of what is held out.
#
#   [VARIABLE=VALUE ...] bash examples/data/climbmix.sh [--dry-run]
#
# NVIDIA publishes ClimbMix (nvidia/Nemotron-ClimbMix, CC BY-NC 4.0) as token ids of GPT-2, sorted by
# topic. This takes a copy in text, shuffled as a whole by others, so that its beginning is a sample;
# the last of its files is held out. Which copy and which part the paper took it does not say.
#
# examples/data/prepare.sh lists the variables.

set -euo pipefail

NAME=climbmix
CORPUS=${CORPUS:-karpathy/climbmix-400b-shuffle}
train=(--dataset-files "shard_0[0-5]*.parquet")
valid=(--dataset-files shard_06542.parquet)

# shellcheck source=examples/data/prepare.sh
source "$(dirname "${BASH_SOURCE[0]}")/prepare.sh"
prepare "$@"
