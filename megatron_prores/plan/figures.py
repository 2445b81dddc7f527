"""Turns what was found into the parts of a plan. Imports Megatron."""

from __future__ import annotations

import argparse
import dataclasses
import math
from typing import Any

from megatron.core import num_microbatches_calculator
from megatron.training import global_vars

from megatron_prores.config import ProResConfig
from megatron_prores.plan import memory
from megatron_prores.plan.groups import WorldGroups
from megatron_prores.plan.holding import StageHolding
from megatron_prores.plan.model import Chunk, ParameterCount
from megatron_prores.plan.result import LayerPlan
from megatron_prores.schedule.timeline import Timeline
from megatron_prores.warmup.audit import RankReport, layer_map

_COLUMNS = 400
"""Steps at which alpha is drawn."""


def layout_of(args: argparse.Namespace) -> dict[str, int]:
    """Count the ranks along each kind of parallelism."""
    return {
        "tensor": args.tensor_model_parallel_size,
        "pipeline": args.pipeline_model_parallel_size,
        "virtual": args.virtual_pipeline_model_parallel_size or 1,
        "context": args.context_parallel_size,
        "data": args.data_parallel_size,
        "expert": args.expert_model_parallel_size,
        "expert_tensor": args.expert_tensor_parallel_size,
    }


def model_of(args: argparse.Namespace, prores: ProResConfig) -> dict[str, Any]:
    """Tell the sizes of the model, its norms, initial weights and precision."""
    return {
        "layers": args.num_layers,
        "hidden_size": args.hidden_size,
        "ffn_hidden_size": args.ffn_hidden_size,
        "attention_heads": args.num_attention_heads,
        "sequence_length": args.seq_length,
        "padded_vocab_size": args.padded_vocab_size,
        "norm_placement": prores.norm_placement,
        "branch_init": prores.initialization,
        "experts": args.num_experts,
        "precision": _precision(args),
    }


def _precision(args: argparse.Namespace) -> str:
    base = "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32"
    low = [f"{name} ({value})" for name in ("fp8", "fp4") if (value := getattr(args, name))]
    return " + ".join([base, *low])


def parameters_of(
    args: argparse.Namespace, total: int, held: list[ParameterCount]
) -> dict[str, Any]:
    """Tell the parameters in total, and of a rank of each pipeline stage."""
    padding = max(0, args.padded_vocab_size - global_vars.get_tokenizer().vocab_size)
    matrices = 2 if args.untie_embeddings_and_output_weights else 1
    return {
        "total": total,
        "unpadded": total - matrices * padding * args.hidden_size,
        "per_rank": [each.total for each in held],
        "per_rank_experts": [each.expert for each in held],
    }


def chunk_of(chunk: Chunk, groups: WorldGroups, layers: list[LayerPlan]) -> dict[str, Any]:
    """Tell what one pipeline and virtual stage holds."""
    opens = [layer.opens_after_step for layer in layers if layer.layer in chunk.layers]
    return {
        "stage": chunk.stage,
        "virtual_stage": chunk.virtual_stage,
        "layers": list(chunk.layers),
        "embedding": chunk.embedding,
        "output": chunk.output,
        "prediction_layers": chunk.prediction_layers,
        "parameters": chunk.parameters.total,
        "ranks": sum(1 for _ in groups.pipelines),
        "example_rank": groups.pipelines[0][chunk.stage],
        "opens_after_steps": opens,
    }


def layers_of(
    stages: list[StageHolding], timeline: Timeline, openings: list[int | None]
) -> list[LayerPlan]:
    """Tell of every layer where it is, and when it opens: steps, samples, tokens."""
    plans = []
    for stage in stages:
        for chunk in stage.chunks:
            for layer in chunk.layers:
                step = openings[layer - 1]
                plans.append(
                    LayerPlan(
                        layer=layer,
                        stage=chunk.stage,
                        virtual_stage=chunk.virtual_stage,
                        opens_after_step=step,
                        opens_after_samples=None if step is None else timeline.samples_at(step),
                        opens_after_tokens=None if step is None else timeline.tokens_at(step),
                        opens_in_training=step is not None and step <= timeline.steps,
                    )
                )
    return sorted(plans, key=lambda plan: plan.layer)


def layer_map_of(reports: list[RankReport], prores: ProResConfig, num_layers: int) -> str:
    """Draw the map of layers that a run logs at its start."""
    if not prores.enabled:
        return layer_map(reports, [0] * num_layers)
    return layer_map(reports, prores.opening_steps(num_layers), prores.unit)


def training_of(args: argparse.Namespace, timeline: Timeline) -> dict[str, Any]:
    """Tell batch, steps, samples, tokens, and the learning rate."""
    first = timeline.phases[0].batch_size
    return {
        "steps": timeline.steps,
        "samples": timeline.samples,
        "tokens": timeline.tokens,
        "micro_batch_size": args.micro_batch_size,
        "global_batch_size": args.global_batch_size,
        "tokens_per_step": first * args.seq_length,
        "batch_phases": [dataclasses.asdict(phase) for phase in timeline.phases],
        "learning_rate": args.lr,
        "min_learning_rate": args.min_lr,
        "learning_rate_style": args.lr_decay_style,
        "learning_rate_warmup_steps": args.lr_warmup_iters,
        "eval_interval": args.eval_interval,
        "save_interval": args.save_interval if args.save else None,
    }


def warmup_of(
    prores: ProResConfig, num_layers: int, openings: list[int | None], timeline: Timeline
) -> dict[str, Any]:
    """Tell the length of the warmup, and the steps between which layers open."""
    if not prores.enabled:
        return {"schedule": prores.schedule, "length": None, "unit": None}
    length = prores.total_warmup(num_layers)
    return {
        "schedule": prores.schedule,
        "length": length,
        "unit": prores.unit,
        "first_open_step": min((step for step in openings if step is not None), default=None),
        "all_open_step": None if None in openings else max(filter(None, openings), default=0),
    }


def curves_of(
    prores: ProResConfig, num_layers: int, openings: list[int | None], timeline: Timeline
) -> dict[str, Any]:
    """Sample alpha until the last layer has opened, or over the whole training if none does."""
    last = max((step for step in openings if step), default=0)
    end = math.ceil(1.04 * last) or timeline.steps
    steps = [end * column // _COLUMNS for column in range(_COLUMNS)] if end else [0]
    samples = prores.unit == "samples"
    alphas = [
        prores.alphas(timeline.samples_at(step) if samples else step, num_layers).tolist()
        if prores.enabled
        else [1.0] * num_layers
        for step in steps
    ]
    return {"steps": steps, "alphas": alphas}


def memory_of(args: argparse.Namespace, held: list[ParameterCount]) -> dict[str, Any]:
    """Estimate the bytes of the ranks of each stage."""
    micro = num_microbatches_calculator.get_num_microbatches()
    found = memory.estimate(args, held, micro)
    return {
        **dataclasses.asdict(found),
        "fullest_stage": found.fullest.stage,
        "fullest_total": found.fullest.total + found.upstream_activations,
        "left_out": list(memory.LEFT_OUT),
    }
