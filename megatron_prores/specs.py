"""The layer spec of a ProRes model: Megatron's own for the same flags, with our layer in it."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider
from megatron.core.models.backends import BackendSpecProvider, LocalSpecProvider
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import LayerNormBuilder, WrappedTorchNorm
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training.models.gpt import GPTModelConfig, default_layer_spec

from megatron_prores.attention import FUSED_BACKENDS, FusedDotProductAttention
from megatron_prores.errors import UserError
from megatron_prores.layer import PRORES_LAYERS, ProResLayerSubmodules
from megatron_prores.norm import sequence_parallel_norm
from megatron_prores.placement import PLACEMENTS

type Spec = ModuleSpec | TransformerBlockSubmodules


def prores_layer_spec(
    config: GPTModelConfig, vp_stage: int | None = None, norm_placement: str = "pre"
) -> Spec:
    """Gives the spec of one model chunk, for ``GPTModelConfig.transformer_layer_spec``.

    It is whatever Megatron would take for the same flags (local or Transformer Engine, dense, MoE,
    MLA), each of its layers exchanged for the one with the residual hook, its norms
    placed as asked, and the local attention exchanged for the fused one where
    ``--attention-backend`` says so.

    Args:
        config: The model's configuration.
        vp_stage: The chunk's virtual pipeline stage, None without virtual stages.
        norm_placement: One of ``placement.PLACEMENTS``.

    Returns:
        A layer spec, or a block spec where the layers of the chunk differ.

    Raises:
        UserError: The spec has a layer or a branch that ProRes has no counterpart of.
    """
    spec = default_layer_spec(config, vp_stage)
    transformer = config.transformer
    backend = _backend(transformer)
    norm = backend.layer_norm(rms_norm=transformer.normalization == "RMSNorm")
    if norm is WrappedTorchNorm and transformer.sequence_parallel:
        # Upstream picks the final norm by what is installed; only a block spec can name it.
        norm = sequence_parallel_norm
        if isinstance(spec, ModuleSpec):
            layers = [spec] * get_num_layers_to_build(transformer, vp_stage)
            spec = TransformerBlockSubmodules(layer_specs=layers)
        spec = dataclasses.replace(spec, layer_norm=norm)
    fuse = transformer.attention_backend in FUSED_BACKENDS
    change = partial(
        _prores_layer, norm_placement=norm_placement, norm=norm, backend=backend, fuse=fuse
    )
    if isinstance(spec, TransformerBlockSubmodules):
        return dataclasses.replace(spec, layer_specs=[change(layer) for layer in spec.layer_specs])
    return change(spec)


def _backend(config: TransformerConfig) -> BackendSpecProvider:
    if config.transformer_impl == "transformer_engine":
        return TESpecProvider()
    return LocalSpecProvider()


def _prores_layer(
    layer: ModuleSpec,
    norm_placement: str,
    norm: LayerNormBuilder,
    backend: BackendSpecProvider,
    fuse: bool,
) -> ModuleSpec:
    """Exchanges a stock layer for ours, with its norms in place and, if asked, attention fused."""
    if layer.module not in PRORES_LAYERS:
        raise UserError(
            f"ProRes has no residual hook for the layer class {layer.module.__name__}, which these "
            "flags select: leave them out, or use --prores-schedule none"
        )
    placement = PLACEMENTS[norm_placement]
    stock = layer.submodules
    parts = {field.name: getattr(stock, field.name) for field in dataclasses.fields(stock)}
    # The stock norm, or, under sequence parallelism, the one that stands in for it.
    for name in ("input_layernorm", "pre_mlp_layernorm"):
        if parts[name] is WrappedTorchNorm:
            parts[name] = norm
    if not placement.norm_input:
        parts |= _without_input_norms(stock.self_attention, stock.mlp, backend)
    if fuse:
        parts["self_attention"] = _with_fused_attention(parts["self_attention"])
    if not placement.is_stock:
        parts |= {"post_self_attn_layernorm": norm, "post_mlp_layernorm": norm}
    return dataclasses.replace(
        layer,
        module=PRORES_LAYERS[layer.module],
        submodules=ProResLayerSubmodules(**parts),
        params={**layer.params, "norm_placement": norm_placement},
    )


def _with_fused_attention(attention: ModuleSpec) -> ModuleSpec:
    """Exchanges the local core attention; Transformer Engine's, which is fused itself, stays."""
    submodules: Any = getattr(attention, "submodules", None)
    if getattr(submodules, "core_attention", None) is not DotProductAttention:
        return attention
    submodules = dataclasses.replace(submodules, core_attention=FusedDotProductAttention)
    return dataclasses.replace(attention, submodules=submodules)


def _without_input_norms(
    attention: ModuleSpec, mlp: object, backend: BackendSpecProvider
) -> dict[str, object]:
    """Gives the branches F(x) for F(N(x)): no norm before them, nor fused into their first linear.

    Transformer Engine fuses the norm and the linear that follows it into one module; without the
    norm it is the plain column-parallel linear of the same backend.
    """
    parts: dict[str, object] = {"input_layernorm": IdentityOp, "pre_mlp_layernorm": IdentityOp}
    if not backend.fuse_layernorm_and_linear():
        return parts
    fused, plain = backend.column_parallel_layer_norm_linear(), backend.column_parallel_linear()
    if getattr(attention.submodules, "linear_qkv", None) is fused:
        submodules = dataclasses.replace(attention.submodules, linear_qkv=plain)
        parts["self_attention"] = dataclasses.replace(attention, submodules=submodules)
    if isinstance(mlp, partial) and mlp.func == MLP.as_mlp_submodule:
        submodules = mlp.keywords["submodules"]
        if submodules.linear_fc1 is fused:
            submodules = dataclasses.replace(submodules, linear_fc1=plain)
        parts["mlp"] = partial(mlp.func, **{**mlp.keywords, "submodules": submodules})
    return parts
