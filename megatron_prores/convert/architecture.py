"""Which class of transformers a checkpoint becomes, and with which configuration."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass
from typing import Any

from megatron_prores.command_line.rules import Rule, is_true
from megatron_prores.config.placement import PLACEMENTS
from megatron_prores.errors import UserError
from megatron_prores.schedule.depth import depths_of, is_gpt_pattern

OWN_CLASS = "ProResForCausalLM"
"""The class of modeling_prores.py, which is put beside the weights."""


@dataclass(frozen=True)
class Architecture:
    """A class of transformers and what its config.json says."""

    name: str
    """The class, such as ``LlamaForCausalLM``."""
    config: dict[str, Any]
    norm_placement: str

    @property
    def is_own(self) -> bool:
        """Whether transformers has no such class and ours is put beside the weights."""
        return self.name == OWN_CLASS


_MOE: tuple[Rule, ...] = (
    (
        "--moe-router-score-function",
        lambda a: getattr(a, "moe_router_score_function", "softmax") != "softmax",
        "Mixtral's router is a softmax",
    ),
    (
        "--moe-router-pre-softmax",
        is_true("moe_router_pre_softmax"),
        "Mixtral's weights add up to 1",
    ),
    ("--moe-router-enable-expert-bias", is_true("moe_router_enable_expert_bias"), ""),
    ("--moe-router-topk-scaling-factor", is_true("moe_router_topk_scaling_factor"), ""),
    ("--moe-router-num-groups", is_true("moe_router_num_groups"), ""),
    ("--moe-shared-expert-intermediate-size", is_true("moe_shared_expert_intermediate_size"), ""),
    ("--moe-expert-capacity-factor", is_true("moe_expert_capacity_factor"), "tokens are dropped"),
    ("--moe-mlp-glu-interleave-size", is_true("moe_mlp_glu_interleave_size"), ""),
    ("--moe-latent-size", is_true("moe_latent_size"), ""),
    (
        "--moe-layer-freq",
        lambda a: getattr(a, "moe_layer_freq", 1) not in (1, None),
        "every layer of Mixtral has experts",
    ),
    ("biases", lambda a: a.add_bias_linear, "Mixtral has none; see --disable-bias-linear"),
    ("--qk-layernorm", is_true("qk_layernorm"), "Mixtral has none"),
    (
        "--norm-placement",
        lambda a: getattr(a, "norm_placement", "pre") not in ("pre", "lns"),
        "with experts only pre and lns have a class",
    ),
    ("--normalization", lambda a: a.normalization != "RMSNorm", "Mixtral has RMSNorm"),
)

_NO_CLASS: tuple[Rule, ...] = (
    ("no --swiglu", lambda a: not a.swiglu, "Llama's MLP has a gate"),
    (
        "--position-embedding-type",
        lambda a: a.position_embedding_type != "rope",
        "only rotary positions (rope) have a class",
    ),
    ("--rotary-percent", lambda a: getattr(a, "rotary_percent", 1.0) != 1.0, "only 1.0 has one"),
    ("--rotary-interleaved", is_true("rotary_interleaved"), ""),
    ("--multi-latent-attention", is_true("multi_latent_attention"), ""),
    ("--experimental-attention-variant", is_true("experimental_attention_variant"), ""),
    ("--attention-output-gate", is_true("attention_output_gate"), ""),
    ("--window-size", is_true("window_size"), ""),
    (
        "--softmax-type",
        lambda a: getattr(a, "softmax_type", "vanilla") != "vanilla",
        "only the plain softmax has one",
    ),
    ("--use-mup", is_true("use_mup"), "its multipliers have no place in a class"),
    ("--no-rope-freq", is_true("no_rope_freq"), ""),
    ("--qk-l2-norm", is_true("qk_l2_norm"), ""),
    ("--quick-geglu", is_true("quick_geglu"), ""),
    ("--activation-func-clamp-value", is_true("activation_func_clamp_value"), ""),
    ("--glu-linear-offset", is_true("glu_linear_offset"), ""),
    (
        "--heterogeneous-layers-config-path",
        is_true("heterogeneous_layers_config_encoded_json"),
        "its layers differ",
    ),
    (
        "--qk-layernorm",
        lambda a: (
            getattr(a, "qk_layernorm", False)
            and not (
                getattr(a, "norm_placement", "pre") in ("pre", "lns")
                and a.normalization == "RMSNorm"
            )
        ),
        "only with --norm-placement pre or lns and RMSNorm it has one (Qwen3)",
    ),
)


def architecture_of(
    args: Namespace, vocab_size: int, special: dict[str, int | None], own_class: bool = False
) -> Architecture:
    """Choose the class of a checkpoint and write its configuration.

    Args:
        args: Megatron's arguments, as the checkpoint has them.
        vocab_size: Rows of the embedding without padding.
        special: ``bos_token_id``, ``eos_token_id`` and ``pad_token_id``.
        own_class: Take :data:`OWN_CLASS` also where transformers has a class.

    Raises:
        UserError: There is no class for such a model.
    """
    pattern = getattr(args, "hybrid_layer_pattern", None)
    if pattern is not None and not is_gpt_pattern(pattern):
        raise UserError(
            f"a model with --hybrid-layer-pattern {pattern} cannot be exported: there is no class "
            "for it (only for *- or *E, over and over)"
        )
    has_experts = bool(getattr(args, "num_experts", None))
    for flag, applies, why in (*_NO_CLASS, *(_MOE if has_experts else ())):
        if applies(args):
            value = getattr(args, flag.removeprefix("--").replace("-", "_"), None)
            shown = f"{flag} {value}" if isinstance(value, str | float | int | list) else flag
            raise UserError(
                f"a model with {shown} cannot be exported: there is no class for it"
                + (f" ({why})" if why else "")
            )
    placement = str(getattr(args, "norm_placement", "pre"))
    name = _class_of(args, placement, has_experts, own_class)
    config: dict[str, Any] = {
        "architectures": [name],
        "model_type": _MODEL_TYPES[name],
        "vocab_size": vocab_size,
        "hidden_size": args.hidden_size,
        "intermediate_size": (args.moe_ffn_hidden_size if has_experts else args.ffn_hidden_size),
        "num_hidden_layers": depths_of(args)[-1],
        "num_attention_heads": args.num_attention_heads,
        "num_key_value_heads": key_value_heads(args),
        "head_dim": args.kv_channels,
        "hidden_act": "silu",
        "max_position_embeddings": args.max_position_embeddings,
        "initializer_range": args.init_method_std,
        "rms_norm_eps": args.layernorm_epsilon,
        "tie_word_embeddings": not args.untie_embeddings_and_output_weights,
        "attention_bias": bool(args.add_bias_linear or getattr(args, "add_qkv_bias", False)),
        "attention_dropout": 0.0,
        "rope_parameters": _rope(args),
        "use_cache": True,
        **special,
    }
    if name in ("LlamaForCausalLM", OWN_CLASS):
        config["mlp_bias"] = bool(args.add_bias_linear)
    elif args.add_bias_linear:
        raise UserError(
            f"a model with biases (no --disable-bias-linear) cannot be exported as {name}, which "
            "has none: give --own-class"
        )
    if name == "MixtralForCausalLM":
        config |= {"num_local_experts": args.num_experts}
        config |= {"num_experts_per_tok": args.moe_router_topk, "sliding_window": None}
    if name == "Glm4ForCausalLM":
        config["rope_parameters"]["partial_rotary_factor"] = 1.0
        config["partial_rotary_factor"] = 1.0
    if name == OWN_CLASS:
        config |= {"norm_placement": placement, "normalization": args.normalization}
        config["auto_map"] = {
            "AutoConfig": "modeling_prores.ProResConfig",
            "AutoModelForCausalLM": f"modeling_prores.{OWN_CLASS}",
        }
    return Architecture(name, config, placement)


_MODEL_TYPES = {
    "LlamaForCausalLM": "llama",
    "Qwen3ForCausalLM": "qwen3",
    "MixtralForCausalLM": "mixtral",
    "Glm4ForCausalLM": "glm4",
    OWN_CLASS: "prores",
}


def _class_of(args: Namespace, placement: str, has_experts: bool, own_class: bool) -> str:
    if has_experts:
        return "MixtralForCausalLM"
    if getattr(args, "qk_layernorm", False):
        return "Qwen3ForCausalLM"
    if own_class or args.normalization != "RMSNorm":
        return OWN_CLASS
    if PLACEMENTS[placement].is_stock:
        return "LlamaForCausalLM"
    # Its output projections have no biases, nor has its MLP.
    glm4 = placement == "sandwich" and not (
        args.add_bias_linear or getattr(args, "add_qkv_bias", False)
    )
    return "Glm4ForCausalLM" if glm4 else OWN_CLASS


def key_value_heads(args: Namespace) -> int:
    """Return the number of heads of keys and values."""
    grouped = getattr(args, "group_query_attention", False)
    return int(args.num_query_groups if grouped else args.num_attention_heads)


def _rope(args: Namespace) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(args.rotary_base)}
    if getattr(args, "use_rope_scaling", False):
        # Megatron's constants beside the factor are Llama 3's.
        return rope | {
            "rope_type": "llama3",
            "factor": float(args.rope_scaling_factor),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    if factor := getattr(args, "rotary_seq_len_interpolation_factor", None):
        return rope | {"rope_type": "linear", "factor": float(factor)}
    return rope
