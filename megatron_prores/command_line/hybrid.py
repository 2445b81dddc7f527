"""What ``--hybrid-layer-pattern`` cannot be combined with, and patterns that cannot run."""

from __future__ import annotations

from typing import Any

from megatron_prores.command_line.rules import Rule, is_true
from megatron_prores.config.prores_config import ProResConfig
from megatron_prores.errors import UserError
from megatron_prores.schedule.depth import depths_of

FLAG = "--hybrid-layer-pattern"

_LATENT_KINDS = "+D"
_NAMES = {
    "M": "Mamba",
    "G": "a gated delta net",
    "+": "latent attention",
    "D": "sparse attention",
}

NOT_WITH_HYBRID: tuple[Rule, ...] = (
    (
        "--heterogeneous-layers-config-path",
        is_true("heterogeneous_layers_config_path"),
        "both say what each layer is",
    ),
    ("--spec", lambda a: a.spec is not None, "the stack's spec is built from Megatron's own flags"),
    (
        "--multi-latent-attention",
        lambda a: a.multi_latent_attention and not set(_LATENT_KINDS) & set(a.hybrid_layer_pattern),
        "its layers are + in the pattern",
    ),
    (
        "--experimental-attention-variant",
        is_true("experimental_attention_variant"),
        "its layers are G or D in the pattern",
    ),
    (
        "--moe-layer-freq",
        lambda a: a.moe_layer_freq != 1,
        "the pattern's E are the layers of experts",
    ),
    (
        "--qk-layernorm",
        is_true("qk_layernorm"),
        "Megatron's hybrid layers have no norms of queries and keys, and would train without",
    ),
    (
        "--qk-l2-norm",
        is_true("qk_l2_norm"),
        "Megatron's hybrid layers have no norms of queries and keys, and would train without",
    ),
    (
        "--use-rope-scaling",
        is_true("use_rope_scaling"),
        "Megatron does not hand it to a hybrid model",
    ),
    (
        "--mla-down-proj-fusion",
        is_true("mla_down_proj_fusion"),
        "Megatron fuses a norm into it behind the spec that ProRes places the norms in",
    ),
    (
        "--use-transformer-engine-op-fuser",
        is_true("use_transformer_engine_op_fuser"),
        "Megatron's hybrid layers do not use it",
    ),
    (
        "--overlap-moe-expert-parallel-comm",
        is_true("overlap_moe_expert_parallel_comm"),
        "Megatron has no such schedule of a hybrid model",
    ),
    (
        "--log-layer-norms-interval",
        lambda a: a.log_layer_norms_interval is not None,
        "what is measured is the attention and the MLP of one layer",
    ),
)


def check_pattern(args: Any, prores: ProResConfig) -> None:
    """Refuse a pattern whose layers cannot be built, or cannot be ProRes's.

    Args:
        args: Parsed; once more when ``--use-checkpoint-args`` has taken it from a checkpoint.
        prores: The ProRes configuration of the same command line.

    Raises:
        UserError: Names the pattern, and why.
    """
    depths = depths_of(args)
    main, _, prediction = args.hybrid_layer_pattern.partition("/")
    pattern, kinds = f"{FLAG} {args.hybrid_layer_pattern}", set(main) | set(prediction)
    if args.num_layers not in (None, len(depths)):
        raise UserError(
            f"--num-layers {args.num_layers} cannot be used with {pattern}, which has "
            f"{len(depths)} layers ({depths[-1]} of ProRes): leave it out"
        )
    if args.transformer_impl == "local" and (missing := sorted(kinds & set(_NAMES))):
        raise UserError(
            f"{pattern} cannot be used with --transformer-impl local: Megatron builds {missing[0]} "
            f"({_NAMES[missing[0]]}) from Transformer Engine's modules"
        )
    if ("E" in kinds) != bool(args.num_experts):
        needed = "E needs --num-experts" if "E" in kinds else "--num-experts has no layer E there"
        raise UserError(f"{pattern}: {needed}")
    if prediction and prores.norm_placement not in ("pre", "lns"):
        raise UserError(
            f"{pattern} cannot be used with --norm-placement {prores.norm_placement}: Megatron's "
            "prediction layers have their norms before the branches"
        )
    if prores.initialization == "deepnorm" and (others := sorted(set(main) & set(_NAMES))):
        raise UserError(
            f"{pattern} cannot be used with --branch-init deepnorm: DeepNorm's gains are not "
            f"defined for {others[0]} ({_NAMES[others[0]]}); give --branch-init normal"
        )
    _check_cuts(args, main.split("|"))


def _check_cuts(args: Any, segments: list[str]) -> None:
    """Refuse cuts that Megatron finds out about when it builds or loads the model."""
    ranks = args.pipeline_model_parallel_size
    pattern = f"{FLAG} {args.hybrid_layer_pattern}"
    if len(segments) == 1:
        first, last = args.decoder_first_pipeline_num_layers, args.decoder_last_pipeline_num_layers
        given = [each for each in (first, last) if each is not None]
        middle, left = ranks - len(given), len(segments[0]) - sum(given)
        if left < 0 or (middle and left % middle) or (not middle and left):
            raise UserError(
                f"{pattern}: its {len(segments[0])} layers do not divide into "
                f"--pipeline-model-parallel-size {ranks}; cut it with | where the stages end"
            )
        return
    if args.save or args.load:
        for rank in range(1, ranks - 1):
            if not any(segments[rank::ranks]):
                raise UserError(
                    f"{pattern}: pipeline rank {rank} has nothing; Megatron cannot load a "
                    "checkpoint there"
                )
