#!/usr/bin/env python3
"""Draws a run's losses and the warm-up of its layers from its TensorBoard logs."""

import _clone  # noqa: F401

from megatron_prores.errors import run_program
from megatron_prores.runs.plot import main

if __name__ == "__main__":
    run_program(main)
