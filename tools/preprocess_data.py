#!/usr/bin/env python3
"""Turns JSON lines into Megatron's indexed dataset."""

import _clone  # noqa: F401

from megatron_prores.data.preprocess import main
from megatron_prores.errors import run_program

if __name__ == "__main__":
    run_program(main)
