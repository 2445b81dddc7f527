#!/usr/bin/env python3
"""Builds a JSONL corpus from the sources of this Python's standard library."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_prores.data.corpus import main
from megatron_prores.errors import run_program

if __name__ == "__main__":
    run_program(main)
