"""The layer spec of a ProRes model: Megatron's own for the same flags, with our layer in it."""

from __future__ import annotations

import dataclasses

from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules
from megatron.training.models.gpt import GPTModelConfig, default_layer_spec

from megatron_prores.errors import UserError
from megatron_prores.layer import PRORES_LAYERS
from megatron_prores.norm import sequence_parallel_norm

type Spec = ModuleSpec | TransformerBlockSubmodules


def prores_layer_spec(config: GPTModelConfig, vp_stage: int | None = None) -> Spec:
    """Gives the spec of one model chunk, for ``GPTModelConfig.transformer_layer_spec``.

    It is whatever Megatron would take for the same flags (local or Transformer Engine, dense, MoE,
    MLA, heterogeneous), each of its layers exchanged for the one with the residual hook.

    Args:
        config: The model's configuration.
        vp_stage: The chunk's virtual pipeline stage, None without virtual stages.

    Returns:
        A layer spec, or a block spec where the layers of the chunk differ.

    Raises:
        UserError: The spec has a layer class that ProRes has no counterpart of.
    """
    spec = default_layer_spec(config, vp_stage)
    if isinstance(spec, TransformerBlockSubmodules):
        layers = [_with_residual_hook(layer) for layer in spec.layer_specs]
        spec = dataclasses.replace(spec, layer_specs=layers)
    else:
        spec = _with_residual_hook(spec)
    transformer = config.transformer
    if transformer.sequence_parallel and transformer.transformer_impl == "local":
        spec = _with_sequence_parallel_norms(spec, config, vp_stage)
    return spec


def _with_residual_hook(layer: ModuleSpec) -> ModuleSpec:
    if layer.module not in PRORES_LAYERS:
        raise UserError(
            f"ProRes has no residual hook for the layer class {layer.module.__name__}, which these "
            "flags select: leave them out, or use --prores-schedule none"
        )
    return dataclasses.replace(layer, module=PRORES_LAYERS[layer.module])


def _with_sequence_parallel_norms(
    spec: Spec, config: GPTModelConfig, vp_stage: int | None
) -> TransformerBlockSubmodules:
    """Exchanges the norms of the local spec that refuse sequence parallelism, the last one too."""

    def exchange(layer: ModuleSpec) -> ModuleSpec:
        norms = {
            field.name: sequence_parallel_norm
            for field in dataclasses.fields(TransformerLayerSubmodules)
            if getattr(layer.submodules, field.name) is WrappedTorchNorm
        }
        return dataclasses.replace(layer, submodules=dataclasses.replace(layer.submodules, **norms))

    if isinstance(spec, TransformerBlockSubmodules):
        layers = spec.layer_specs
    else:
        # Upstream picks the final norm by what is installed; only a block spec can name it.
        layers = [spec] * get_num_layers_to_build(config.transformer, vp_stage)
    return TransformerBlockSubmodules(
        layer_specs=[exchange(layer) for layer in layers], layer_norm=sequence_parallel_norm
    )
