#!/usr/bin/env python3
"""Export a checkpoint to Hugging Face's format, with alpha in its weights."""

import _clone  # noqa: F401

from megatron_prores.convert.export import main
from megatron_prores.errors import run_program

if __name__ == "__main__":
    run_program(main)
