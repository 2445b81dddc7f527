#!/usr/bin/env python3
"""Compares runs by their TensorBoard logs: a table, and a picture of their curves."""

import _clone  # noqa: F401

from megatron_prores.errors import run_program
from megatron_prores.runs.compare import main

if __name__ == "__main__":
    run_program(main)
