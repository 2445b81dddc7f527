#!/usr/bin/env bash
# The paper's depth study (arXiv 2603.05369): the 71M model's width, 12 to 120 layers (71 to 411
# million parameters): pre-norm, five baselines, and ProRes with the schedules linear and equal.
#
#   bash examples/depth_study.sh LAYERS [--dry-run] [placement] [prores|plain] [schedule] [flags]
#   bash examples/depth_study.sh --job NUMBER ...  # a run of the study, as in a Slurm job array
#   bash examples/depth_study.sh --list            # their numbers and words
#
# examples/launcher.sh lists the words and the variables, docs/launch.md explains them.

set -euo pipefail

# shellcheck source=examples/launcher.sh
source "$(dirname "${BASH_SOURCE[0]}")/launcher.sh"

choose_job depth "$@"
NAME=depth_${chosen[0]} # in studies/paper/runs.toml

launch "${chosen[@]:1}"
