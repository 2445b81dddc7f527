"""Single layers for tests of the residual hook, built from the real spec in a rank process."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state, tensor_parallel
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training.models.gpt import GPTModelConfig, default_layer_spec

from megatron_prores.model.specs import prores_layer_spec

SEQUENCE, BATCH, HIDDEN = 16, 2, 32


def initialize() -> None:
    """Makes the process groups of a single rank, once however many checks ask for them."""
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
        parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1234, force_reset_rng=True)


def transformer_config(**more: Any) -> TransformerConfig:
    """Describes small Llama-like layers of the local implementation; ``more`` counts over it."""
    return TransformerConfig(
        **{
            "num_layers": 4,
            "hidden_size": HIDDEN,
            "ffn_hidden_size": 64,
            "num_attention_heads": 4,
            "add_bias_linear": False,
            "normalization": "RMSNorm",
            "gated_linear_unit": True,
            "activation_func": F.silu,
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
            "transformer_impl": "local",
            **more,
        }
    )


def build_layer(
    prores: bool,
    layer_number: int = 2,
    dtype: torch.dtype = torch.float32,
    dropout: float = 0.0,
    experts: int | None = None,
    norm_placement: str = "pre",
    **config: object,
) -> torch.nn.Module:
    """Builds one layer of a 4-layer model, its weights from the same seed every time."""
    transformer = transformer_config(
        hidden_dropout=dropout,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        num_moe_experts=experts,
        moe_ffn_hidden_size=32 if experts else None,
        **config,
    )
    model = GPTModelConfig(transformer=transformer, vocab_size=128)
    if prores:
        spec = prores_layer_spec(model, norm_placement=norm_placement)
    else:
        spec = default_layer_spec(model, None)
    if isinstance(spec, TransformerBlockSubmodules):
        spec = spec.layer_specs[0]
    tensor_parallel.random._CUDA_RNG_STATE_TRACKER.reset()
    tensor_parallel.model_parallel_cuda_manual_seed(1234, force_reset_rng=True)
    torch.manual_seed(1234)
    layer = build_module(spec, config=transformer, layer_number=layer_number)
    return layer.to(dtype)


def hidden_states(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Gives a residual stream [s, b, h]."""
    generator = torch.Generator().manual_seed(5)
    values = torch.randn(SEQUENCE, BATCH, HIDDEN, generator=generator)
    return values.to(dtype).requires_grad_()


def causal_mask() -> torch.Tensor:
    """True where a position must not look."""
    return torch.ones(1, 1, SEQUENCE, SEQUENCE, dtype=torch.bool).triu(1)


def run(layer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Runs the layer with causal attention."""
    torch.manual_seed(7)
    tensor_parallel.model_parallel_cuda_manual_seed(7, force_reset_rng=True)
    output, _ = layer(x, attention_mask=causal_mask())
    return output


def grow(layer: torch.nn.Module) -> None:
    """Gives branches the size of a trained model's, so that no comparison drowns in the stream."""
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if "norm" not in name:
                parameter.mul_(20.0)
