#!/usr/bin/env python3
"""Joins, checks, counts and splits indexed datasets."""

import _clone  # noqa: F401

from megatron_prores.data.dataset_tool import main
from megatron_prores.errors import run_program

if __name__ == "__main__":
    run_program(main)
