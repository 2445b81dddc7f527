"""The process groups of every rank, laid out by Megatron's own code on torch's fake process group.

On a cluster every rank makes the groups of all ranks, in the same order, and keeps those that it is
in: ``parallel_state.initialize_model_parallel`` is written so. One call of it as one rank therefore
tells the groups of every rank of the job. Here it is called once per pipeline stage, as the ranks
of the first pipeline, and once as the last rank of the world. What the calls make must be the same,
group by group (else a real job would hang); every kind of group must hold each rank once; and what
Megatron then answers on the ranks that were played must be what the list of groups says.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from megatron_prores.errors import StopRun, UserError
from megatron_prores.plan.elsewhere import replaced

GROUPS = {
    "tensor": "TENSOR_MODEL_PARALLEL_GROUP",
    "pipeline": "PIPELINE_MODEL_PARALLEL_GROUP",
    "context": "CONTEXT_PARALLEL_GROUP",
    "data": "DATA_PARALLEL_GROUP",
    "data x context": "DATA_PARALLEL_GROUP_WITH_CP",
    "tensor x pipeline": "MODEL_PARALLEL_GROUP",
    "expert": "EXPERT_MODEL_PARALLEL_GROUP",
    "expert tensor": "EXPERT_TENSOR_PARALLEL_GROUP",
    "expert data": "EXPERT_DATA_PARALLEL_GROUP",
}
"""The kinds of groups that a plan tells of, by Megatron's description of them."""

_NOT_FOR_EVERY_RANK = ("EMBEDDING_GROUP", "POSITION_EMBEDDING_GROUP")


class LayoutError(StopRun):
    """Megatron's groups do not fit together: a fault of the layout that no flag check has found."""


@dataclass(frozen=True)
class WorldGroups:
    """The groups of all ranks."""

    world_size: int
    members: dict[str, list[list[int]]]
    """Megatron's description -> the groups of that kind, in the order in which they are made."""
    played: tuple[int, ...]
    """The ranks as which Megatron's code was run."""

    def of_kind(self, kind: str) -> list[list[int]]:
        """List the groups of a kind of :data:`GROUPS`."""
        return self.members[GROUPS[kind]]

    @property
    def pipelines(self) -> list[list[int]]:
        """The ranks of every pipeline, first stage first."""
        return self.of_kind("pipeline")


def lay_out(args: argparse.Namespace, at_stage: Callable[[int, int], None]) -> WorldGroups:
    """Make the groups of every rank, and call back as one rank of every pipeline stage.

    Args:
        args: Megatron's validated arguments; ``world_size`` is the planned one.
        at_stage: Called with (rank, stage) while Megatron's parallel state is that of ``rank``, for
            each rank of the first pipeline.

    Returns:
        The groups.

    Raises:
        LayoutError: The groups do not fit together.
    """
    with playing(args, 0) as groups:
        members = groups
        pipeline = members[GROUPS["pipeline"]][0]
        _check_partition(members, args.world_size)
        _check_own_groups(members, 0)
        if pipeline[0] != 0:
            raise LayoutError(f"rank 0 is not the first of its pipeline {pipeline}")
        at_stage(0, 0)
    for stage, rank in enumerate(pipeline[1:], start=1):
        with playing(args, rank) as groups:
            _check_same(members, groups, rank)
            _check_own_groups(members, rank)
            at_stage(rank, stage)
    last = args.world_size - 1
    if last not in pipeline:
        with playing(args, last) as groups:
            _check_same(members, groups, last)
            _check_own_groups(members, last)
    return WorldGroups(args.world_size, members, tuple(sorted({*pipeline, last})))


@contextmanager
def playing(args: argparse.Namespace, rank: int) -> Iterator[dict[str, list[list[int]]]]:
    """Let Megatron set up its parallel state as one rank of the planned world.

    Args:
        args: Megatron's validated arguments.
        rank: The rank to be.

    Yields:
        All groups that Megatron made meanwhile, by its description of them.

    Raises:
        UserError: Megatron refuses to make them, or lacks a package for it.
    """
    import torch
    from megatron.core import parallel_state
    from megatron.training import global_vars, initialize

    made: dict[str, list[list[int]]] = {}
    create_group = parallel_state.create_group

    def record(ranks: list[int], *, group_desc: str, **options: Any) -> Any:
        made.setdefault(group_desc, []).append(list(ranks))
        # Also those that are made on gloo: there is nobody to connect to.
        return create_group(ranks, group_desc=group_desc, timeout=options.get("timeout"))

    real = args.rank, args.fake_process_group
    args.rank, args.fake_process_group = rank, True
    planned = global_vars.get_args()
    global_vars.set_args(args)
    try:
        try:
            with replaced(parallel_state, create_group=record):
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


def _check_partition(members: dict[str, list[list[int]]], world_size: int) -> None:
    everyone = list(range(world_size))
    for kind, groups in members.items():
        ranks = sorted(rank for group in groups for rank in group)
        if kind not in _NOT_FOR_EVERY_RANK and ranks != everyone:
            raise LayoutError(f"the groups {kind} do not hold every rank once")


def _check_same(
    members: dict[str, list[list[int]]], groups: dict[str, list[list[int]]], rank: int
) -> None:
    if groups != members:
        kinds = [kind for kind in members if groups.get(kind) != members[kind]]
        raise LayoutError(f"rank {rank} makes other groups than rank 0: {', '.join(kinds)}")


def _check_own_groups(members: dict[str, list[list[int]]], rank: int) -> None:
    """Compare the list of groups with what Megatron answers on this rank."""
    import torch
    from megatron.core import parallel_state

    answers = {
        "tensor": parallel_state.get_tensor_model_parallel_group(),
        "pipeline": parallel_state.get_pipeline_model_parallel_group(),
        "context": parallel_state.get_context_parallel_group(),
        "data": parallel_state.get_data_parallel_group(),
        "data x context": parallel_state.get_data_parallel_group(with_context_parallel=True),
        "expert": parallel_state.get_expert_model_parallel_group(),
        "expert data": parallel_state.get_expert_data_parallel_group(),
    }
    for kind, group in answers.items():
        answer = torch.distributed.get_process_group_ranks(group)
        listed = next(ranks for ranks in members[GROUPS[kind]] if rank in ranks)
        if answer != listed:
            raise LayoutError(f"rank {rank}: its {kind} group is {answer}, not {listed}")
