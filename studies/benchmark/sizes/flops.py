"""Floating-point operations of a training step, and the peaks of GPUs: what MFU is made of.

MFU is the share of the GPU's peak that the operations of the *model* take: those of the matrix
products of forward and backward, whatever the program computes beside them or twice.
"""

from __future__ import annotations

import re

from studies.benchmark.model import Size

FORMULA = (
    "MFU = FLOPs of the model per token x tokens/s / peak. FLOPs per token = 6 N + 6 L h s: "
    "N the weights of all matrix products, the output head among them, the embedding not "
    "(N = L (4 h^2 + 3 h f) + h V), 2 FLOPs for each in forward and 4 in backward; 6 L h s for "
    "attention, whose causal half alone is counted. It is Megatron's own formula "
    "(num_floating_point_operations), which is what is evaluated."
)
"""In words, for the report. L layers, h hidden size, f ffn, V vocabulary, s sequence length."""


def flops_per_token(size: Size, vocabulary: int) -> float:
    """Count the operations of training on one token: 6 N + 6 L h s.

    Args:
        size: The model.
        vocabulary: V, padded as Megatron pads it.

    Source:
        ``num_floating_point_operations`` of megatron.training, for a dense causal model whose
        query, key and value are as wide as the model.
    """
    hidden, layers = size.hidden_size, size.num_layers
    weights = layers * (4 * hidden**2 + 3 * hidden * size.ffn_hidden_size) + hidden * vocabulary
    return 6.0 * weights + 6.0 * layers * hidden * size.seq_length


_PEAKS: tuple[tuple[str, float, float | None], ...] = (
    # Dense, without sparsity, from the vendor's data sheets: bf16 and FP8, TFLOP/s.
    (r"\bB200\b", 2250.0, 4500.0),
    (r"\bH(100|200)\b.*\b(NVL|PCIe)\b", 0.0, None),  # another clock, other figures: not listed
    (r"\b(H100|H200|GH200)\b", 989.4, 1978.9),
    (r"\bA100\b", 312.0, None),
)


def peak_tflops(gpu: str, precision: str, given: float | None = None) -> float | None:
    """Return the dense peak of a GPU, TFLOP/s, or None where it is not known.

    Args:
        gpu: Its name, as torch has it.
        precision: "bf16" or "fp8".
        given: The user's figure for bf16; FP8 is taken for twice as fast.
    """
    if given is not None:
        return given * (2.0 if precision == "fp8" else 1.0)
    for pattern, bf16, fp8 in _PEAKS:
        if re.search(pattern, gpu):
            return (fp8 if precision == "fp8" else bf16) or None
    return None
