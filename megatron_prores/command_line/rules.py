"""The rules of what is refused, as data: a flag, whether it is given, and why it cannot work.

docs/flags.md lists every flag of Megatron's parser with its verdict; tests/unit/test_flag_list.py
keeps that list, these rules, and the parser together.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Rule = tuple[str, Callable[[Any], bool], str]
"""(the flag as the user gave it, whether it is given, why it cannot work)."""


def is_true(destination: str) -> Callable[[Any], bool]:
    """Return a condition: the flag is given, with a value that is not false."""
    return lambda args: bool(getattr(args, destination, None))


NOT_WITH_OWN_LAYER: tuple[Rule, ...] = (
    (
        "--transformer-impl inference_optimized",
        lambda a: a.transformer_impl == "inference_optimized",
        "its kernels add the residual themselves, without alpha or added norms",
    ),
    (
        "--inference-fuse-tp-communication",
        is_true("inference_fuse_tp_communication"),
        "its kernels add the residual themselves, without alpha or added norms",
    ),
    (
        "--fused-residual-rmsnorm",
        is_true("fused_residual_rmsnorm"),
        "the fused norm takes over the residual addition, without alpha or added norms",
    ),
    (
        "--spec",
        lambda a: a.spec is not None,
        "the layer spec is built from Megatron's own flags",
    ),
)
"""Paths of upstream that add the residual somewhere else than in the bias-dropout-add of a layer
that this project can exchange. Refused with ProRes, and with norms behind a branch."""

ONLY_WITH_TRANSFORMER_ENGINE: tuple[Rule, ...] = (
    ("--fp8-format", lambda a: a.fp8 is not None, "its GEMMs are Transformer Engine's"),
    ("--fp4-format", lambda a: a.fp4 is not None, "its GEMMs are Transformer Engine's"),
    ("--tp-comm-overlap", is_true("tp_comm_overlap"), "Transformer Engine's linears overlap it"),
    (
        "--experimental-attention-variant",
        is_true("experimental_attention_variant"),
        "Megatron builds it from Transformer Engine's modules",
    ),
    (
        "--moe-latent-size",
        is_true("moe_latent_size"),
        "its projections are Transformer Engine's",
    ),
    (
        "--apply-layernorm-1p",
        lambda a: a.layernorm_zero_centered_gamma and a.normalization != "LayerNorm",
        "torch's norms, which Megatron takes where Apex has none, do not add 1 to their weight",
    ),
)

PackageRule = tuple[str, Callable[[Any], bool], str, str, str]
"""(the flag, with values as {destination}; whether it is given; the module that it needs; its
package; what to do without it)."""

NEEDS_PACKAGE: tuple[PackageRule, ...] = (
    (
        "--optimizer {optimizer}",
        lambda a: a.optimizer not in ("adam", "sgd") and not a.skip_train,
        "emerging_optimizers",
        "emerging-optimizers",
        "install it, or use adam",
    ),
    (
        "--transformer-impl transformer_engine (the default)",
        lambda a: a.transformer_impl == "transformer_engine" and a.device == "cuda",
        "transformer_engine",
        "Transformer Engine",
        "install megatron-prores[te], or use --transformer-impl local",
    ),
    (
        "--cuda-graph-impl transformer_engine",
        lambda a: a.cuda_graph_impl == "transformer_engine",
        "transformer_engine",
        "Transformer Engine",
        "use local",
    ),
    (
        "a gated delta net",
        lambda a: (
            "G" in (a.hybrid_layer_pattern or "")
            or (
                a.experimental_attention_variant == "gated_delta_net"
                and a.transformer_impl == "transformer_engine"
            )
        ),
        "fla",
        "flash-linear-attention",
        "install it",
    ),
    (
        "--hybrid-layer-pattern {hybrid_layer_pattern}",
        lambda a: "M" in (a.hybrid_layer_pattern or ""),
        "mamba_ssm",
        "mamba-ssm",
        "install it",
    ),
    (
        "--apply-layernorm-1p with --transformer-impl local",
        lambda a: a.layernorm_zero_centered_gamma and a.transformer_impl == "local",
        "apex",
        "Apex",
        "torch's norms do not add 1 to their weight",
    ),
    # Also with Transformer Engine: the output head is Megatron's own linear, which ends the run
    # when the model is built.
    (
        "gradient accumulation fusion (Megatron's default)",
        lambda a: a.gradient_accumulation_fusion and a.device == "cuda",
        "fused_weight_gradient_mlp_cuda",
        "Apex's fused_weight_gradient_mlp_cuda",
        "give --no-gradient-accumulation-fusion",
    ),
)

_SHARDED_OTHERWISE = "which rank counts a weight is not known of its shards"

NOT_WITH_LAYER_NORMS: tuple[Rule, ...] = (
    (
        "--cuda-graph-impl",
        lambda a: a.cuda_graph_impl != "none",
        "a replayed graph runs none of the measuring",
    ),
    ("--use-megatron-fsdp", is_true("use_megatron_fsdp"), _SHARDED_OTHERWISE),
    ("--use-torch-fsdp2", is_true("use_torch_fsdp2"), _SHARDED_OTHERWISE),
    (
        "--num-distributed-optimizer-instances",
        lambda a: a.num_distributed_optimizer_instances > 1,
        _SHARDED_OTHERWISE,
    ),
    (
        "--optimizer",
        lambda a: a.use_distributed_optimizer and a.optimizer not in ("adam", "sgd"),
        _SHARDED_OTHERWISE,
    ),
    ("--fp8-param-gather", is_true("fp8_param_gather"), "the weights that it keeps are scaled"),
    ("--fp4-param-gather", is_true("fp4_param_gather"), "the weights that it keeps are scaled"),
)
"""What ``--log-layer-norms-interval`` cannot measure."""

NOT_WITH_NORM_BEHIND_THE_SUM: tuple[Rule, ...] = (
    (
        "--fp32-residual-connection",
        is_true("fp32_residual_connection"),
        "the norm is part of the residual stream",
    ),
    (
        "--use-transformer-engine-op-fuser",
        is_true("use_transformer_engine_op_fuser"),
        "it fuses the MLP with a norm before it, which this placement has not",
    ),
)

NOT_WITH_OWN_NORMS: tuple[Rule, ...] = (
    (
        "--mtp-num-layers",
        is_true("mtp_num_layers"),
        "Megatron's prediction layers have their norms before the branches",
    ),
    (
        "--overlap-moe-expert-parallel-comm",
        is_true("overlap_moe_expert_parallel_comm"),
        "its schedule runs the parts of a layer by itself, and has not been tried with added norms",
    ),
)

NOT_WITH_OWN_INIT: tuple[Rule, ...] = (
    ("--use-mup", is_true("use_mup"), "both say how weights start"),
)

_DRAWN_BEFORE = "the float32 weights that it keeps are drawn before they are rescaled"

NOT_WITH_RESCALED_INIT: tuple[Rule, ...] = (
    ("--fp8-param-gather", is_true("fp8_param_gather"), _DRAWN_BEFORE),
    ("--fp4-param-gather", is_true("fp4_param_gather"), _DRAWN_BEFORE),
)

NOT_WITH_DEEPNORM_INIT: tuple[Rule, ...] = (
    (
        "--multi-latent-attention",
        is_true("multi_latent_attention"),
        "DeepNorm's gains are defined for separate query, key and value projections",
    ),
    (
        "--attention-output-gate",
        is_true("attention_output_gate"),
        "DeepNorm's gains are not defined for the gate beside the query",
    ),
    (
        "--experimental-attention-variant",
        is_true("experimental_attention_variant"),
        "DeepNorm's gains are defined for separate query, key and value projections",
    ),
    (
        "--moe-latent-size",
        is_true("moe_latent_size"),
        "DeepNorm has no gain for the projections into and out of the latent space",
    ),
)
