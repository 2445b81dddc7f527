#!/usr/bin/env bash
# The paper's comparison of norm placements and initial weights (arXiv 2603.05369, table 2): 130M, 350M
# and 1.3B, each plain and with ProRes.
#
#   bash examples/norm_placements.sh SIZE [--dry-run] [placement] [prores|plain] [schedule] [flags]
#   bash examples/norm_placements.sh --job NUMBER ...  # a run of the table, as in a Slurm job array
#   bash examples/norm_placements.sh --list            # their numbers and words
#
# SIZE is 130m, 350m or 1b. examples/launcher.sh lists the words and the variables, docs/launch.md
# explains them.

set -euo pipefail

# shellcheck source=examples/launcher.sh
source "$(dirname "${BASH_SOURCE[0]}")/launcher.sh"

choose_job c4 "$@"
NAME=${chosen[0]} # in studies/paper/runs.toml

launch "${chosen[@]:1}"
