"""What a checkpoint is, in a few words: its size, its layout, and where ProRes stands in it."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_prores.checkpoint.manifest import DamagedError
from megatron_prores.checkpoint.reader import StoredCheckpoint, is_distributed
from megatron_prores.checkpoint.settings import by_name
from megatron_prores.checkpoint.verify import surface_damage
from megatron_prores.config.flags import FLAGS, as_flag, config_of
from megatron_prores.config.prores_config import OFF
from megatron_prores.errors import ArgumentError
from megatron_prores.schedule.custom import FILE, is_custom
from megatron_prores.schedule.depth import depths_of

_SIZES = {
    "TP": "tensor_model_parallel_size",
    "PP": "pipeline_model_parallel_size",
    "VPP": "virtual_pipeline_model_parallel_size",
    "CP": "context_parallel_size",
    "EP": "expert_model_parallel_size",
    "DP": "data_parallel_size",
    "ranks": "world_size",
}


@dataclass
class Warmup:
    """Where the warmup stands."""

    settings: dict[str, Any] = field(default_factory=dict)
    """The ProRes settings, by flag."""
    step: int | None = None
    """Iterations, or samples, that were completed: t of the schedule."""
    unit: str = "iterations"
    alphas: list[float] | None = None
    """alpha of layer 1..L, as the next forward pass would use it."""
    opens_at: list[int | None] | None = None
    """For layer 1..L the step from which its alpha is 1; None where it never is."""
    note: str = ""
    """Why there are no alphas."""


@dataclass
class Summary:
    """One checkpoint of a directory."""

    name: str
    iteration: int | None
    size: int
    """Bytes."""
    files: int
    layout: dict[str, int] = field(default_factory=dict)
    """TP, PP and so on -> their sizes, of the run that saved it."""
    warmup: Warmup = field(default_factory=Warmup)
    damage: list[str] = field(default_factory=list)
    """What is wrong at first sight; ``verify`` looks closer."""


def summarize(directory: Path) -> Summary:
    """Describe one checkpoint; of the large files it reads only the arguments.

    Args:
        directory: Of one iteration.
    """
    sizes = [entry.stat().st_size for entry in directory.rglob("*") if entry.is_file()]
    digits = directory.name.removeprefix("iter_")
    summary = Summary(
        name=directory.name,
        iteration=int(digits) if digits.isdigit() else None,
        size=sum(sizes),
        files=len(sizes),
        damage=surface_damage(directory),
    )
    if summary.damage or not is_distributed(directory):
        return summary
    try:
        stored = StoredCheckpoint(directory)
        args = stored.args
        completed = int(stored.common.get("iteration", summary.iteration or 0))
    except (DamagedError, TypeError, ValueError) as error:
        summary.damage = [str(error)]
        return summary
    summary.layout = {
        name: value
        for name, flag in _SIZES.items()
        if isinstance(value := getattr(args, flag, None), int)
        # What is not divided at all goes without saying, but for the three that everyone asks for.
        and (value > 1 or name in ("TP", "PP", "DP"))
    }
    summary.warmup = warmup_of(args, completed)
    return summary


def warmup_of(args: Namespace, iteration: int) -> Warmup:
    """Work out where every layer's warmup stands.

    Args:
        args: The arguments in the checkpoint.
        iteration: Iterations completed.
    """
    if not hasattr(args, "prores_schedule"):
        return Warmup(settings={"--prores-schedule": OFF}, note="saved by stock Megatron")
    settings = by_name(getattr(args, "prores_settings", {"schedule": args.prores_schedule}))
    warmup = Warmup(settings={FLAGS.get(name, name): value for name, value in settings.items()})
    schedule = str(args.prores_schedule)
    if schedule == OFF:
        warmup.note = "no warmup: every layer is fully open"
    elif is_custom(schedule) and not schedule.startswith(FILE):
        # A checkpoint must not be able to name code that runs.
        warmup.note = f"alpha is not shown: the code of {schedule} is not run for it"
    else:
        try:
            config = config_of(args)
            num_layers = depths_of(args)[-1]
            if config.settings(num_layers) != settings:
                warmup.note = f"alpha is not shown: {schedule} is not the file of that run any more"
                return warmup
            warmup.unit = config.unit
            samples = int(getattr(args, "consumed_train_samples", 0))
            warmup.step = samples if config.unit == "samples" else iteration
            warmup.alphas = config.alphas(warmup.step, num_layers).tolist()
            warmup.opens_at = config.opening_steps(num_layers)
        except (AttributeError, TypeError, ValueError) as error:
            warmup.alphas = None
            told = error.message(as_flag) if isinstance(error, ArgumentError) else error
            warmup.note = f"alpha is not shown: {told}"
    return warmup


def as_text(summary: Summary, newest_by: str = "") -> str:
    """Write a summary for people, on two or three lines.

    Args:
        summary: Of one checkpoint.
        newest_by: What says that it is the newest; empty where it is not.
    """
    size = human_size(summary.size)
    layout = ", ".join(f"{name} {value}" for name, value in summary.layout.items())
    head = f"{summary.name}: {size} in {summary.files} files" + (f"; {layout}" if layout else "")
    lines = [head + (f"; the newest, by {newest_by}" if newest_by else "")]
    if summary.damage:
        lines.append(f"  DAMAGED OR UNFINISHED: {summary.damage[0]}")
        return "\n".join(lines)
    warmup = summary.warmup
    if warmup.settings:
        lines.append("  " + " ".join(f"{flag} {value}" for flag, value in warmup.settings.items()))
    if warmup.alphas is not None:
        alphas = warmup.alphas
        done = f"after {warmup.step} {warmup.unit}"
        lines.append(f"  {done} {alphas.count(1.0)} of {len(alphas)} layers are fully open")
        lines.append("  alpha of layer " + ", ".join(_runs(alphas)))
    elif warmup.note:
        lines.append(f"  {warmup.note}")
    return "\n".join(lines)


def _runs(alphas: list[float]) -> list[str]:
    """Write "1-3: 1", "4: 0.5" and so on: neighbours with the same alpha in one."""
    found = []
    start = 0
    for end in range(1, len(alphas) + 1):
        if end == len(alphas) or alphas[end] != alphas[start]:
            layers = f"{start + 1}" if end == start + 1 else f"{start + 1}-{end}"
            found.append(f"{layers}: {alphas[start]:.4g}")
            start = end
    return found


def human_size(size: int) -> str:
    """Write a number of bytes, 1000 of them to the kB."""
    value = float(size)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"
