"""Hides the packages of CUDA kernels that Megatron takes wherever it finds them."""

from __future__ import annotations

import sys

PACKAGES = ("transformer_engine", "apex", "flash_attn", "flash_attn_3")


def hide() -> None:
    """Make Megatron find none of them, as on a machine where none is installed.

    Megatron builds its final norm and its optimizer from what can be imported, whatever its flags
    say: in a container that has Transformer Engine a run on the CPU would end in a CUDA kernel.

    Must run before Megatron is imported.
    """
    for name in PACKAGES:
        # None makes ``import`` raise ImportError; one that is imported already stays.
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]
