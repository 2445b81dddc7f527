#!/usr/bin/env python3
"""Brings a tokenizer from the Hugging Face Hub."""

import _clone  # noqa: F401

from megatron_prores.data.hub import main
from megatron_prores.errors import run_program

if __name__ == "__main__":
    run_program(main)
