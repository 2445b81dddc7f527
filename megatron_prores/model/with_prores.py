"""ProRes in a layer spec of Megatron's: its layers exchanged, its norms placed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import Any

from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.ssm.mamba_layer import MambaLayerSubmodules
from megatron.core.tensor_parallel.inference_layers import InferenceRowParallelLinear
from megatron.core.transformer.heterogeneous.linear_replacements import (
    ColumnParallelLinearGathered,
)
from megatron.core.transformer.identity_op import IdentityFuncOp, IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec, get_module
from megatron.core.transformer.torch_norm import LayerNormBuilder
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules

from megatron_prores.config.placement import placement_of
from megatron_prores.errors import Argument, ArgumentError
from megatron_prores.model.hybrid_stack import ProResHybridStack
from megatron_prores.model.layer import (
    PRORES_LAYERS,
    Branch,
    ProResLayerSubmodules,
    ProResMambaLayerSubmodules,
)
from megatron_prores.schedule.depth import Depths, main_layers, pattern_depths

INPUT_NORM_SLOTS = ("linear_qkv", "in_proj", "linear_qkv_down_proj", "linear_fc1")
"""The parts of a branch that Transformer Engine's spec may fuse the norm before the branch into: of
attention, gated delta net and Mamba, latent attention with one down projection, and MLP."""

# Each tensor-parallel rank holds the whole of it.
_DUPLICATED = ("linear_qkv_down_proj",)

# A norm that is fused into these normalizes the latents of latent attention: it is a part of F.
_INNER_NORM_SLOTS = ("linear_q_up_proj", "linear_kv_up_proj")

_LAYERS_OF_SYMBOLS = {
    "M": "mamba_layer",
    "G": "gdn_layer",
    "*": "attention_layer",
    "D": "dsa_layer",
    "+": "mla_layer",
    "-": "mlp_layer",
    "E": "moe_layer",
}
"""A kind of layer in a hybrid pattern -> its place among the parts of a HybridStack."""


def with_prores[Spec: (ModuleSpec, TransformerBlockSubmodules)](
    spec: Spec, norm_placement: str = "pre", hybrid_layer_pattern: str | None = None
) -> Spec:
    """Return a copy of a spec whose layers have the residual hook and their norms placed.

    Without a warmup that drives them (:class:`ResidualWarmup`) the layers run with alpha = 1.
    Prediction layers (MTP) are no part of the warmup: Megatron's function for those takes the spec
    as it was.

    Args:
        spec: Of a layer, of a block, or the parts of a block, as Megatron's functions return it:
            local or Transformer Engine; dense, MoE, MLA or heterogeneous. Or of a hybrid model's
            stack. It is not changed.
        norm_placement: Where the norms of a layer sit, one of ``placement.PLACEMENTS``. Added norms
            are of the class that the spec's own norms have. ``lns`` and ``deepnorm`` ask for
            initial weights of their own as well: see :func:`initialize_weights`.
        hybrid_layer_pattern: That of a hybrid model, which says how deep each of its layers is.

    Raises:
        ArgumentError: The placement is unknown, or the spec has a layer, a branch or a norm that
            ProRes has no counterpart of.
    """
    placement_of(norm_placement)
    if isinstance(spec, TransformerBlockSubmodules):
        layers = [_prores_layer(layer, norm_placement) for layer in spec.layer_specs]
        return dataclasses.replace(spec, layer_specs=layers)
    if not isinstance(spec, ModuleSpec):
        raise ArgumentError(
            Argument("spec"),
            ": must be a ModuleSpec or TransformerBlockSubmodules of Megatron's, not "
            f"{type(spec).__name__}",
        )
    if _is_kind_of(get_module(spec), TransformerBlock):
        return dataclasses.replace(spec, submodules=with_prores(spec.submodules, norm_placement))
    if _is_kind_of(get_module(spec), HybridStack):
        return _prores_stack(spec, norm_placement, hybrid_layer_pattern)
    return _prores_layer(spec, norm_placement)


def _prores_stack(stack: ModuleSpec, norm_placement: str, pattern: str | None) -> ModuleSpec:
    """Exchange the layers of a hybrid model's stack that its pattern names."""
    if pattern is None:
        raise ArgumentError(
            Argument("hybrid_layer_pattern"),
            ": give the pattern of this hybrid model, which says how deep each layer is",
        )
    depths = pattern_depths(pattern)
    stock: HybridStackSubmodules = stack.submodules
    slots = {_LAYERS_OF_SYMBOLS[symbol] for symbol in main_layers(pattern)}
    layers = {slot: _prores_layer(getattr(stock, slot), norm_placement, depths) for slot in slots}
    return dataclasses.replace(
        stack,
        module=ProResHybridStack,
        params={**stack.params, "layers": dataclasses.replace(stock, **layers)},
    )


def _prores_layer(
    layer: ModuleSpec, norm_placement: str, depths: Depths | None = None
) -> ModuleSpec:
    """Exchange a stock layer for ours, with its norms in place."""
    module = get_module(layer)
    if module not in PRORES_LAYERS:
        raise ArgumentError(
            Argument("spec"),
            f": ProRes has no residual hook for the layer class {module.__name__}, but for "
            f"{', '.join(stock.__name__ for stock in PRORES_LAYERS)}",
        )
    stock = layer.submodules
    branches = PRORES_LAYERS[module].branches
    for name in (branch.module for branch in branches):
        places = _find_module(getattr(stock, name), InferenceRowParallelLinear, name)
        if place := next(places, None):
            raise ArgumentError(
                Argument("spec"),
                f": the inference kernels of {place} add the residual themselves, without alpha",
            )
    placement = placement_of(norm_placement)
    backend = TESpecProvider()
    parts = {field.name: getattr(stock, field.name) for field in dataclasses.fields(stock)}
    if not placement.norm_input:
        for name, input_norm, *_ in branches:
            parts[input_norm] = IdentityOp
            parts[name] = _without_input_norm(parts[name], name, backend, norm_placement)
    if not placement.is_stock:
        # A branch that a layer does not have has nothing to norm.
        for branch in branches:
            if parts[branch.bda] is not IdentityFuncOp:
                parts[branch.output_norm] = _norm_of(stock, branches, backend)
    is_mamba = isinstance(stock, MambaLayerSubmodules)
    ours = ProResMambaLayerSubmodules if is_mamba else ProResLayerSubmodules
    depth = {} if depths is None else {"depths": depths}
    return dataclasses.replace(
        layer,
        module=PRORES_LAYERS[module],
        submodules=ours(**parts),
        params={**layer.params, "norm_placement": norm_placement, **depth},
    )


def _norm_of(
    stock: Any, branches: tuple[Branch, ...], backend: BackendSpecProvider
) -> LayerNormBuilder:
    """Return the class of the norms before the branches of a stock layer.

    Args:
        stock: The layer's submodules.
        branches: Its branches.
        backend: Transformer Engine's.
    """
    norms = [getattr(stock, branch.input_norm) for branch in branches]
    norm = next((each for each in norms if each is not IdentityOp), None)
    fused = backend.column_parallel_layer_norm_linear()
    is_fused = any(
        True
        for name in (branch.module for branch in branches)
        for _ in _find_module(getattr(stock, name), fused, name)
    )
    # Upstream's adapter of the norm, where it may fuse the residual addition into it: ours stands
    # where nothing is left to add.
    if norm is backend.layer_norm(has_residual=True) or (norm is None and is_fused):
        return backend.layer_norm()
    if norm is None:
        raise ArgumentError(Argument("spec"), ": a layer without any norm, to add norms like it")
    return norm


def _without_input_norm(
    branch: Any, name: str, backend: BackendSpecProvider, norm_placement: str
) -> Any:
    """Return a branch that is F(x) instead of F(N(x)).

    Raises:
        ArgumentError: A norm is fused into a module that has no counterpart without it.
    """
    branch = _unfused(branch, backend)
    fused = backend.column_parallel_layer_norm_linear()
    if left := next(_find_module(branch, fused, name), None):
        raise ArgumentError(
            Argument("norm_placement", norm_placement),
            f": has no norm before a branch, and the layer has a module with one fused into it "
            f"({left}) that ProRes knows no counterpart of: use another ",
            Argument("norm_placement"),
        )
    return branch


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


def _find_module(spec: Any, kind: object, place: str) -> Iterator[str]:
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


def _is_kind_of(module: object, kind: object) -> bool:
    # Where Transformer Engine is not installed, Megatron's names for its classes are no classes.
    return isinstance(module, type) and isinstance(kind, type) and issubclass(module, kind)
