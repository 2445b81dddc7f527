#!/usr/bin/env python3
"""Measures what FP8 recipes do to the gradients of the residual branches under ProRes."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_prores.errors import run_program
from studies.fp8.main import main

if __name__ == "__main__":
    run_program(main)
