"""What the Transformer Engine tests run: models of its real modules, built without a GPU.

Transformer Engine computes on GPUs alone, but on the CPU device its modules can be built, named,
loaded and saved. Each function here runs in a process of its own (``python -m
tests.distributed.te_ranks FUNCTION ARGUMENTS...``): the CPU device hides Transformer Engine, and
what one process has imported another would inherit.
"""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PARTS = (
    "input_layernorm",
    "self_attention.linear_qkv",
    "self_attention.core_attention",
    "self_attention.linear_proj",
    "post_self_attn_layernorm",
    "pre_mlp_layernorm",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
    "post_mlp_layernorm",
)


def _use_cpu_with_transformer_engine() -> None:
    from megatron_prores.command_line import device
    from megatron_prores.cpu import gpu_packages

    gpu_packages.hide = lambda: None
    device.prepare("cpu")


def _layers(chunks: list[Any]) -> Iterator[Any]:
    from megatron_prores.model.layer import ProResLayerMixin

    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, ProResLayerMixin):
                yield module


def build_golden(case: str, tensor_parallel: int, directory: str) -> None:
    """Builds a golden case with Transformer Engine's modules, loads the authors' weights into it.

    Leaves the weights by their Llama names, and what the model is made of, as files.
    """
    import numpy as np
    import torch

    from megatron_prores.convert.llama import to_llama
    from tests import golden
    from tests.distributed import golden_ranks

    weights = golden.parameters("forward", case)
    layout = {
        "transformer_impl": "transformer_engine",
        "tensor_model_parallel_size": tensor_parallel,
        "sequence_parallel": tensor_parallel > 1,
    }
    chunks = golden_ranks._build(case, weights, layout)
    parts = [
        {name: type(layer.get_submodule(name)).__qualname__ for name in PARTS}
        for layer in _layers(chunks)
    ]
    norms = {
        name: getattr(parameter, "sequence_parallel", None)
        for chunk in chunks
        for name, parameter in chunk.named_parameters()
        if name.rsplit(".", 2)[-2:] == ["final_layernorm", "weight"]
        or "layernorm" in name
        or "layer_norm" in name
    }
    back = to_llama(chunks, golden.placement(case), golden.load_json("meta.json")["vocab_size"])
    if torch.distributed.get_rank() == 0:
        np.savez(Path(directory, "weights.npz"), **{k: v.numpy() for k, v in back.items()})
        Path(directory, "model.json").write_text(json.dumps({"parts": parts, "norms": norms}))


def _common_config() -> dict[str, Any]:
    """Describes Llama-like layers of Transformer Engine, for Megatron's configurations."""
    import torch.nn.functional as F

    return {
        "num_layers": 4,
        "hidden_size": 64,
        "ffn_hidden_size": 128,
        "num_attention_heads": 4,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "transformer_impl": "transformer_engine",
    }


def inspect_specs(directory: str) -> None:
    """Writes which modules the spec of each placement names, for dense, MoE and MLA layers."""
    import torch
    from megatron.core import parallel_state
    from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
    from megatron.training.models.gpt import GPTModelConfig

    from megatron_prores.config.placement import PLACEMENTS
    from megatron_prores.model.specs import prores_layer_spec

    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel()
    common = _common_config()
    experts = {"num_moe_experts": 2, "moe_ffn_hidden_size": 128, "moe_grouped_gemm": True}
    kinds = {
        "dense": TransformerConfig(**common),
        "dense with query and key norms": TransformerConfig(**common, qk_layernorm=True),
        "moe": TransformerConfig(**common, **experts),
        "mla": MLATransformerConfig(**common, multi_latent_attention=True),
    }
    found: dict[str, Any] = {}
    for kind, config in kinds.items():
        for placement in PLACEMENTS:
            model = GPTModelConfig(transformer=config, vocab_size=64, seq_length=16)
            spec: Any = prores_layer_spec(model, norm_placement=placement)
            layer = getattr(spec, "layer_specs", [spec])[0]
            found[f"{kind}, {placement}"] = _parts_of(layer)
    Path(directory, "specs.json").write_text(json.dumps(found))


def inspect_hybrid_specs(directory: str) -> None:
    """Writes, for each placement and kind of layer, its class, norms and places of fused ones."""
    from megatron.core.extensions.transformer_engine import TELayerNormColumnParallelLinear
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_prores.config.placement import PLACEMENTS
    from megatron_prores.model import with_prores
    from megatron_prores.model.hybrid_specs import stack_spec

    config = TransformerConfig(**_common_config(), is_hybrid_model=True)
    found: dict[str, Any] = {}
    for placement in PLACEMENTS:
        # Megatron does not have * beside D and +, but its spec has all of them.
        spec = with_prores.with_prores(stack_spec(config), placement, "M-G-*ED-+-")
        for kind, slot in with_prores._LAYERS_OF_SYMBOLS.items():
            layer = getattr(spec.params["layers"], slot)
            parts = vars(layer.submodules)
            found[f"{kind}, {placement}"] = {
                "layer": layer.module.__name__,
                "depths": layer.params["depths"],
                "behind": [
                    parts[branch.output_norm].__name__
                    for branch in layer.module.branches
                    if parts[branch.bda].__name__ != "IdentityFuncOp"
                ],
                "before": [
                    name
                    for name in ("norm", "input_layernorm", "pre_mlp_layernorm")
                    if getattr(parts.get(name), "__name__", "IdentityOp") != "IdentityOp"
                ],
                "fused": [
                    place
                    for name in ("mixer", "self_attention", "mlp")
                    for place in with_prores._find_module(
                        parts.get(name), TELayerNormColumnParallelLinear, name
                    )
                ],
            }
    Path(directory, "hybrid.json").write_text(json.dumps(found))


def _parts_of(layer: Any) -> dict[str, str]:
    parts = layer.submodules
    attention = parts.self_attention.submodules
    named = {
        "layer": layer.module,
        "input_layernorm": parts.input_layernorm,
        "post_self_attn_layernorm": parts.post_self_attn_layernorm,
        "pre_mlp_layernorm": parts.pre_mlp_layernorm,
        "post_mlp_layernorm": parts.post_mlp_layernorm,
        "linear_qkv": getattr(attention, "linear_qkv", None),
        "core_attention": attention.core_attention,
        "linear_proj": attention.linear_proj,
        "q_layernorm": getattr(attention, "q_layernorm", None),
    }
    mlp = getattr(parts.mlp, "keywords", {}).get("submodules")
    named["linear_fc1"] = getattr(mlp, "linear_fc1", None)
    named["linear_fc2"] = getattr(mlp, "linear_fc2", None)
    return {key: getattr(value, "__name__", str(value)) for key, value in named.items() if value}


def inspect_fused_norms(directory: str) -> None:
    """Writes where a branch's spec has a norm fused in, for each placement and kind of branch.

    And what ``lns`` makes of the norms of layer 4, of ordinary and of zero-centered ones.
    """
    from types import SimpleNamespace

    import torch
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.extensions.transformer_engine import TELayerNormColumnParallelLinear
    from megatron.core.transformer.heterogeneous.heterogeneous_config import (
        HeterogeneousTransformerConfig,
    )
    from megatron.core.transformer.spec_utils import build_module
    from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
    from megatron.training.models.gpt import GPTModelConfig

    from megatron_prores.config.placement import PLACEMENTS
    from megatron_prores.config.prores_config import ProResConfig
    from megatron_prores.model import initial_weights as init
    from megatron_prores.model import specs, with_prores

    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    common = _common_config()
    linear = {"replace_with_linear": True, "num_query_groups": None}
    block = {"attention": linear, "mlp": {"replace_with_linear": True, "ffn_hidden_size": None}}
    blocks = [block] * 4
    kinds = {
        "latent attention": MLATransformerConfig(
            **common, multi_latent_attention=True, mla_down_proj_fusion=True, qk_layernorm=True
        ),
        "gated delta net": TransformerConfig(
            **common,
            experimental_attention_variant="gated_delta_net",
            linear_attention_freq=[1] * 4,
            linear_conv_kernel_dim=4,
            linear_key_head_dim=16,
            linear_value_head_dim=16,
            linear_num_key_heads=4,
            linear_num_value_heads=4,
        ),
        "linear": HeterogeneousTransformerConfig(
            **common, heterogeneous_layers_config_encoded_json=json.dumps({"block_configs": blocks})
        ),
    }
    norms: dict[str, dict[str, float]] = {}
    found: dict[str, list[str]] = {}
    for kind, config in kinds.items():
        for placement in PLACEMENTS:
            model = GPTModelConfig(transformer=config, vocab_size=64, seq_length=16)
            spec: Any = specs.prores_layer_spec(model, norm_placement=placement)
            parts = getattr(spec, "layer_specs", [spec])[0].submodules
            found[f"{kind}, {placement}"] = [
                place
                for name in ("self_attention", "mlp")
                for place in with_prores._find_module(
                    getattr(parts, name), TELayerNormColumnParallelLinear, name
                )
            ]
        if kind == "gated delta net":
            continue  # its module asks for a library of GPU kernels when it is built
        for zero_centered in (False, True):
            config.layernorm_zero_centered_gamma = zero_centered
            spec = specs.prores_layer_spec(model, norm_placement="lns")
            spec = getattr(spec, "layer_specs", [spec])[0]
            layer = build_module(spec, config=config, layer_number=4)
            chunk = SimpleNamespace(decoder=SimpleNamespace(layers=[layer]))
            init.finish([chunk], ProResConfig(norm_placement="lns"))
            norms[f"{kind}, {zero_centered}"] = {
                name: weight.mean().item()
                for name, weight in layer.named_parameters()
                if "layer_norm" in name
            }
    Path(directory, "fused.json").write_text(json.dumps({"places": found, "norms": norms}))


def pretrain(*argv: str) -> None:
    """Runs the main program on the CPU device with Transformer Engine's modules in the model."""
    from megatron_prores.command_line import cpu as flags

    refused = ("--transformer-impl",)
    flags.NOT_ON_CPU = tuple(rule for rule in flags.NOT_ON_CPU if rule[0] not in refused)
    program = Path(__file__).resolve().parents[2] / "pretrain_gpt_prores.py"
    sys.argv = [str(program), *argv]
    runpy.run_path(str(program), run_name="__main__")


if __name__ == "__main__":
    _use_cpu_with_transformer_engine()
    function, *words = sys.argv[1:]
    if function == "build_golden":
        build_golden(words[0], int(words[1]), words[2])
    elif function.startswith("inspect_"):
        globals()[function](words[0])
    else:
        pretrain(*words)
