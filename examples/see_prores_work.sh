#!/usr/bin/env bash
# See ProRes work, in about five minutes on two CPU cores: a Post-LN model of 24 layers trained twice,
# plainly and with ProRes, one core each. It ends in one picture and a sentence with the losses.
#
#   bash examples/see_prores_work.sh [--output DIR]     # started again, it goes on or shows the result

set -euo pipefail

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PYTHON=$(bash "$repo/scripts/setup.sh")
export PYTHONPATH=$repo${PYTHONPATH:+:$PYTHONPATH} PYTHONWARNINGS=ignore
exec "$PYTHON" -m studies.paper see --scale minutes "$@"
