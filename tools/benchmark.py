#!/usr/bin/env python3
"""Measures ProRes against stock Megatron: step time, tokens/s, MFU and peak memory."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_prores.errors import run_program
from studies.benchmark.main import main

if __name__ == "__main__":
    run_program(main)
