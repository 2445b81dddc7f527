#!/usr/bin/env python3
"""Tells what a training run will do, before it is submitted and without a GPU."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_prores.errors import run_program
from megatron_prores.plan.main import main

if __name__ == "__main__":
    run_program(main)
