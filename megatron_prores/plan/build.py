"""Puts a plan together. Imported once the device is prepared: it imports Megatron."""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from megatron.training import global_vars
from megatron.training.argument_utils import pretrain_cfg_container_from_args

from megatron_prores.command_line.advice import advice
from megatron_prores.command_line.arguments import parse_args, upstream_words
from megatron_prores.config import ProResConfig
from megatron_prores.errors import UserError
from megatron_prores.plan.elsewhere import (
    ASSUMED_CAPABILITY,
    ASSUMED_TE,
    Notes,
    target_machine,
)
from megatron_prores.plan.figures import (
    chunk_of,
    curves_of,
    layer_map_of,
    layers_of,
    layout_of,
    memory_of,
    model_of,
    parameters_of,
    training_of,
    warmup_of,
)
from megatron_prores.plan.fits import divisions, layout_warnings
from megatron_prores.plan.groups import GROUPS, WorldGroups, lay_out, playing
from megatron_prores.plan.holding import StageHolding, audit_world, hold
from megatron_prores.plan.model import (
    ParameterCount,
    build_chunks,
    count,
    describe,
    local_config,
)
from megatron_prores.plan.result import TABLE_RANKS, Plan
from megatron_prores.schedule.timeline import timeline_of
from megatron_prores.training.prores_run import model_config
from megatron_prores.upstream.registry import undone_afterwards
from megatron_prores.warmup.audit import RankReport, table


def build_plan(
    device_name: str,
    *,
    gpus_per_node: int,
    time_limit: float | None,
    seconds_per_step: float | None,
) -> Plan:
    """Plan the command line in ``sys.argv`` for the world of the environment.

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
            openings = timeline.steps_at(prores.opening_steps(args.num_layers), prores.unit)
        held = [sum((c.parameters for c in each.chunks), ParameterCount()) for each in stages]
        layers = layers_of(stages, timeline, openings)
        return Plan(
            world_size=args.world_size,
            layout=layout_of(args),
            groups={
                kind: {"groups": len(found), "ranks": len(found[0])}
                for kind in GROUPS
                if (found := groups.of_kind(kind))
            },
            ranks_played=list(groups.played),
            fits=divisions(args, stages, gpus_per_node),
            model=model_of(args, prores),
            parameters=parameters_of(args, _whole_model(args, local), held),
            stages=[chunk_of(chunk, groups, layers) for each in stages for chunk in each.chunks],
            layers=layers,
            layer_map=layer_map_of(reports, prores, args.num_layers),
            table=table(reports) if args.world_size <= TABLE_RANKS else None,
            training=training_of(args, timeline),
            warmup=warmup_of(prores, args.num_layers, openings, timeline),
            memory=memory_of(args, held),
            curves=curves_of(prores, args.num_layers, openings, timeline),
            warnings=[
                *advice(
                    args,
                    prores,
                    argv=sys.argv[1:],
                    seconds_per_step=seconds_per_step,
                    time_limit=time_limit,
                ),
                *layout_warnings(args, groups, gpus_per_node),
            ],
            notes=list(notes),
        )


def _try_container(args: argparse.Namespace, config: Any, notes: Notes) -> None:
    """Let Megatron check the rest of its configuration, as the main program does."""
    try:
        pretrain_cfg_container_from_args(args, config)
    except (AssertionError, ValueError, RuntimeError) as error:
        if isinstance(error.__context__, ImportError):
            notes.add(f"not checked, for want of a package: {error}")
            return
        raise UserError(upstream_words(error)) from error


@contextmanager
def _megatron_as_new() -> Iterator[None]:
    """Give Megatron's globals a fresh start, and leave them as if nothing had been planned."""
    global_vars.unset_global_variables()
    try:
        # model_config wraps functions of the training loop; no run follows.
        with undone_afterwards():
            yield
    finally:
        global_vars.unset_global_variables()


@contextmanager
def _quiet() -> Iterator[io.StringIO]:
    """Keep what Megatron prints while it parses and build out of the plan."""
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
    """Audit every rank in the middle of the warmup and at its start.

    Returns:
        The reports of the start, as a run would make them.
    """
    if prores.enabled:
        # At the start all alphas may be alike: a swapped layer shows where they differ.
        middle = prores.total_warmup(args.num_layers) // 2
        audit_world(groups, stages, prores, args.num_layers, middle)
    return audit_world(groups, stages, prores, args.num_layers, 0)


def _whole_model(args: argparse.Namespace, config: Any) -> int:
    """Count the parameters of the model on one rank: nothing is cut, nothing is there twice."""
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
