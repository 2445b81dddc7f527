"""The benchmark of the placements: which models are compared with which, and how."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_prores.command_line import device
from megatron_prores.config import OFF
from megatron_prores.errors import UserError
from studies.benchmark.placements.options import ATTENTION, Options, read_options

if TYPE_CHECKING:
    from studies.benchmark.placements.report import Row

STOCK = "stock"
WARM_STEPS = 3
"""Steps of each model before any is timed: the optimizer's states, torch's caches."""
MEMORY_STEPS = 2
"""The first one makes the optimizer's states; the second one has everything."""


@dataclass(frozen=True)
class Variant:
    """A model to build, and the phase of the warmup in which it is measured."""

    name: str
    schedule: str
    norm_placement: str
    attention: str
    opened: bool = False


def variants(comparison: str, attention: str) -> list[Variant]:
    """List the models of a comparison: the base, the base again, and what is compared with it.

    Args:
        comparison: A norm placement, or ``attention``.
        attention: Megatron's ``--attention-backend`` for all models of a placement.
    """
    if comparison == ATTENTION:
        return [
            Variant("unfused attention", "linear", "pre", "unfused", opened=True),
            Variant("itself", "linear", "pre", "unfused", opened=True),
            Variant("fused attention", "linear", "pre", "fused", opened=True),
        ]
    # The one placement whose layer Megatron has.
    name, base = ("stock Megatron", STOCK) if comparison == "pre" else ("schedule none", OFF)
    return [
        Variant(name, base, comparison, attention),
        Variant("itself", base, comparison, attention),
        Variant("ProRes during warmup", "linear", comparison, attention),
        Variant("ProRes after warmup", "linear", comparison, attention, opened=True),
    ]


def count_memory(models: list[Variant], options: Options) -> dict[str, int]:
    """Return the peak memory of each model, in bytes: alone, from its first weight on."""
    from studies.benchmark.measure import peak_memory
    from studies.benchmark.trainee import Trainee

    peaks: dict[str, int] = {}
    for model in models:
        with peak_memory(options.device) as peak:
            trainee = Trainee(model.schedule, model.norm_placement, model.attention)
            for _ in range(MEMORY_STEPS):
                trainee.step(model.opened)
            del trainee
        peaks[model.name] = peak.bytes
    return peaks


def compare(
    comparison: str, models: list[Variant], peaks: dict[str, int], options: Options
) -> list[Row]:
    """Time the models of one comparison.

    Args:
        comparison: Its name.
        models: The base first.
        peaks: What :func:`count_memory` gave for them.
        options: How often to repeat.

    Returns:
        A row for each model but the base.

    Raises:
        RuntimeError: Models that must compute the same do not.
    """
    from studies.benchmark.measure import interleave, ratio
    from studies.benchmark.placements.report import Row
    from studies.benchmark.trainee import Trainee

    base = models[0]
    trainees: dict[str, Trainee] = {}
    losses: dict[str, float] = {}
    alphas: dict[str, list[float]] = {}
    for model in models:
        trainee = Trainee(model.schedule, model.norm_placement, model.attention)
        if trainees:
            trainee.copy_weights(trainees[base.name])
        trainees[model.name] = trainee
    for model in models:
        losses[model.name] = trainees[model.name].step(model.opened)[1]
        alphas[model.name] = trainees[model.name].alphas()
        if min(alphas[model.name]) == 1.0 and not math.isclose(
            losses[model.name], losses[base.name], rel_tol=1e-4
        ):
            raise RuntimeError(f"{model.name} is not the model that it is compared with: {losses}")
        for _ in range(WARM_STEPS - 1):
            trainees[model.name].step(model.opened)

    def step_of(model: Variant) -> Callable[[], float]:
        return lambda: trainees[model.name].step(model.opened)[0]

    seconds = interleave({model.name: step_of(model) for model in models}, options.repetitions)
    return [
        Row(
            comparison,
            model.name,
            base.name,
            ratio(seconds[model.name], seconds[base.name]),
            peaks[model.name] / peaks[base.name],
            seconds[model.name],
            seconds[base.name],
            peaks[model.name],
            peaks[base.name],
            alphas[model.name],
        )
        for model in models[1:]
    ]


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def main(argv: Sequence[str]) -> None:
    """Measure what the command line asks for, prints the table, and write the JSON.

    Args:
        argv: The command line, without the program's name.

    Raises:
        UserError: A flag is wrong.
    """
    options = read_options(argv)
    # Megatron prints its flags, its models and what it does without; a table has to be read.
    warnings.filterwarnings("ignore", message=".*(Apex|apex|[Tt]ransformer[ -][Ee]ngine)")
    logging.disable(logging.WARNING)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's, which looks for a GPU
    device.prepare(options.device)

    import torch

    from studies.benchmark import trainee
    from studies.benchmark.placements import report

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    rows: list[Row] = []
    with contextlib.redirect_stdout(io.StringIO()):
        args = trainee.start_megatron(options.device, options.argv)
        attention = "unfused" if args.transformer_impl == "local" else "auto"
        if ATTENTION in options.comparisons and attention == "auto":
            raise UserError(f"--placements {ATTENTION}: Transformer Engine has its own")
        models = {name: variants(name, attention) for name in options.comparisons}
        # What is made once in the life of a process should not count for the first model.
        count_memory([Variant("", OFF, "pre", attention)], options)
        peaks = {}
        for name in models:
            _say(f"{name}: memory of {len(models[name])} models")
            peaks[name] = count_memory(models[name], options)
        for name in models:
            _say(f"{name}: {options.repetitions} repetitions of {len(models[name])} steps")
            rows += compare(name, models[name], peaks[name], options)
    head = report.header(options, argv)
    print(report.as_text(head, rows))
    if options.output is not None:
        report.write_json(options.output, head, rows)
    torch.distributed.destroy_process_group()
