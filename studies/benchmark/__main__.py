"""Run the benchmark: ``python -m studies.benchmark``, from the repository or with PYTHONPATH."""

import signal
import sys

from megatron_prores.errors import run_program
from studies.benchmark.main import main

if __name__ == "__main__":
    # As an exception, so that the case that is running ends as well.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    run_program(main)
