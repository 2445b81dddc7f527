"""Who holds which layers: every rank's report, through the audit that a real run starts with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_prores.config import ProResConfig
from megatron_prores.errors import StopRun
from megatron_prores.plan.groups import WorldGroups
from megatron_prores.plan.model import Chunk
from megatron_prores.warmup.audit import HeldLayer, RankReport, find_faults, report_of
from megatron_prores.warmup.residual_warmup import ResidualWarmup


class PlanAuditError(StopRun):
    """The audit of a real run would stop it."""


@dataclass(frozen=True)
class StageHolding:
    """What a rank of one pipeline stage holds, and how it would report it."""

    chunks: tuple[Chunk, ...]
    warmup: ResidualWarmup | None
    """None without ProRes: there is nothing to drive."""


def hold(
    prores: ProResConfig, num_layers: int, chunks: list[Any], described: list[Chunk]
) -> StageHolding:
    """Take hold of the layers of a stage, as a run does when its model is built.

    Args:
        prores: The run's ProRes configuration.
        num_layers: L.
        chunks: The stage's model chunks.
        described: The same in words.
    """
    warmup = ResidualWarmup(prores, num_layers, chunks) if prores.enabled else None
    return StageHolding(tuple(described), warmup)


def audit_world(
    groups: WorldGroups,
    stages: list[StageHolding],
    prores: ProResConfig,
    num_layers: int,
    step: int,
) -> list[RankReport]:
    """Make the report of every rank of the world at one step, and audit them.

    Args:
        groups: Which rank is where.
        stages: What a rank of each pipeline stage holds.
        prores: The run's ProRes configuration.
        num_layers: L.
        step: In the unit of the schedule.

    Returns:
        One report per rank, in the order of the ranks.

    Raises:
        PlanAuditError: The run's own audit would find a fault.
    """
    for stage in stages:
        if stage.warmup is not None:
            stage.warmup.set_step(step)
    reports = [
        _report(stages[stage], step, rank, stage, pipeline)
        for pipeline in groups.pipelines
        for stage, rank in enumerate(pipeline)
    ]
    reports.sort(key=lambda report: report.rank)
    alphas = prores.alphas(step, num_layers).tolist() if prores.enabled else [1.0] * num_layers
    if faults := find_faults(reports, alphas):
        raise PlanAuditError(
            f"the run would be stopped by its audit, with {len(faults)} faults: "
            + "; ".join(faults[:5])
        )
    return reports


def _report(
    held: StageHolding, step: int, rank: int, stage: int, pipeline: list[int]
) -> RankReport:
    if held.warmup is not None:
        return report_of(held.warmup, step, rank, pipeline)
    layers = tuple(
        HeldLayer(layer, 1.0, rank, stage, chunk.virtual_stage, pipeline[0])
        for chunk in held.chunks
        for layer in chunk.layers
    )
    return RankReport(rank, pipeline[0], "without ProRes", layers)
