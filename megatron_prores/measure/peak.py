"""The peak of GPUs by their names, which a throughput is compared with (MFU)."""

from __future__ import annotations

import re

# Dense bf16, without sparsity, from the vendor's data sheets, TFLOP/s. H100 and H200 are the SXM
# ones: the others have other clocks.
_PEAKS = (
    (r"\bB200\b", 2250.0),
    (r"\b(H100|H200|GH200)\b(?!.*\b(NVL|PCIe)\b)", 989.4),
    (r"\bA100\b", 312.0),
)


def peak_tflops(gpu: str, given: float | None = None, fp8: bool = False) -> float | None:
    """Return the dense peak of a GPU, TFLOP/s, or None where it is not known.

    Args:
        gpu: Its name, as torch has it.
        given: The user's figure for bf16.
        fp8: Whether matrices are multiplied in FP8, at twice the rate of bf16.
    """
    bf16 = given or next((peak for name, peak in _PEAKS if re.search(name, gpu)), None)
    return 2 * bf16 if bf16 and fp8 else bf16
