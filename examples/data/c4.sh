#!/usr/bin/env bash
# C4-en as in the paper's main runs: 50 billion tokens of it, and 10 million of its held-out split.
#
#   [VARIABLE=VALUE ...] bash examples/data/c4.sh [--dry-run]
#
# examples/data/prepare.sh lists the variables.

set -euo pipefail

NAME=c4
CORPUS=${CORPUS:-allenai/c4}
train=(--dataset-name en --dataset-split train)
valid=(--dataset-name en --dataset-split validation)

# shellcheck source=examples/data/prepare.sh
source "$(dirname "${BASH_SOURCE[0]}")/prepare.sh"
prepare "$@"
