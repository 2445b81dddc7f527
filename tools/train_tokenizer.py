#!/usr/bin/env python3
"""Trains a SentencePiece or byte-level tokenizer from JSONL."""

import _clone  # noqa: F401

from megatron_prores.data.tokenizer import main
from megatron_prores.errors import run_program

if __name__ == "__main__":
    run_program(main)
