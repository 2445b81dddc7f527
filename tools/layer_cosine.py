#!/usr/bin/env python3
"""Print how far each layer still turned between two checkpoints of a run."""

import _clone  # noqa: F401

from megatron_prores.errors import run_program
from megatron_prores.evaluation.layer_cosine import main

if __name__ == "__main__":
    run_program(main)
