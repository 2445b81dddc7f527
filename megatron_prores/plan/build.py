"""Puts a plan together. Imported once the device is prepared: it imports Megatron."""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import io
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from megatron.core import num_microbatches_calculator
from megatron.training import global_vars, training
from megatron.training.argument_utils import pretrain_cfg_container_from_args

from megatron_prores.audit import RankReport, layer_map, table
from megatron_prores.config import ProResConfig
from megatron_prores.errors import UserError
from megatron_prores.flags.advice import advice
from megatron_prores.flags.arguments import parse_args
from megatron_prores.plan import memory
from megatron_prores.plan.elsewhere import (
    ASSUMED_CAPABILITY,
    ASSUMED_TE,
    Notes,
    replaced,
    target_machine,
)
from megatron_prores.plan.fits import divisions, layout_warnings
from megatron_prores.plan.groups import GROUPS, WorldGroups, lay_out, playing
from megatron_prores.plan.holding import StageHolding, audit_world, hold
from megatron_prores.plan.model import (
    Chunk,
    ParameterCount,
    build_chunks,
    count,
    describe,
    local_config,
)
from megatron_prores.plan.result import TABLE_RANKS, LayerPlan, Plan
from megatron_prores.timeline import Timeline, timeline_of
from megatron_prores.training import model_config

_COLUMNS = 400
"""Steps at which alpha is drawn."""


def build_plan(
    device_name: str,
    *,
    gpus_per_node: int,
    time_limit: float | None,
    seconds_per_step: float | None,
) -> Plan:
    """Plans the command line in ``sys.argv`` for the world of the environment.

    Args:
        device_name: The run's device, "cuda" or "cpu".
        gpus_per_node: Ranks per node.
        time_limit: Seconds that the job may run.
        seconds_per_step: What a step takes, where that is known.

    Raises:
        UserError: The main program would refuse the command line.
        StopRun: The layers or process groups do not fit together.
    """
    notes = Notes()
    with _megatron_as_new(), _quiet() as said:
        try:
            with target_machine(notes):
                args, prores = parse_args(device_name)
                config = model_config(args, prores)
                _try_container(args, config, notes)
        except UserError as error:
            if isinstance(error.__cause__, SystemExit):
                raise UserError(f"{error}: {' '.join(said.getvalue().split()[-60:])}") from error
            raise
        _note_assumptions(args, device_name, notes)
        local = local_config(config)
        stages: list[StageHolding] = []

        def at_stage(rank: int, stage: int) -> None:
            chunks = build_chunks(local)
            stages.append(hold(prores, args.num_layers, chunks, describe(chunks, stage)))

        groups = lay_out(args, at_stage)
        reports = _audit(args, prores, groups, stages)
        timeline = timeline_of(args)
        openings: list[int | None] = [0] * args.num_layers
        if prores.enabled:
            openings = timeline.opening_steps(prores, args.num_layers)
        held = [sum((c.parameters for c in each.chunks), ParameterCount()) for each in stages]
        layers = _layers(stages, timeline, openings)
        return Plan(
            world_size=args.world_size,
            layout=_layout(args),
            groups={
                kind: {"groups": len(found), "ranks": len(found[0])}
                for kind in GROUPS
                if (found := groups.of_kind(kind))
            },
            ranks_played=list(groups.played),
            fits=divisions(args, stages, gpus_per_node),
            model=_model(args, prores),
            parameters=_parameters(args, _whole_model(args, local), held),
            stages=[_chunk(chunk, groups, layers) for each in stages for chunk in each.chunks],
            layers=layers,
            layer_map=_layer_map(reports, prores, args.num_layers),
            table=table(reports) if args.world_size <= TABLE_RANKS else None,
            training=_training(args, timeline),
            warmup=_warmup(prores, args.num_layers, openings, timeline),
            memory=_memory(args, held),
            curves=_curves(prores, args.num_layers, openings, timeline),
            warnings=[
                *advice(args, prores, seconds_per_step=seconds_per_step, time_limit=time_limit),
                *layout_warnings(args, groups, gpus_per_node),
            ],
            notes=list(notes),
        )


def _try_container(args: argparse.Namespace, config: Any, notes: Notes) -> None:
    """Lets Megatron check the rest of its configuration, as the main program does."""
    try:
        pretrain_cfg_container_from_args(args, config)
    except (AssertionError, ValueError, RuntimeError) as error:
        if isinstance(error.__context__, ImportError):
            notes.add(f"not checked, for want of a package: {error}")
            return
        raise UserError(f"Megatron refuses these flags: {error}") from error


@contextmanager
def _megatron_as_new() -> Iterator[None]:
    """Gives Megatron's globals a fresh start, and leaves them as if nothing had been planned."""
    wrapped = (
        "train_step",
        "evaluate_and_print_results",
        "training_log",
        "get_megatron_optimizer_config",
    )
    global_vars.unset_global_variables()
    try:
        # model_config puts its hooks there; no run follows.
        with replaced(training, **{name: getattr(training, name) for name in wrapped}):
            yield
    finally:
        global_vars.unset_global_variables()


@contextmanager
def _quiet() -> Iterator[io.StringIO]:
    """Keeps what Megatron prints while it parses and builds out of the plan."""
    said = io.StringIO()
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            yield said
    finally:
        logging.disable(before)


def _note_assumptions(args: argparse.Namespace, device_name: str, notes: Notes) -> None:
    if device_name == "cpu":
        return
    if args.transformer_impl == "transformer_engine":
        notes.add(
            "the model was built from Megatron's local spec: layer numbers and parameter counts "
            "are those of Transformer Engine's"
        )
    if args.tensor_model_parallel_size > 1 or args.context_parallel_size > 1:
        notes.add("CUDA_DEVICE_MAX_CONNECTIONS=1 must be set there (GPUs before Blackwell)")
    notes.add(
        f"taken as given: GPUs of compute capability {'.'.join(map(str, ASSUMED_CAPABILITY))} "
        f"(Hopper), Transformer Engine {ASSUMED_TE} or newer; the GPUs themselves were not looked "
        "at"
    )


def _audit(
    args: argparse.Namespace,
    prores: ProResConfig,
    groups: WorldGroups,
    stages: list[StageHolding],
) -> list[RankReport]:
    """Audits every rank in the middle of the warmup and at its start.

    Returns:
        The reports of the start, as a run would make them.
    """
    if prores.enabled:
        # At the start all alphas may be alike: a swapped layer shows where they differ.
        middle = prores.total_warmup(args.num_layers) // 2
        audit_world(groups, stages, prores, args.num_layers, middle)
    return audit_world(groups, stages, prores, args.num_layers, 0)


def _whole_model(args: argparse.Namespace, config: Any) -> int:
    """Counts the parameters of the model on one rank: nothing is cut, nothing is there twice."""
    whole, alone = copy.deepcopy(config), copy.copy(args)
    sizes = {
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "virtual_pipeline_model_parallel_size": None,
        "expert_model_parallel_size": 1,
        "expert_tensor_parallel_size": 1,
        "context_parallel_size": 1,
        "num_layers_in_first_pipeline_stage": None,
        "num_layers_in_last_pipeline_stage": None,
        "pipeline_model_parallel_layout": None,
        "account_for_embedding_in_pipeline_split": False,
        "account_for_loss_in_pipeline_split": False,
        "mtp_standalone": False,
    }
    for name, value in sizes.items():
        if name in vars(whole.transformer):
            setattr(whole.transformer, name, value)
        if name in vars(alone):
            setattr(alone, name, value)
    alone.world_size = alone.data_parallel_size = alone.num_distributed_optimizer_instances = 1
    alone.hierarchical_context_parallel_sizes = None
    with playing(alone, 0):
        return sum(count(chunk).total for chunk in build_chunks(whole))


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


def _parameters(args: argparse.Namespace, total: int, held: list[ParameterCount]) -> dict[str, Any]:
    padding = max(0, args.padded_vocab_size - global_vars.get_tokenizer().vocab_size)
    matrices = 2 if args.untie_embeddings_and_output_weights else 1
    return {
        "total": total,
        "unpadded": total - matrices * padding * args.hidden_size,
        "per_rank": [each.total for each in held],
        "per_rank_experts": [each.expert for each in held],
    }


def _chunk(chunk: Chunk, groups: WorldGroups, layers: list[LayerPlan]) -> dict[str, Any]:
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


def _layers(
    stages: list[StageHolding], timeline: Timeline, openings: list[int | None]
) -> list[LayerPlan]:
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


def _layer_map(reports: list[RankReport], prores: ProResConfig, num_layers: int) -> str:
    if not prores.enabled:
        return layer_map(reports, [0] * num_layers)
    return layer_map(reports, prores.opening_steps(num_layers), prores.unit)


def _training(args: argparse.Namespace, timeline: Timeline) -> dict[str, Any]:
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


def _warmup(
    prores: ProResConfig, num_layers: int, openings: list[int | None], timeline: Timeline
) -> dict[str, Any]:
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


def _curves(
    prores: ProResConfig, num_layers: int, openings: list[int | None], timeline: Timeline
) -> dict[str, Any]:
    """Samples alpha until the last layer has opened, or over the whole training if none does."""
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


def _memory(args: argparse.Namespace, held: list[ParameterCount]) -> dict[str, Any]:
    micro = num_microbatches_calculator.get_num_microbatches()
    found = memory.estimate(args, held, micro)
    return {
        **dataclasses.asdict(found),
        "fullest_stage": found.fullest.stage,
        "fullest_total": found.fullest.total + found.upstream_activations,
        "left_out": list(memory.LEFT_OUT),
    }
