#!/usr/bin/env bash
# The 130M model of the paper (arXiv 2603.05369): 134 million parameters.
#
#   [VARIABLE=VALUE ...] bash examples/pretrain_130m.sh [--dry-run] [placement] [prores|plain] [schedule] [flags]
#
# examples/launcher.sh lists the words and the variables, docs/launch.md explains them.

set -euo pipefail

NAME=130m # in studies/paper/runs.toml

# shellcheck source=examples/launcher.sh
source "$(dirname "${BASH_SOURCE[0]}")/launcher.sh"
launch "$@"
