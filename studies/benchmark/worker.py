"""Measures one case, in a process of its own: Megatron parses its flags once in a process.

All models of the case take turns in blocks of whole training steps, each block timed from an idle
device to an idle device.
"""

from __future__ import annotations

import argparse
import gc
import math
import os
import sys
from collections.abc import Callable, Hashable
from functools import partial
from typing import TYPE_CHECKING, Any

from megatron_prores.command_line import device
from studies.benchmark.cases import CASES, Case, Side, megatron_flags

if TYPE_CHECKING:
    from studies.benchmark.trainee import Trainee

Build = Callable[[Side], "Trainee"]

MEMORY_STEPS = 2
"""The first one makes the optimizer's states; the second one has everything."""
WARM_STEPS = 2
BLOCK_SECONDS = 0.5
"""In each round a side takes as many steps as take about so long, and at least one."""


def measure(name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Measure the memory of each side of a case, then the time of all of them in turn.

    Args:
        name: The case's.
        settings: ``device``, ``rounds`` and ``megatron_flags`` of the command line.

    Returns:
        ``bytes``: side -> peak memory, alone, which is not counted beside the plain loop;
        ``seconds``: side -> seconds per step, by round; ``alphas``: side -> alpha of each layer;
        and what the models were like.

    Raises:
        UserError: Megatron refuses the flags.
        RuntimeError: Models that must compute the same do not, or the memory is too small.
    """
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's, which looks for a GPU
    case = CASES[name]
    device.prepare(settings["device"])

    flags = [*megatron_flags(case, settings["device"]), *settings["megatron_flags"]]
    if case.rival_target is not None:
        from megatron.training import get_args

        from studies.benchmark import rival

        measured = rival.take_turns(flags, settings["rounds"], BLOCK_SECONDS)
        args = get_args()
        return _finish(measured, args, args.attention_backend.name)

    from studies.benchmark import trainee

    args = trainee.start_megatron(settings["device"], flags)
    fp8_format = args.fp8
    # Megatron's local layers have no other, and stock is to have the same as ProRes.
    attention = "unfused" if args.transformer_impl == "local" else args.attention_backend.name

    def build(side: Side) -> Trainee:
        fp8 = None if side.in_bf16 else fp8_format
        return trainee.Trainee(side, case.norm_placement, side.attention or attention, fp8)

    measured = {
        "bytes": _count_memory(build, case, settings["device"]),
        **_take_turns(build, case, settings["rounds"]),
    }
    return _finish(measured, args, attention)


def _finish(measured: dict[str, Any], args: argparse.Namespace, attention: str) -> dict[str, Any]:
    """Add what the models were like to what was measured of them, and end Megatron."""
    import torch
    from megatron.training.training import num_floating_point_operations

    torch.distributed.destroy_process_group()
    return measured | {
        "flops_per_step": float(num_floating_point_operations(args, args.global_batch_size)),
        "attention": attention,
        **{flag: getattr(args, flag) for flag in _REPORTED},
    }


_REPORTED = """
    num_layers seq_length micro_batch_size global_batch_size transformer_impl
    gradient_accumulation_fusion
""".split()


def _count_memory(build: Build, case: Case, on: str) -> dict[str, int]:
    """Return the peak memory of each side, in bytes: alone, from its first weight on."""
    from studies.benchmark.measure import peak_memory

    # What is made once in the life of a process should not count for the first side.
    with peak_memory(on):
        build(case.sides[0]).train(1, opened=False)
    peaks: dict[str, int] = {}
    for side in case.sides:
        _clean()
        with peak_memory(on) as peak:
            trainee = build(side)
            trainee.train(MEMORY_STEPS, side.opened, side.measured)
            del trainee
        peaks[side.name] = peak()
    return peaks


def _take_turns(build: Build, case: Case, rounds: int) -> dict[str, Any]:
    """Build all models of the case with the same weights, and time the sides in turn."""
    from studies.benchmark.measure import interleave

    _clean()
    base = case.sides[0]
    trainees: dict[Hashable, Trainee] = {}
    for model, side in case.models.items():
        trainees[model] = build(side)
        if model != base.model:
            trainees[model].copy_weights(trainees[base.model])
    _compare_losses(trainees, case)
    alphas: dict[str, list[float]] = {}
    for side in case.sides:
        trainees[side.model].train(WARM_STEPS, side.opened, side.measured)
        alphas[side.name] = trainees[side.model].alphas()
    steps = max(1, round(BLOCK_SECONDS / trainees[base.model].train(1, base.opened)[0]))

    def block(side: Side) -> float:
        return trainees[side.model].train(steps, side.opened, side.measured)[0]

    weights = trainees[base.model].model[0].parameters()
    return {
        "seconds": interleave({side.name: partial(block, side) for side in case.sides}, rounds),
        "steps_per_block": steps,
        "alphas": alphas,
        "parameters": sum(weight.numel() for weight in weights),
    }


def _compare_losses(trainees: dict[Hashable, Trainee], case: Case) -> None:
    """Take the first step of each model: the weights and the data are the same.

    Raises:
        RuntimeError: Models that must compute the same do not, or FP8 changes nothing.
    """
    sides = list(case.models.values())
    losses = {side.name: trainees[side.model].train(1, side.opened)[1] for side in sides}
    base = losses[sides[0].name]
    for side in sides[1:]:
        loss = losses[side.name]
        if side.in_bf16 and loss == base:
            raise RuntimeError(f"FP8 was not used, its loss is that of bf16: {losses}")
        if not side.in_bf16 and not math.isclose(loss, base, rel_tol=1e-3):
            raise RuntimeError(f"{side.name} is not the model that it is compared with: {losses}")


def _clean() -> None:
    """Free the models that are gone, and what Transformer Engine keeps of them."""
    import torch

    # A model and its optimizer refer to each other: nothing of them is freed without the collector.
    gc.collect()
    torch.cuda.empty_cache()
    quantization = sys.modules.get("transformer_engine.pytorch.quantization")
    if quantization is not None:
        quantization.FP8GlobalStateManager.reset()  # delayed scaling's history
