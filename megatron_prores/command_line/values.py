"""Flags whose value alone is wrong, and values that do not go together.

Upstream believes most numbers: some end a run with a traceback minutes into it, in its model, its
data, its scheduler or its log; some with exit code 0. Here they are refused before any work.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

from megatron_prores.errors import UserError

_AT_LEAST_ONE = (
    "num_layers",
    "encoder_num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "seq_length",
    "max_position_embeddings",
    "num_experts",
    "moe_router_topk",
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
    "num_layers_per_virtual_pipeline_stage",
    "num_virtual_stages_per_pipeline_rank",
    "micro_batch_size",
    "global_batch_size",
    "make_vocab_size_divisible_by",
    "log_interval",
    "tensorboard_log_interval",
    "save_interval",
    "exit_interval",
    "exit_duration_in_mins",
    "log_layer_norms_interval",
)

_AT_LEAST_ONE_IN_TRAINING = ("train_iters", "train_samples", "eval_interval", "lr_decay_iters")

_FRACTIONS = ("hidden_dropout", "attention_dropout", "lr_warmup_fraction")

_NOT_NEGATIVE = tuple(
    "lr min_lr weight_decay clip_grad lr_warmup_iters eval_iters manual_gc_interval".split()
)


def flag_of(destination: str) -> str:
    """Return the flag that sets ``args.<destination>``."""
    return "--" + destination.replace("_", "-")


def check_numbers(args: Any) -> None:
    """Refuse numbers that no run can use.

    Args:
        args: Parsed, not yet validated by Megatron.

    Raises:
        UserError: Names the flag, the value, and what it must be.
    """
    at_least_one = _AT_LEAST_ONE if args.skip_train else _AT_LEAST_ONE + _AT_LEAST_ONE_IN_TRAINING
    _require(args, at_least_one, lambda value: value >= 1, "must be at least 1")
    _require(args, _FRACTIONS, lambda value: 0 <= value <= 1, "must be from 0 to 1")
    _require(args, _NOT_NEGATIVE, lambda value: value >= 0, "must not be negative")
    above = ("skip_step_above_sigmas", "peak_tflops")
    _require(args, above, lambda value: 0 < value < math.inf, "must be above 0")


def _require(
    args: Any, destinations: tuple[str, ...], holds: Callable[[Any], bool], words: str
) -> None:
    for destination in destinations:
        value = getattr(args, destination, None)
        if value is not None and not holds(value):
            raise UserError(f"{flag_of(destination)} {value}: {words}")


def check_training(args: Any) -> None:
    """Refuse a training run without an end, a learning rate, or an optimizer.

    Args:
        args: Parsed, not yet validated by Megatron.

    Raises:
        UserError: Names the flag that is missing or does not fit.
    """
    if args.save is not None and args.save_interval is None:
        raise UserError("--save needs --save-interval: the iterations between two checkpoints")
    if args.skip_train:
        return
    if args.eval_interval is None and not args.full_validation:
        # Upstream divides by it, even when it evaluates nothing.
        raise UserError("--eval-interval is missing: give the iterations between evaluations")
    if args.train_iters is None and args.train_samples is None:
        raise UserError("--train-iters is missing (or --train-samples): say how long to train")
    if args.lr is None:
        raise UserError("--lr is missing: give the learning rate")
    _check_learning_rate(args)


def _check_learning_rate(args: Any) -> None:
    unit = "iters" if args.train_iters is not None else "samples"
    decay, warmup = getattr(args, f"lr_decay_{unit}"), getattr(args, f"lr_warmup_{unit}")
    source = f"--lr-decay-{unit}" if decay is not None else f"--train-{unit}"
    length = decay if decay is not None else getattr(args, f"train_{unit}")
    if args.lr_warmup_fraction is None and warmup >= length:
        raise UserError(
            f"--lr-warmup-{unit} {warmup}: must be less than {source} {length}, which it is part of"
        )
    if args.lr_warmup_fraction == 1:
        raise UserError("--lr-warmup-fraction 1: must be less than 1, or no decay is left")
    if args.lr_decay_style == "WSD" and getattr(args, f"lr_wsd_decay_{unit}") is None:
        raise UserError(f"--lr-decay-style WSD needs --lr-wsd-decay-{unit}: how long its decay is")


def check_split(args: Any) -> None:
    """Refuse a ``--split`` that gives no part of the data to anything.

    Args:
        args: Parsed, not yet validated by Megatron.

    Raises:
        UserError: The value is not one to three shares.
    """
    if args.split is None:
        return
    words = [word.strip() for word in args.split.split(",")]
    shares = [float(word) if re.fullmatch(r"\d+\.?\d*|\.\d+", word) else -1.0 for word in words]
    if min(shares) < 0 or len(shares) > 3 or sum(shares) == 0:
        raise UserError(
            f"--split {args.split}: give the shares of training, validation and test, as in 98,1,1"
        )


def check_shapes(args: Any) -> None:
    """Refuse a model that cannot be cut into its layout, where Megatron finds out too late.

    Args:
        args: Validated by Megatron: with its defaults filled in.

    Raises:
        UserError: Names both flags.
    """
    parts = args.tensor_model_parallel_size
    tensor = "--tensor-model-parallel-size"
    if args.num_experts is None and args.ffn_hidden_size % parts:
        _refuse_division("--ffn-hidden-size", args.ffn_hidden_size, tensor, parts)
    context = args.context_parallel_size
    if args.sequence_parallel and args.seq_length % (context * parts):
        ranks = f"--context-parallel-size {context} times " if context > 1 else ""
        _refuse_division(
            "--seq-length", args.seq_length, f"{ranks}--sequence-parallel and {tensor}", parts
        )
    if args.group_query_attention and args.num_attention_heads % args.num_query_groups:
        _refuse_division(
            "--num-attention-heads",
            args.num_attention_heads,
            "--num-query-groups",
            args.num_query_groups,
        )
    _check_shared_groups(args)
    if args.num_experts is not None and args.moe_router_topk > args.num_experts:
        raise UserError(
            f"--moe-router-topk {args.moe_router_topk}: there are only --num-experts "
            f"{args.num_experts}"
        )
    _check_virtual_stages(args)
    _check_layout(args)


def _check_shared_groups(args: Any) -> None:
    """Refuse query groups that tensor-parallel ranks cannot share: they share it row by row."""
    ranks = args.tensor_model_parallel_size
    if not args.group_query_attention or args.num_query_groups >= ranks:
        return
    rows = (args.num_attention_heads + 2 * args.num_query_groups) * args.kv_channels
    if rows % ranks:
        raise UserError(
            f"--num-query-groups {args.num_query_groups}: queries, keys and values are {rows} rows "
            f"together, which do not divide by --tensor-model-parallel-size {ranks}"
        )


def _check_virtual_stages(args: Any) -> None:
    stages = args.num_virtual_stages_per_pipeline_rank
    if (
        stages is None
        or args.decoder_first_pipeline_num_layers is not None
        or args.decoder_last_pipeline_num_layers is not None
    ):
        return
    layers = args.num_layers + sum(
        (args.account_for_embedding_in_pipeline_split, args.account_for_loss_in_pipeline_split)
    )
    ranks = args.pipeline_model_parallel_size
    if layers % (ranks * stages):
        raise UserError(
            f"--num-layers {args.num_layers} does not divide into --pipeline-model-parallel-size "
            f"{ranks} times --num-virtual-stages-per-pipeline-rank {stages} virtual stages"
        )


def _check_layout(args: Any) -> None:
    """Refuse layouts that Megatron takes, and then cannot load or never finishes to build."""
    if args.pipeline_model_parallel_layout is None:
        return
    from megatron.core.transformer.enums import LayerType
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    layout = str(args.pipeline_model_parallel_layout)
    stages = PipelineParallelLayerLayout.parse_str_to_list(layout)
    ranks = args.pipeline_model_parallel_size
    has_checkpoints = args.save or args.load
    for rank in range(ranks):
        if has_checkpoints and not any(stages[rank::ranks]):
            raise UserError(
                f"--pipeline-model-parallel-layout {layout}: pipeline rank {rank} has nothing; "
                "Megatron cannot load a checkpoint there"
            )
    if ranks > 1 and any(LayerType.mtp in stage for stage in stages[::ranks]):
        raise UserError(
            f"--pipeline-model-parallel-layout {layout}: prediction layers are on pipeline rank 0, "
            "which has the embedding already; Megatron hangs there, or lets a copy of it drift"
        )


def _refuse_division(flag: str, value: int, by: str, divisor: int) -> None:
    raise UserError(f"{flag} {value} does not divide by {by} {divisor}")
