#!/usr/bin/env python3
"""Score checkpoints with lm-evaluation-harness."""

import _clone  # noqa: F401

from megatron_prores.errors import run_program
from megatron_prores.evaluation.harness import main

if __name__ == "__main__":
    run_program(main)
