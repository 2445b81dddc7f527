"""How the layout divides ranks, layers, widths and batch, every division in words."""

from __future__ import annotations

import argparse
from collections import Counter

from megatron.core.num_microbatches_calculator import (
    get_current_running_global_batch_size,
    get_num_microbatches,
)

from megatron_prores.plan.stages import Stage
from megatron_prores.schedule.depth import total_depth


def divisions(args: argparse.Namespace, stages: list[Stage], gpus_per_node: int) -> list[str]:
    """Write every division of an accepted layout; Megatron and our checks have refused all others.

    Args:
        args: Validated by Megatron.
        stages: What a rank of each pipeline stage holds.
        gpus_per_node: Ranks per node.
    """
    tensor, context = args.tensor_model_parallel_size, args.context_parallel_size
    per_rank = f"/ {tensor} tensor ranks ="

    def share(name: str, size: int) -> str:
        return f"{name} {per_rank} {size // tensor} a rank"

    lines = [
        f"{args.world_size} ranks = {tensor} tensor x {args.pipeline_model_parallel_size} pipeline "
        f"x {context} context x {args.data_parallel_size} data"
    ]
    nodes, odd = divmod(args.world_size, gpus_per_node)
    if nodes and not odd:
        lines.append(f"{args.world_size} ranks = {nodes} nodes x {gpus_per_node}")
    heads, feed_forward = args.num_attention_heads, args.ffn_hidden_size
    lines += [_layers(args, stages), share(f"{heads} attention heads", heads)]
    if args.group_query_attention:
        groups = args.num_query_groups
        shared = f"{groups // tensor} a rank" if groups >= tensor else "shared by several ranks"
        lines.append(f"{groups} query groups {per_rank} {shared}")
    vocabulary = args.padded_vocab_size
    lines.append(share(f"feed-forward {feed_forward}", feed_forward))
    lines.append(share(f"vocabulary {vocabulary}, with padding,", vocabulary))
    if args.num_experts:
        ranks = args.expert_model_parallel_size
        lines.append(
            f"{args.num_experts} experts / {ranks} expert ranks = {args.num_experts // ranks} a "
            f"rank, each over {args.expert_tensor_parallel_size} expert-tensor ranks"
        )
    part = args.seq_length // context
    if context > 1:
        lines.append(
            f"sequence {args.seq_length} / {context} context ranks = {part} a rank, in two pieces"
        )
    if args.sequence_parallel:
        between = "between the tensor-parallel linears (sequence parallelism)"
        lines.append(f"{share(f'sequence {part}', part)} {between}")
    return lines + _batches(args)


def _layers(args: argparse.Namespace, stages: list[Stage]) -> str:
    sizes = [len(chunk.numbers) for stage in stages for chunk in stage.chunks]
    ranks, virtual = len(stages), len(stages[0].chunks)
    parts = f"{ranks} pipeline stages" + (f" x {virtual} virtual stages" if virtual > 1 else "")
    layers = f"{args.num_layers} layers"
    if args.hybrid_layer_pattern is not None:
        layers += f" of the pattern (L = {total_depth(args)})"
    if len(set(sizes)) == 1:
        return f"{layers} = {parts} x {sizes[0]}"
    held = ", ".join(f"{count} of {size}" for size, count in sorted(Counter(sizes).items()))
    return f"{layers} over {parts}, unevenly: {held} layers"


def _batches(args: argparse.Namespace) -> list[str]:
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


def layout_warnings(
    args: argparse.Namespace, tensor_groups: list[list[int]], gpus_per_node: int
) -> list[str]:
    """Find what works on paper and not well on the machines.

    Args:
        args: Validated by Megatron.
        tensor_groups: The tensor-parallel groups of all ranks.
        gpus_per_node: Ranks per node.
    """
    if args.world_size <= gpus_per_node:
        return []
    warnings = []
    if args.world_size % gpus_per_node:
        warnings.append(
            f"{args.world_size} ranks do not fill nodes of {gpus_per_node} GPUs (--gpus-per-node)"
        )
    torn = sum(len({rank // gpus_per_node for rank in group}) > 1 for group in tensor_groups)
    if torn:
        warnings.append(
            f"{torn} of {len(tensor_groups)} tensor-parallel groups span nodes of {gpus_per_node} "
            "GPUs: every layer waits for the network between them"
        )
    return warnings
