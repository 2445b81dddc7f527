#!/usr/bin/env python3
"""Let a checkpoint go on with a text."""

import _clone  # noqa: F401

from megatron_prores.errors import run_program
from megatron_prores.evaluation.text import main

if __name__ == "__main__":
    run_program(main)
