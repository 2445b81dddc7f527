"""The layer spec of a ProRes model: Megatron's own for the same flags, with our layer in it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

from megatron.core.models.backends import LocalSpecProvider
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training.models.gpt import GPTModelConfig, default_layer_spec

from megatron_prores.model.attention import FUSED_BACKENDS, FusedDotProductAttention
from megatron_prores.model.norm import sequence_parallel_norm
from megatron_prores.model.with_prores import with_prores

type Spec = ModuleSpec | TransformerBlockSubmodules


def prores_layer_spec(
    config: GPTModelConfig,
    vp_stage: int | None = None,
    norm_placement: str = "pre",
    document_masks: bool = False,
) -> Spec:
    """Return the spec of one model chunk, for ``GPTModelConfig.transformer_layer_spec``.

    It is whatever Megatron would take for the same flags, with ProRes. Where sequence parallelism
    meets torch's norms they are exchanged for ones that can do it, and the local attention for the
    fused one where ``--attention-backend`` says so.

    Args:
        config: The model's configuration.
        vp_stage: The chunk's virtual pipeline stage, None without virtual stages.
        norm_placement: One of ``placement.PLACEMENTS``.
        document_masks: Whether attention masks keep documents apart (``--reset-attention-mask``).

    Returns:
        A layer spec, or a block spec where the layers of the chunk differ.

    Raises:
        ArgumentError: The spec has a layer or a branch that ProRes has no counterpart of.
    """
    spec = default_layer_spec(config, vp_stage)
    transformer = config.transformer
    if needs_sequence_parallel_norms(transformer):
        # Upstream picks the final norm by what is installed; only a block spec can name it.
        if isinstance(spec, ModuleSpec):
            layers = [spec] * get_num_layers_to_build(transformer, vp_stage)
            spec = TransformerBlockSubmodules(layer_specs=layers)
        spec = dataclasses.replace(spec, layer_norm=sequence_parallel_norm)
    return with_prores(with_local_parts(spec, transformer, document_masks), norm_placement)


def with_local_parts[S: Spec](spec: S, config: TransformerConfig, document_masks: bool) -> S:
    """Exchange parts of the local spec for ours, where the configuration needs them.

    Args:
        spec: Of a layer or a block.
        config: Of the model.
        document_masks: Whether attention masks keep documents apart.
    """
    if needs_sequence_parallel_norms(config):
        spec = _for_each_layer(spec, _with_sequence_parallel_norms)
    if config.attention_backend in FUSED_BACKENDS:
        spec = _for_each_layer(spec, partial(_with_fused_attention, document_masks))
    return spec


def needs_sequence_parallel_norms(config: TransformerConfig) -> bool:
    """Return whether Megatron takes torch's norms, which refuse sequence parallelism, for it."""
    if not config.sequence_parallel or config.transformer_impl != "local":
        return False
    rms_norm = config.normalization == "RMSNorm"
    return LocalSpecProvider().layer_norm(rms_norm=rms_norm) is WrappedTorchNorm


def _for_each_layer[S: Spec](spec: S, change: Callable[[Any], dict[str, Any]]) -> S:
    """Exchange parts of every layer, of which ``change`` returns the new ones by name."""
    if isinstance(spec, TransformerBlockSubmodules):
        layers = [_for_each_layer(layer, change) for layer in spec.layer_specs]
        return dataclasses.replace(spec, layer_specs=layers)
    submodules = dataclasses.replace(spec.submodules, **change(spec.submodules))
    return dataclasses.replace(spec, submodules=submodules)


def _with_sequence_parallel_norms(layer: Any) -> dict[str, Any]:
    norms = ("input_layernorm", "pre_mlp_layernorm")
    return {
        name: sequence_parallel_norm for name in norms if getattr(layer, name) is WrappedTorchNorm
    }


def _with_fused_attention(document_masks: bool, layer: Any) -> dict[str, Any]:
    """Exchange the local core attention; Transformer Engine's, which is fused itself, stays."""
    submodules: Any = getattr(layer.self_attention, "submodules", None)
    if getattr(submodules, "core_attention", None) is not DotProductAttention:
        return {}
    attention = partial(FusedDotProductAttention, document_masks=document_masks)
    submodules = dataclasses.replace(submodules, core_attention=attention)
    return {"self_attention": dataclasses.replace(layer.self_attention, submodules=submodules)}
