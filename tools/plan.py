#!/usr/bin/env python3
"""Tells what a training run will do, before it is submitted and without a GPU."""

import _clone  # noqa: F401

from megatron_prores.errors import run_program
from megatron_prores.plan.main import main

if __name__ == "__main__":
    run_program(main)
