#!/usr/bin/env python3
"""Import a model in Hugging Face's format as a Megatron checkpoint."""

import _clone  # noqa: F401

from megatron_prores.convert.from_hugging_face import main
from megatron_prores.errors import run_program

if __name__ == "__main__":
    run_program(main)
