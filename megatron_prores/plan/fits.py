"""How the layout divides ranks, layers, widths and batch, every division in words."""

from __future__ import annotations

import argparse
from collections import Counter

from megatron_prores.plan.groups import WorldGroups
from megatron_prores.plan.holding import StageHolding


def divisions(
    args: argparse.Namespace, stages: list[StageHolding], gpus_per_node: int
) -> list[str]:
    """Say every division of an accepted layout; Megatron and our checks have refused all others.

    Args:
        args: Validated by Megatron.
        stages: What a rank of each pipeline stage holds.
        gpus_per_node: Ranks per node.
    """
    tensor = args.tensor_model_parallel_size
    per_rank = f"/ {tensor} tensor ranks ="
    lines = [
        f"{args.world_size} ranks = {tensor} tensor x {args.pipeline_model_parallel_size} pipeline "
        f"x {args.context_parallel_size} context x {args.data_parallel_size} data"
    ]
    nodes, odd = divmod(args.world_size, gpus_per_node)
    if nodes and not odd:
        lines.append(f"{args.world_size} ranks = {nodes} nodes x {gpus_per_node}")
    lines.append(_layers(args, stages))
    heads = args.num_attention_heads
    lines.append(f"{heads} attention heads {per_rank} {heads // tensor} a rank")
    if args.group_query_attention:
        groups = args.num_query_groups
        shared = f"{groups // tensor} a rank" if groups >= tensor else "shared by several ranks"
        lines.append(f"{groups} query groups {per_rank} {shared}")
    lines.append(
        f"feed-forward {args.ffn_hidden_size} {per_rank} {args.ffn_hidden_size // tensor} a rank"
    )
    padded = args.padded_vocab_size
    lines.append(f"vocabulary {padded}, with padding, {per_rank} {padded // tensor} a rank")
    if args.num_experts:
        ranks = args.expert_model_parallel_size
        lines.append(
            f"{args.num_experts} experts / {ranks} expert ranks = {args.num_experts // ranks} a "
            f"rank, each over {args.expert_tensor_parallel_size} expert-tensor ranks"
        )
    if args.context_parallel_size > 1:
        ranks = args.context_parallel_size
        lines.append(
            f"sequence {args.seq_length} / {ranks} context ranks = {args.seq_length // ranks} a "
            "rank, in two pieces"
        )
    if args.sequence_parallel:
        part = args.seq_length // args.context_parallel_size
        lines.append(
            f"sequence {part} {per_rank} {part // tensor} a rank between the tensor-parallel "
            "linears (sequence parallelism)"
        )
    return lines + _batches(args)


def _layers(args: argparse.Namespace, stages: list[StageHolding]) -> str:
    sizes = [len(chunk.layers) for stage in stages for chunk in stage.chunks]
    ranks, virtual = len(stages), len(stages[0].chunks)
    parts = f"{ranks} pipeline stages" + (f" x {virtual} virtual stages" if virtual > 1 else "")
    if len(set(sizes)) == 1:
        return f"{args.num_layers} layers = {parts} x {sizes[0]}"
    held = ", ".join(f"{count} of {size}" for size, count in sorted(Counter(sizes).items()))
    return f"{args.num_layers} layers over {parts}, unevenly: {held} layers"


def _batches(args: argparse.Namespace) -> list[str]:
    from megatron.core.num_microbatches_calculator import (
        get_current_running_global_batch_size,
        get_num_microbatches,
    )

    micro = get_num_microbatches()
    first = " (the first of the schedule)" if args.step_batch_size_schedule else ""
    lines = [
        f"global batch {get_current_running_global_batch_size()}{first} = {args.data_parallel_size}"
        f" data ranks x micro batch {args.micro_batch_size} x {micro} micro-batches"
    ]
    ranks = args.pipeline_model_parallel_size
    if ranks > 1:
        virtual = args.virtual_pipeline_model_parallel_size or 1
        idle = (ranks - 1) / (virtual * micro + ranks - 1)
        lines.append(
            f"{micro} micro-batches over {ranks} pipeline stages: {100 * idle:.0f}% of a step is "
            "waiting (the pipeline's bubble)"
        )
    return lines


def layout_warnings(args: argparse.Namespace, groups: WorldGroups, gpus_per_node: int) -> list[str]:
    """Find what works on paper and not well on the machines.

    Args:
        args: Validated by Megatron.
        groups: The process groups of every rank.
        gpus_per_node: Ranks per node.
    """
    if args.world_size <= gpus_per_node:
        return []
    warnings = []
    if args.world_size % gpus_per_node:
        warnings.append(
            f"{args.world_size} ranks do not fill nodes of {gpus_per_node} GPUs (--gpus-per-node)"
        )
    torn = sum(
        len({rank // gpus_per_node for rank in group}) > 1 for group in groups.of_kind("tensor")
    )
    if torn:
        warnings.append(
            f"{torn} of {len(groups.of_kind('tensor'))} tensor-parallel groups span nodes of "
            f"{gpus_per_node} GPUs: every layer waits for the network between them"
        )
    return warnings
