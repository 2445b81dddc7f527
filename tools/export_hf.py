#!/usr/bin/env python3
"""Export a checkpoint to Hugging Face's format, with alpha in its weights."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_prores.convert.export import main
from megatron_prores.errors import run_program

if __name__ == "__main__":
    run_program(main)
