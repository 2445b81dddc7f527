"""The stack spec of a hybrid model: Megatron's own, or one of its local modules.

Megatron has one such spec, of Transformer Engine's modules. The local one is its layer spec of a
GPT model, cut in two: the same modules under the same names in a checkpoint. Mamba and gated delta
net are in it for the planner, which builds layers without running them.
"""

from __future__ import annotations

import dataclasses
from functools import partial

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.hybrid.hybrid_block import HybridStackSubmodules
from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec
from megatron.core.ssm.gated_delta_net import GatedDeltaNet, GatedDeltaNetSubmodules
from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
from megatron.core.ssm.mamba_mixer import MambaMixer, MambaMixerSubmodules
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.transformer.identity_op import IdentityFuncOp, IdentityOp
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlock,
    MultiTokenPredictionBlockSubmodules,
    get_mtp_layer_spec_for_backend,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer

from megatron_prores.model.hybrid_stack import ProResHybridStack
from megatron_prores.model.norm import sequence_parallel_norm
from megatron_prores.model.specs import needs_sequence_parallel_norms, with_local_parts

_NO_ATTENTION = {
    "input_layernorm": IdentityOp,
    "self_attention": IdentityOp,
    "self_attn_bda": IdentityFuncOp,
}
_NO_MLP = {"pre_mlp_layernorm": IdentityOp, "mlp": IdentityOp, "mlp_bda": IdentityFuncOp}


def stack_spec(config: TransformerConfig, document_masks: bool = False) -> ModuleSpec:
    """Return the spec of a hybrid model's stack, without ProRes.

    Args:
        config: Of the model; ``transformer_impl`` says of which modules.
        document_masks: Whether attention masks keep documents apart.
    """
    if config.transformer_impl == "local":
        return _local_stack(config, document_masks)
    return hybrid_stack_spec


def _local_stack(config: TransformerConfig, document_masks: bool) -> ModuleSpec:
    layer = partial(_local_layer, config, document_masks)
    dense, moe, latent = layer(), layer(config.num_moe_experts), layer(latent=True)
    backend = LocalSpecProvider()
    if needs_sequence_parallel_norms(config):
        final_norm = sequence_parallel_norm
    else:
        final_norm = backend.layer_norm(rms_norm=config.normalization == "RMSNorm")
    prediction = get_mtp_layer_spec_for_backend(mtp_model_layer_spec=None, backend=backend)
    norm = dense.submodules.input_layernorm
    mixer = MambaMixerSubmodules(backend.column_parallel_linear(), backend.row_parallel_linear())
    delta_net = GatedDeltaNetSubmodules(
        in_proj=backend.column_parallel_linear(),
        out_norm=norm,
        out_proj=backend.row_parallel_linear(),
    )
    attention = _part_of(dense, TransformerLayer, _NO_MLP)
    gated = {"self_attention": ModuleSpec(module=GatedDeltaNet, submodules=delta_net)}
    return ModuleSpec(
        module=ProResHybridStack,
        params={"final_norm": final_norm},
        submodules=HybridStackSubmodules(
            mamba_layer=ModuleSpec(
                module=MambaLayer,
                submodules=MambaLayerSubmodules(
                    norm=norm,
                    mixer=ModuleSpec(module=MambaMixer, submodules=mixer),
                    mamba_bda=get_bias_dropout_add,
                ),
            ),
            gdn_layer=_part_of(attention, TransformerLayer, gated),
            mla_layer=_part_of(latent, TransformerLayer, _NO_MLP),
            attention_layer=attention,
            mlp_layer=_part_of(dense, MLPLayer, _NO_ATTENTION),
            moe_layer=_part_of(moe, TransformerLayer, _NO_ATTENTION),
            mtp_block_spec=ModuleSpec(
                module=MultiTokenPredictionBlock,
                submodules=MultiTokenPredictionBlockSubmodules(layer_specs=[prediction]),
            ),
        ),
    )


def _local_layer(
    config: TransformerConfig,
    document_masks: bool,
    num_experts: int | None = None,
    latent: bool = False,
) -> ModuleSpec:
    """Return the layer of a GPT model, of Megatron's local spec."""
    layer = get_gpt_layer_local_spec(
        num_experts=num_experts,
        multi_latent_attention=latent,
        moe_grouped_gemm=config.moe_grouped_gemm,
        normalization=config.normalization,
    )
    return with_local_parts(layer, config, document_masks)


def _part_of(layer: ModuleSpec, module: type, parts: dict[str, object]) -> ModuleSpec:
    """Return a layer of one branch of another, or with another one."""
    return ModuleSpec(module=module, submodules=dataclasses.replace(layer.submodules, **parts))
