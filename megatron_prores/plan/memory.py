"""Memory per rank: Megatron's own report, and what it does not give: the parts, stage by stage.

``megatron.training.theoretical_memory_usage`` gives the activations, and one figure for weights,
gradients and optimizer of the fullest rank. It computes that from the flags, for bf16 with float32
gradients and Adam, layers in equal numbers on all stages, and an optimizer that the context
parallel ranks do not share. Where that holds, the parts here add up to it. Elsewhere it is 20% too
high (a distributed optimizer on two context parallel ranks) or 6% too low (15 layers and an
embedding that counts as one, on two stages). So the parts follow from the chunks that were built.
"""

from __future__ import annotations

import argparse
import copy
from typing import Any

import torch
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.training.theoretical_memory_usage import (
    NUM_BYTES_IN_MEGABYTE,
    report_theoretical_memory,
)

from megatron_prores.plan.groups import Groups
from megatron_prores.plan.stages import Stage
from megatron_prores.schedule.depth import depths_of

_SWIGLU = 1.42
"""What autograd keeps of a layer with SwiGLU, over Megatron's formula, which is of a plain MLP:
1.37 to 1.45 of the paper's sizes, counted on the meta device (docs/plan.md)."""


def estimate(args: argparse.Namespace, stages: list[Stage], groups: Groups) -> dict[str, Any]:
    """Estimate the bytes of a rank of each pipeline stage.

    Args:
        args: Validated by Megatron.
        stages: What a rank of each pipeline stage holds.
        groups: The process groups of every rank.
    """
    # A copy: the report fills in fields. It takes a layer for an attention and an MLP.
    counted = copy.copy(args)
    counted.num_layers, counted.hybrid_layer_pattern = depths_of(args)[-1], None
    report = report_theoretical_memory(counted, get_num_microbatches())
    fixed, activations = (int(each * NUM_BYTES_IN_MEGABYTE) for each in report[:2])
    parts = [
        {"stage": number, **_parts(args, stage, groups)} for number, stage in enumerate(stages)
    ]
    totals = [part["weights"] + part["gradients"] + part["optimizer"] for part in parts]
    tokens = args.seq_length * args.micro_batch_size // args.context_parallel_size
    entries = tokens * args.padded_vocab_size // args.tensor_model_parallel_size
    loss = loss_bytes(args.params_dtype, args.cross_entropy_loss_fusion) * entries
    # The report has the float32 logits among the activations, where there is one stage.
    layers = activations - 4 * entries * (len(stages) == 1)
    layers = int(layers * (_SWIGLU if args.swiglu else 1.0))
    # The first stage has as many micro-batches in flight as there are stages, the last has one.
    at_work = max(
        totals[0] + layers + loss * (len(stages) == 1), totals[-1] + layers // len(stages) + loss
    )
    return {
        "stages": parts,
        "fullest_stage": totals.index(max(totals)),
        "fullest_total": max(totals) + activations,
        "upstream_weights_and_optimizer": fixed,
        "upstream_activations": activations,
        "loss": loss,
        "at_work": at_work,
    }


def loss_bytes(dtype: torch.dtype, fused: bool) -> int:
    """Return what the loss needs at its fullest, in bytes per token and entry of the vocabulary.

    The logits in half precision, and a float32 copy that becomes the softmax and then its gradient
    in place; a float32 model has no copy. The compiled kernels write one more float32 buffer.

    Args:
        dtype: Of the logits.
        fused: Whether ``--cross-entropy-loss-fusion`` is given.
    """
    return 4 + (2 if dtype.itemsize < 4 else 0) + (4 if fused else 0)


def _parts(args: argparse.Namespace, stage: Stage, groups: Groups) -> dict[str, int]:
    held, experts = stage.parameters, stage.expert_parameters
    weight = args.params_dtype.itemsize
    gradient = 4 if args.accumulate_allreduce_grads_in_fp32 else weight
    # The optimizer's own weights beside half-precision ones, and one or two moments.
    state = args.main_params_dtype.itemsize * (weight < 4) + args.exp_avg_dtype.itemsize
    if args.optimizer == "adam":
        state += args.exp_avg_sq_dtype.itemsize
    dense_ranks = expert_ranks = 1
    if args.use_distributed_optimizer:
        instances = args.num_distributed_optimizer_instances
        dense_ranks = len(groups["data x context"][0]) // instances
        expert_ranks = max(1, len(groups["expert data"][0]) // instances)
    shard = -(-(held - experts) // dense_ranks) + -(-experts // expert_ranks)
    return {
        "weights": held * (1 if args.fp8_param_gather else weight),
        "gradients": held * gradient,
        "optimizer": state * shard,
    }
