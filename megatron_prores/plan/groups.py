"""The process groups of every rank, laid out by Megatron's own code on torch's fake process group.

On a cluster every rank makes the groups of all ranks, in the same order, and keeps those that it is
in. One call of ``parallel_state.initialize_model_parallel`` as one rank therefore tells the groups
of every rank. Here it is called as one rank of every pipeline stage and as the last rank of the
world. What the calls make must be the same, group by group (else a real job would hang); every kind
of group must hold each rank once; and what Megatron then answers on those ranks must be what the
list of groups says.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from megatron_prores.errors import StopRun, UserError
from megatron_prores.upstream.registry import undone_afterwards, wrap

_KINDS = {
    "tensor": ("TENSOR_MODEL_PARALLEL_GROUP", "tp"),
    "pipeline": ("PIPELINE_MODEL_PARALLEL_GROUP", "pp"),
    "context": ("CONTEXT_PARALLEL_GROUP", "cp"),
    "data": ("DATA_PARALLEL_GROUP", "dp"),
    "data x context": ("DATA_PARALLEL_GROUP_WITH_CP", "dp_cp"),
    "tensor x pipeline": ("MODEL_PARALLEL_GROUP", "mp"),
    "expert": ("EXPERT_MODEL_PARALLEL_GROUP", "ep"),
    "expert tensor": ("EXPERT_TENSOR_PARALLEL_GROUP", "expt_tp"),
    "expert data": ("EXPERT_DATA_PARALLEL_GROUP", "expt_dp"),
}
"""The kinds of groups that a plan lists: Megatron's description of them, and their name in its
``ProcessGroupCollection``."""

_NOT_FOR_EVERY_RANK = ("EMBEDDING_GROUP", "POSITION_EMBEDDING_GROUP")

Groups = dict[str, list[list[int]]]
"""Kind -> the groups of that kind, in the order in which they are made."""


class LayoutError(StopRun):
    """Megatron's groups do not fit together: a fault of the layout that no flag check has found."""


def lay_out[T](args: argparse.Namespace, at_stage: Callable[[int], T]) -> tuple[Groups, list[T]]:
    """Make the groups of every rank, and call back as one rank of every pipeline stage.

    Args:
        args: Megatron's validated arguments; ``world_size`` is the planned one.
        at_stage: Called with a pipeline stage while Megatron's parallel state is that of its rank
            in the first pipeline.

    Returns:
        The groups, and what the calls have returned, stage by stage.

    Raises:
        LayoutError: The groups do not fit together.
    """
    with as_rank(args, 0) as groups:
        _check_partition(groups, args.world_size)
        _check_own_groups(groups, 0)
        found = {kind: groups[name] for kind, (name, _) in _KINDS.items()}
        pipeline = found["pipeline"][0]
        if pipeline[0] != 0:
            raise LayoutError(f"rank 0 is not the first of its pipeline {pipeline}")
        stages = [at_stage(0)]
    last = args.world_size - 1
    for rank in [*pipeline[1:], *([last] if last not in pipeline else [])]:
        with as_rank(args, rank) as made:
            _check_same(groups, made, rank)
            _check_own_groups(groups, rank)
            if rank in pipeline:
                stages.append(at_stage(pipeline.index(rank)))
    return found, stages


@contextmanager
def as_rank(args: argparse.Namespace, rank: int) -> Iterator[Groups]:
    """Let Megatron set up its parallel state as one rank of the planned world.

    Args:
        args: Megatron's validated arguments.
        rank: The rank to be.

    Yields:
        All groups that Megatron has made, by its description of them.

    Raises:
        UserError: Megatron refuses to make them, or lacks a package for it.
    """
    import torch
    from megatron.core import parallel_state
    from megatron.training import global_vars, initialize

    made: Groups = {}

    def create_group(stock: Callable[..., Any], named: dict[str, Any]) -> Any:
        made.setdefault(named["group_desc"], []).append(list(named["ranks"]))
        # Also those that are made on gloo: there is nobody to connect to.
        return stock(backend=None, pg_options=None)

    real = args.rank, args.fake_process_group
    args.rank, args.fake_process_group = rank, True
    planned = global_vars.get_args()
    global_vars.set_args(args)
    try:
        try:
            with undone_afterwards():
                needs = ("ranks", "group_desc", "backend", "pg_options")
                wrap(parallel_state, "create_group", needs, create_group)
                initialize._initialize_distributed(None, None, None)
        except (AssertionError, ImportError, RuntimeError) as error:
            raise UserError(f"Megatron cannot make these process groups here: {error}") from error
        yield made
    finally:
        args.rank, args.fake_process_group = real
        global_vars.set_args(planned)
        parallel_state.destroy_model_parallel()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _check_partition(groups: Groups, world_size: int) -> None:
    everyone = list(range(world_size))
    for kind, members in groups.items():
        ranks = sorted(rank for group in members for rank in group)
        if kind not in _NOT_FOR_EVERY_RANK and ranks != everyone:
            raise LayoutError(f"the groups {kind} do not hold every rank once")


def _check_same(groups: Groups, made: Groups, rank: int) -> None:
    if made != groups:
        kinds = [kind for kind in groups if made.get(kind) != groups[kind]]
        raise LayoutError(f"rank {rank} makes other groups than rank 0: {', '.join(kinds)}")


def _check_own_groups(groups: Groups, rank: int) -> None:
    """Compare the list of groups with what Megatron answers on this rank."""
    import torch
    from megatron.core.process_groups_config import ProcessGroupCollection

    own = ProcessGroupCollection.use_mpu_process_groups()
    for kind, (name, attribute) in _KINDS.items():
        answer = torch.distributed.get_process_group_ranks(getattr(own, attribute))
        listed = next(ranks for ranks in groups[name] if rank in ranks)
        if answer != listed:
            raise LayoutError(f"rank {rank}: its {kind} group is {answer}, not {listed}")
