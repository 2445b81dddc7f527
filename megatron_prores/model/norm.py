"""A norm for the local spec that works under sequence parallelism."""

from __future__ import annotations

from collections.abc import Callable

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

_NORMS: dict[str, Callable[..., torch.nn.Module]] = {
    "LayerNorm": torch.nn.LayerNorm,
    "RMSNorm": torch.nn.RMSNorm,
}


def sequence_parallel_norm(
    config: TransformerConfig, hidden_size: int, eps: float = 1e-5
) -> torch.nn.Module:
    """Build torch's LayerNorm or RMSNorm with its parameters marked as sequence parallel.

    Under sequence parallelism each tensor-parallel rank norms its own part of the sequence
    [s / tp, b, h], so the gradients of the norm's weights are partial sums. Megatron adds them up
    over the ranks for every parameter that carries the mark (``finalize_model_grads``). Its own
    wrapper of the torch norms refuses sequence parallelism instead of setting it.

    Args:
        config: The model's configuration; its ``normalization`` names the norm.
        hidden_size: h, the width of the last dimension.
        eps: Added to the variance or mean square.

    Returns:
        The torch module, [s, b, h] -> [s, b, h].

    Raises:
        ValueError: The normalization has no torch module, or asks for a zero-centered weight.
    """
    if config.normalization not in _NORMS or config.layernorm_zero_centered_gamma:
        raise ValueError(
            f"no local norm for normalization={config.normalization!r}, "
            f"layernorm_zero_centered_gamma={config.layernorm_zero_centered_gamma}"
        )
    norm = _NORMS[config.normalization](hidden_size, eps=eps)
    for parameter in norm.parameters():
        parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    return norm
