#!/usr/bin/env python3
"""Lists, verifies and compares checkpoints."""

import _clone  # noqa: F401

from megatron_prores.checkpoint.tool import main
from megatron_prores.errors import run_program

if __name__ == "__main__":
    run_program(main)
