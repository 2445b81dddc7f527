#!/usr/bin/env python3
"""Builds a JSONL corpus from the sources of this Python's standard library."""

import _clone  # noqa: F401

from megatron_prores.data.corpus import main
from megatron_prores.errors import run_program

if __name__ == "__main__":
    run_program(main)
