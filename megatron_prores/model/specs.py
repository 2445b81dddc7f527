"""The layer spec of a ProRes model: Megatron's own for the same flags, with our layer in it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import Any

from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider
from megatron.core.models.backends import BackendSpecProvider, LocalSpecProvider
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.heterogeneous.linear_replacements import (
    ColumnParallelLinearGathered,
)
from megatron.core.transformer.identity_op import IdentityFuncOp, IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import LayerNormBuilder, WrappedTorchNorm
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training.models.gpt import GPTModelConfig, default_layer_spec

from megatron_prores.errors import UserError
from megatron_prores.model.attention import FUSED_BACKENDS, FusedDotProductAttention
from megatron_prores.model.layer import PRORES_LAYERS, ProResLayerSubmodules
from megatron_prores.model.norm import sequence_parallel_norm
from megatron_prores.placement import PLACEMENTS

type Spec = ModuleSpec | TransformerBlockSubmodules

INPUT_NORM_SLOTS = ("linear_qkv", "in_proj", "linear_qkv_down_proj", "linear_fc1")
"""The parts of a branch that Transformer Engine's spec may fuse the norm before the branch into: of
attention, gated delta net, latent attention with one down projection, and MLP."""

# Each tensor-parallel rank holds the whole of it.
_DUPLICATED = ("linear_qkv_down_proj",)

# A norm that is fused into these normalizes the latents of latent attention: it is a part of F.
_INNER_NORM_SLOTS = ("linear_q_up_proj", "linear_kv_up_proj")


def prores_layer_spec(
    config: GPTModelConfig, vp_stage: int | None = None, norm_placement: str = "pre"
) -> Spec:
    """Return the spec of one model chunk, for ``GPTModelConfig.transformer_layer_spec``.

    It is whatever Megatron would take for the same flags (local or Transformer Engine, dense, MoE,
    MLA, heterogeneous), each of its layers exchanged for the one with the residual hook, its norms
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
    """Exchange a stock layer for ours, with its norms in place and, if asked, attention fused."""
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
        # A branch that a heterogeneous model leaves out has nothing to norm.
        if stock.self_attn_bda is not IdentityFuncOp:
            parts["post_self_attn_layernorm"] = norm
        if stock.mlp_bda is not IdentityFuncOp:
            parts["post_mlp_layernorm"] = norm
    return dataclasses.replace(
        layer,
        module=PRORES_LAYERS[layer.module],
        submodules=ProResLayerSubmodules(**parts),
        params={**layer.params, "norm_placement": norm_placement},
    )


def _with_fused_attention(attention: ModuleSpec) -> ModuleSpec:
    """Exchange the local core attention; Transformer Engine's, which is fused itself, stays."""
    submodules: Any = getattr(attention, "submodules", None)
    if getattr(submodules, "core_attention", None) is not DotProductAttention:
        return attention
    submodules = dataclasses.replace(submodules, core_attention=FusedDotProductAttention)
    return dataclasses.replace(attention, submodules=submodules)


def _without_input_norms(
    attention: ModuleSpec, mlp: object, backend: BackendSpecProvider
) -> dict[str, object]:
    """Return the parts of a layer whose branches are F(x) instead of F(N(x)).

    Raises:
        UserError: A norm is fused into a module that has no counterpart without it.
    """
    parts: dict[str, object] = {"input_layernorm": IdentityOp, "pre_mlp_layernorm": IdentityOp}
    if not backend.fuse_layernorm_and_linear():
        return parts
    parts |= {"self_attention": _unfused(attention, backend), "mlp": _unfused(mlp, backend)}
    fused = backend.column_parallel_layer_norm_linear()
    for name in ("self_attention", "mlp"):
        if left := next(_find_module(parts[name], fused, name), None):
            raise UserError(
                "--norm-placement post and deepnorm have no norm before a branch, and these flags "
                f"select a module that has one fused into it ({left}): leave them out, or use "
                "another --norm-placement"
            )
    return parts


def _unfused(branch: Any, backend: BackendSpecProvider) -> Any:
    """Exchange the module of a branch that a norm is fused into for the one without the norm.

    Transformer Engine fuses the norm and the linear that follows it into one module; without the
    norm it is a plain linear of the same backend.
    """
    fused = backend.column_parallel_layer_norm_linear()
    if isinstance(branch, ModuleSpec):
        if _is_kind_of(branch.module, fused):  # the linear that replaces a heterogeneous attention
            return dataclasses.replace(branch, module=ColumnParallelLinearGathered)
        submodules = _unfused_submodules(branch.submodules, backend)
        return dataclasses.replace(branch, submodules=submodules)
    if isinstance(branch, partial):
        if _is_kind_of(branch.func, fused):  # ... or a heterogeneous MLP
            return partial(ColumnParallelLinearGathered, *branch.args, **branch.keywords)
        if "submodules" in branch.keywords:
            submodules = _unfused_submodules(branch.keywords["submodules"], backend)
            return partial(
                branch.func, *branch.args, **branch.keywords | {"submodules": submodules}
            )
    return branch


def _unfused_submodules(submodules: Any, backend: BackendSpecProvider) -> Any:
    fused = backend.column_parallel_layer_norm_linear()
    plain = {
        slot: backend.linear() if slot in _DUPLICATED else backend.column_parallel_linear()
        for slot in INPUT_NORM_SLOTS
        if _is_kind_of(getattr(submodules, slot, None), fused)
    }
    return dataclasses.replace(submodules, **plain) if plain else submodules


def _find_module(spec: Any, kind: type, place: str) -> Iterator[str]:
    """Yield the places within a branch's spec that name a kind of module."""
    if place.rpartition(".")[2] in _INNER_NORM_SLOTS:
        return
    if _is_kind_of(spec, kind):
        yield place
    elif isinstance(spec, ModuleSpec):
        yield from _find_module(spec.module, kind, place)
        yield from _find_module(spec.submodules, kind, place)
    elif isinstance(spec, partial):
        for value in (spec.func, *spec.args, *spec.keywords.values()):
            yield from _find_module(value, kind, place)
    elif dataclasses.is_dataclass(spec) and not isinstance(spec, type):
        for field in dataclasses.fields(spec):
            yield from _find_module(getattr(spec, field.name), kind, f"{place}.{field.name}")


def _is_kind_of(module: object, kind: type) -> bool:
    return isinstance(module, type) and issubclass(module, kind)
