"""Puts a plan together. Imported once the device is prepared: it imports Megatron."""

from __future__ import annotations

import argparse
import dataclasses
import io
import logging
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import partial
from typing import Any

from megatron.training import global_vars
from megatron.training.argument_utils import pretrain_cfg_container_from_args

from megatron_prores.command_line.advice import advice
from megatron_prores.command_line.arguments import parse_args, upstream_words
from megatron_prores.config.prores_config import ProResConfig
from megatron_prores.errors import UserError
from megatron_prores.launch.gpu_flags import Setup, missing
from megatron_prores.plan.data import data_warnings, drawn, prepare_cache
from megatron_prores.plan.groups import lay_out
from megatron_prores.plan.layout import divisions, layout_warnings
from megatron_prores.plan.memory import estimate
from megatron_prores.plan.result import Plan
from megatron_prores.plan.stages import (
    Chunk,
    Stage,
    audit_world,
    build_stage,
    count_whole_model,
    local_config,
)
from megatron_prores.plan.target import PlannedMachine
from megatron_prores.schedule.depth import depths_of, total_depth
from megatron_prores.schedule.timeline import Timeline, timeline_of
from megatron_prores.training.prores_run import model_config
from megatron_prores.upstream.registry import undone_afterwards
from megatron_prores.warmup.audit import layer_map, table

_TABLE_RANKS = 64
"""A world up to this size has the audit's table in its plan, a line per rank and virtual stage."""

_COLUMNS = 400
"""Steps at which alpha is drawn."""


def build_plan(
    device: str,
    gpus_per_node: int,
    time_limit: float | None,
    seconds_per_step: float | None,
    with_cache: bool,
) -> Plan:
    """Plan the command line in ``sys.argv`` for the world of the environment.

    Args and errors are those of :func:`megatron_prores.plan.planner.make_plan`; ``device`` is the
    run's, "cuda" or "cpu".
    """
    machine = PlannedMachine()
    with _fresh_quiet_megatron() as printed:
        try:
            with machine.known_to_megatron():
                args, prores = parse_args(device, machine)
                config = model_config(args, prores)
                _check_container(args, config, machine)
        except UserError as error:
            if isinstance(error.__cause__, SystemExit):
                said = " ".join(printed.getvalue().split()[-60:])
                raise UserError(f"{error}: {said}") from error
            raise
        machine.note_assumptions(args)
        local = local_config(config, prores)
        depths = depths_of(args)
        num_layers = depths[-1]
        groups, stages = lay_out(args, partial(build_stage, prores, local))
        reports = audit_world(groups["pipeline"], stages, prores, depths)
        chunks = [chunk for stage in stages for chunk in stage.chunks]
        timeline = timeline_of(args)
        unit = "iterations"
        opening_steps: list[int | None] = [0] * num_layers
        if prores.enabled:
            unit, opening_steps = prores.unit, prores.opening_steps(num_layers)
        openings = timeline.steps_at(opening_steps, unit)
        data = drawn(args, timeline.tokens, machine)
        warnings = advice(
            args,
            prores,
            argv=sys.argv[1:],
            seconds_per_step=seconds_per_step,
            time_limit=time_limit,
        ) + layout_warnings(args, groups["tensor"], gpus_per_node)
        warnings += data_warnings(args, data, timeline.tokens)
        tokenizer = global_vars.get_tokenizer()
        cache = prepare_cache(args, tokenizer, machine) if with_cache else None
        return Plan(
            world_size=args.world_size,
            layout=_layout(args),
            groups={
                kind: {"groups": len(found), "ranks": len(found[0])}
                for kind, found in groups.items()
            },
            fits=divisions(args, stages, gpus_per_node),
            model=_model(args, prores),
            parameters=_parameters(args, count_whole_model(args, local), stages),
            stages=[dataclasses.asdict(chunk) for chunk in chunks],
            layers=_layers(chunks, openings, timeline),
            layer_map=layer_map(reports, opening_steps, unit),
            table=table(reports) if args.world_size <= _TABLE_RANKS else None,
            training=_training(args, timeline),
            data=data,
            cache=cache,
            warmup={
                "schedule": prores.schedule,
                "length": prores.total_warmup(num_layers) if prores.enabled else None,
                "unit": prores.unit if prores.enabled else None,
            },
            memory=estimate(args, stages, groups),
            curves=_curves(prores, num_layers, openings, timeline),
            speed=_speed(args, gpus_per_node),
            warnings=warnings,
            notes=machine.notes,
        )


def _check_container(args: argparse.Namespace, config: Any, machine: PlannedMachine) -> None:
    """Let Megatron check the rest of its configuration, as the main program does."""
    try:
        pretrain_cfg_container_from_args(args, config)
    except (AssertionError, ValueError, RuntimeError) as error:
        if not isinstance(error.__context__, ImportError):
            raise UserError(upstream_words(error)) from error
        machine.note(f"not checked, for want of a package: {error}")


@contextmanager
def _fresh_quiet_megatron() -> Iterator[io.StringIO]:
    """Give Megatron's globals a fresh start, and leave them as if nothing had been planned.

    What Megatron prints meanwhile is kept out of the plan.
    """
    printed = io.StringIO()
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    global_vars.unset_global_variables()
    try:
        # model_config wraps functions of the training loop; no run follows.
        with undone_afterwards(), redirect_stdout(printed), redirect_stderr(printed):
            yield printed
    finally:
        global_vars.unset_global_variables()
        logging.disable(disabled)


def _speed(args: argparse.Namespace, gpus_per_node: int) -> list[str]:
    if args.device == "cpu":
        return []
    setup = Setup(
        tensor=args.tensor_model_parallel_size,
        replicas=args.data_parallel_size * args.context_parallel_size,
        gpus_per_node=gpus_per_node,
        bf16=args.bf16,
        transformer_engine=args.transformer_impl == "transformer_engine",
        apex=args.gradient_accumulation_fusion,
    )
    return [f"{choice.flags}: {choice.why}" for choice in missing(setup, sys.argv[1:])]


def _layout(args: argparse.Namespace) -> dict[str, int]:
    return {
        "tensor": args.tensor_model_parallel_size,
        "pipeline": args.pipeline_model_parallel_size,
        "virtual": args.virtual_pipeline_model_parallel_size or 1,
        "context": args.context_parallel_size,
        "data": args.data_parallel_size,
        "expert": args.expert_model_parallel_size,
        "expert_tensor": args.expert_tensor_parallel_size,
    }


def _model(args: argparse.Namespace, prores: ProResConfig) -> dict[str, Any]:
    base = "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32"
    low = [f"{name} ({value})" for name in ("fp8", "fp4") if (value := getattr(args, name))]
    return {
        "layers": total_depth(args),
        "hidden_size": args.hidden_size,
        "ffn_hidden_size": args.ffn_hidden_size,
        "attention_heads": args.num_attention_heads,
        "sequence_length": args.seq_length,
        "padded_vocab_size": args.padded_vocab_size,
        "norm_placement": prores.norm_placement,
        "branch_init": prores.initialization,
        "experts": args.num_experts,
        "precision": " + ".join([base, *low]),
    }


def _parameters(args: argparse.Namespace, total: int, stages: list[Stage]) -> dict[str, Any]:
    padding = max(0, args.padded_vocab_size - global_vars.get_tokenizer().vocab_size)
    matrices = 2 if args.untie_embeddings_and_output_weights else 1
    return {
        "total": total,
        "unpadded": total - matrices * padding * args.hidden_size,
        "per_rank": [stage.parameters for stage in stages],
        "per_rank_experts": [stage.expert_parameters for stage in stages],
    }


def _layers(
    chunks: list[Chunk], openings: list[int | None], timeline: Timeline
) -> list[dict[str, Any]]:
    chunk_of = {layer: chunk for chunk in chunks for layer in chunk.layers}
    return [
        {
            "layer": layer,
            "stage": chunk_of[layer].stage,
            "virtual_stage": chunk_of[layer].virtual_stage,
            "opens_after_step": step,
            "opens_after_samples": None if step is None else timeline.samples_at(step),
            "opens_after_tokens": None if step is None else timeline.tokens_at(step),
            "opens_in_training": step is not None and step <= timeline.steps,
        }
        for layer, step in enumerate(openings, 1)
    ]


def _training(args: argparse.Namespace, timeline: Timeline) -> dict[str, Any]:
    return {
        "steps": timeline.steps,
        "samples": timeline.samples,
        "tokens": timeline.tokens,
        "micro_batch_size": args.micro_batch_size,
        "global_batch_size": args.global_batch_size,
        "tokens_per_step": timeline.phases[0].batch_size * args.seq_length,
        "batch_phases": [dataclasses.asdict(phase) for phase in timeline.phases],
        "learning_rate": args.lr,
        "min_learning_rate": args.min_lr,
        "learning_rate_style": args.lr_decay_style,
        "learning_rate_warmup_steps": args.lr_warmup_iters,
        "eval_interval": args.eval_interval,
        "save_interval": args.save_interval if args.save else None,
    }


def _curves(
    prores: ProResConfig, num_layers: int, openings: list[int | None], timeline: Timeline
) -> dict[str, Any]:
    """Sample alpha until the last layer has opened, or over the whole training if none does."""
    last = max((step for step in openings if step), default=0)
    end = math.ceil(1.04 * last) or timeline.steps
    steps = [end * column // _COLUMNS for column in range(_COLUMNS)] if end else [0]
    if not prores.enabled:
        return {"steps": steps, "alphas": [[1.0] * num_layers for _ in steps]}
    count = timeline.samples_at if prores.unit == "samples" else int
    alphas = [prores.alphas(count(step), num_layers).tolist() for step in steps]
    return {"steps": steps, "alphas": alphas}
