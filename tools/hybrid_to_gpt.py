#!/usr/bin/env python3
"""Turn a hybrid model's checkpoint into one that a GPT model goes on from."""

import _clone  # noqa: F401

from megatron_prores.convert.hybrid_to_gpt import main
from megatron_prores.errors import run_program

if __name__ == "__main__":
    run_program(main)
