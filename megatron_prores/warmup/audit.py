"""The startup audit: before the first step, all ranks prove that they agree about the layers.

A layer that counts from its own pipeline stage, a node started with another schedule, a stage built
twice: each would train on silently, with a warmup that is not ProRes. The audit compares what the
ranks really hold, and stops the run.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch

from megatron_prores.schedule.depth import Depths, plain_depths
from megatron_prores.warmup.residual_warmup import ResidualWarmup

_FAULTS_SHOWN = 20


@dataclass(frozen=True)
class HeldLayer:
    """One layer as one rank holds it."""

    layer: int
    """l, as the layer itself says, from 1."""
    number: int
    """Which of the layers that Megatron builds, as it counts, from 1; in a GPT model that is l."""
    alpha: float
    """The value of the layer's alpha tensor."""
    rank: int
    """Global rank."""
    stage: int
    """Pipeline stage of the rank."""
    virtual_stage: int
    """Virtual pipeline stage of the model chunk."""
    replica: int
    """The pipeline that the rank belongs to, named by its first rank."""


@dataclass(frozen=True)
class RankReport:
    """What one rank tells all others."""

    rank: int
    replica: int
    settings: str
    """The ProRes settings and the step, as text; must be the same everywhere."""
    layers: tuple[HeldLayer, ...]


class AuditError(RuntimeError):
    """The ranks disagree. The message says how, and draws who holds what."""


def report_of(warmup: ResidualWarmup, step: int, rank: int, pipeline: list[int]) -> RankReport:
    """Describe the layers of this rank.

    Args:
        warmup: The warmup of this rank, set to ``step``.
        step: Step of the schedule, in its unit.
        rank: Global rank.
        pipeline: Global ranks of this rank's pipeline, first stage first.
    """
    held = tuple(
        HeldLayer(
            layer=layer.prores_layer or 0,
            number=layer.layer_number,
            alpha=layer.alpha.item(),
            rank=rank,
            stage=pipeline.index(rank),
            virtual_stage=virtual_stage,
            replica=pipeline[0],
        )
        for virtual_stage, layers in enumerate(warmup.chunks)
        for layer in layers
    )
    settings = f"{warmup.config}, {warmup.num_layers} layers, after {step} {warmup.config.unit}"
    if (digest := warmup.config.schedule_digest) is not None:
        # The same name may be another file on another node.
        settings += f", with a schedule file of sha256 {digest}"
    return RankReport(rank=rank, replica=pipeline[0], settings=settings, layers=held)


def find_faults(
    reports: list[RankReport], expected_alphas: list[float], depths: Depths | None = None
) -> list[str]:
    """Compare the reports of all ranks.

    Args:
        reports: One per rank of the job.
        expected_alphas: alpha of layer 1..L by the schedule of the rank that compares.
        depths: l of every layer that Megatron builds; None: the layers are the L.

    Returns:
        What is wrong, one sentence each; empty when every layer exists exactly once in each
        pipeline, counts as the l that it is, and has the alpha of the schedule.
    """
    faults = []
    for report in reports:
        if report.settings != reports[0].settings:
            faults.append(
                f"rank {report.rank} runs {report.settings}, rank {reports[0].rank} runs "
                f"{reports[0].settings}: start all ranks with the same settings"
            )
    holders: dict[tuple[int, int], list[HeldLayer]] = defaultdict(list)
    for report in reports:
        for held in report.layers:
            holders[held.replica, held.layer].append(held)
    num_layers = len(expected_alphas)
    if depths == plain_depths(num_layers):
        depths = None
    for replica in sorted({report.replica for report in reports}):
        if depths is not None:
            faults += _faults_in_pattern(replica, reports, depths)
            continue
        for layer in range(1, num_layers + 1):
            held_by = holders[replica, layer]
            if len(held_by) != 1:
                ranks = ", ".join(str(h.rank) for h in held_by) or "no rank"
                faults.append(f"pipeline {replica}: layer {layer} is held by {ranks}")
    for (replica, layer), held_by in sorted(holders.items()):
        if not 1 <= layer <= num_layers:
            faults.append(f"pipeline {replica}: there is no layer {layer} of {num_layers}")
            continue
        # The tensor is float32; compare what the schedule gives in the same precision.
        expected = torch.tensor(expected_alphas[layer - 1], dtype=torch.float32).item()
        faults += [
            f"rank {held.rank}: alpha of layer {layer} is {held.alpha:.6g}, not {expected:.6g}"
            for held in held_by
            if held.alpha != expected
        ]
    return faults


def _faults_in_pattern(replica: int, reports: list[RankReport], depths: Depths) -> list[str]:
    """Compare the layers of one pipeline of a hybrid model with its pattern."""
    holders: dict[int, list[HeldLayer]] = defaultdict(list)
    for held in (each for report in reports for each in report.layers):
        if held.replica == replica:
            holders[held.number].append(held)
    faults = []
    for number, depth in enumerate(depths, start=1):
        held_by = holders[number]
        name = f"layer {number} of the pattern"
        if len(held_by) != 1:
            ranks = ", ".join(str(held.rank) for held in held_by) or "no rank"
            faults.append(f"pipeline {replica}: {name} is held by {ranks}")
        faults += [
            f"rank {held.rank}: {name} counts as layer {held.layer} of {depths[-1]}, not {depth}"
            for held in held_by
            if held.layer != depth
        ]
    return faults


def table(reports: list[RankReport]) -> str:
    """Draw who holds which layers: a line per rank and virtual stage, layers with their alpha."""
    lines = [f"{'rank':>6} {'pipeline':>8} {'stage':>5} {'virtual':>7}  layers (alpha)"]
    for report in reports:
        chunks: dict[tuple[int, int], list[HeldLayer]] = defaultdict(list)
        for held in report.layers:
            chunks[held.stage, held.virtual_stage].append(held)
        for (stage, virtual_stage), layers in sorted(chunks.items()):
            text = ", ".join(f"{held.layer} ({held.alpha:.4g})" for held in layers)
            lines.append(
                f"{report.rank:>6} {report.replica:>8} {stage:>5} {virtual_stage:>7}  {text}"
            )
    return "\n".join(lines)


def layer_map(
    reports: list[RankReport], opening_steps: list[int | None], unit: str = "iterations"
) -> str:
    """Draw the layer-to-stage map of the first pipeline, with the step that opens each layer.

    A block of a hybrid model that two stages share has a line for each.

    Args:
        reports: One per rank of the job.
        opening_steps: For layer 1..L the step from which its alpha is 1; None for never.
        unit: What the steps count, "iterations" or "samples".
    """
    lines = [f"{'layer':>6} {'stage':>6} {'virtual':>8}  opens fully after ({unit})"]
    held_layers = [
        held for report in reports if report.replica == reports[0].replica for held in report.layers
    ]
    places = {(held.layer, held.virtual_stage, held.stage) for held in held_layers}
    for layer, virtual_stage, stage in sorted(places):
        opens = opening_steps[layer - 1]
        lines.append(
            f"{layer:>6} {stage:>6} {virtual_stage:>8}  {'never' if opens is None else opens}"
        )
    return "\n".join(lines)


def audit(warmup: ResidualWarmup, step: int) -> str:
    """Check that all ranks agree about the layers. Collective: every rank must call it.

    Every rank reports the layers that it holds with their alpha, and all compare: each layer 1..L
    must be in every pipeline once, with the alpha of the schedule.

    Args:
        warmup: The warmup of this rank, set to ``step`` with ``set_step``.
        step: Step of the schedule, in its unit.

    Returns:
        The layer-to-stage map, for the log.

    Raises:
        AuditError: On every rank, when any of them disagrees with the others.
    """
    from megatron.core import parallel_state

    rank = torch.distributed.get_rank()
    pipeline = torch.distributed.get_process_group_ranks(
        parallel_state.get_pipeline_model_parallel_group()
    )
    reports: list[RankReport] = [None] * torch.distributed.get_world_size()  # type: ignore[list-item]
    torch.distributed.all_gather_object(reports, report_of(warmup, step, rank, pipeline))
    if faults := find_faults(reports, warmup.alphas(step).tolist(), warmup.depths):
        shown = faults[:_FAULTS_SHOWN]
        if len(faults) > len(shown):
            shown.append(f"... and {len(faults) - len(shown)} more")
        raise AuditError(
            "the ranks do not agree about the layers (ProRes audit)\n"
            + "\n".join([*shown, table(reports)])
        )
    config = warmup.config
    return layer_map(reports, config.opening_steps(warmup.num_layers), config.unit)
