"""From a command line and a world size to a plan."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from megatron_prores.command_line.arguments import read_prores_flags
from megatron_prores.command_line.device import prepare
from megatron_prores.config.flags import told_in_flags
from megatron_prores.plan.result import Plan
from megatron_prores.system.environment import check_environment

MAIN_PROGRAM = "pretrain_gpt_prores.py"


def make_plan(
    argv: Sequence[str],
    world_size: int,
    *,
    gpus_per_node: int = 8,
    time_limit: float | None = None,
    seconds_per_step: float | None = None,
    with_cache: bool = False,
) -> Plan:
    """Plan a run without starting it. Needs no GPU and writes nothing but the cache, if asked.

    Sets this process up for the CPU device, for good, unless Megatron has been imported on it.

    Args:
        argv: The command line of the main program, without its name.
        world_size: Ranks (GPUs) of the job.
        gpus_per_node: Ranks per node.
        time_limit: Seconds that the job may run.
        seconds_per_step: What a step takes, where that is known.
        with_cache: Build Megatron's indices of the datasets, too.

    Returns:
        The plan.

    Raises:
        UserError: The main program would refuse the command line; the words are its own.
        StopRun: The layers or process groups do not fit together.
    """
    with told_in_flags(), _as_rank_0(argv, world_size, min(gpus_per_node, world_size)):
        check_environment(os.environ)
        _, device = read_prores_flags(argv)
        # Whatever the run's device: the planner's is the CPU.
        prepare("cpu")
        from megatron_prores.plan.build import build_plan

        return build_plan(device, gpus_per_node, time_limit, seconds_per_step, with_cache)


@contextmanager
def _as_rank_0(argv: Sequence[str], world_size: int, gpus_per_node: int) -> Iterator[None]:
    """Make this process look like rank 0 of the job, for as long as it plans."""
    # The run's launcher sets it; else what Megatron asks of such a run on Hopper.
    sharded = {"--use-torch-fsdp2", "--use-megatron-fsdp"} & set(argv)
    connections = os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS", "32" if sharded else "1")
    variables = {
        "RANK": "0",
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": str(gpus_per_node),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
        "CUDA_DEVICE_MAX_CONNECTIONS": connections,
    }
    before, words = {name: os.environ.get(name) for name in variables}, sys.argv
    os.environ.update(variables)
    sys.argv = [MAIN_PROGRAM, *argv]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        sys.argv = words
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
