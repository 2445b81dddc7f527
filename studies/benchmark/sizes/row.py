"""Measures one row in a process of its own: ``python -m studies.benchmark.sizes.row``.

A process of its own, so that a row that runs out of memory, or worse, takes no other with it, and
because Megatron parses its flags once in the life of a process. All sides of the row share it:
they take their turns in blocks of whole training steps, each block timed from an idle device to an
idle device.
"""

from __future__ import annotations

import gc
import json
import math
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_prores.command_line import device
from megatron_prores.errors import UserError
from studies.benchmark.sizes.plan import (
    AFTER,
    MIN_ROUNDS,
    STOCK,
    STOCK_BF16,
    Side,
    models,
    sides,
)

if TYPE_CHECKING:
    from studies.benchmark.trainee import Trainee

MEMORY_STEPS = 2
"""The first one makes the optimizer's states; the second one has everything."""
WARM_STEPS = 2

DONE, FAILED, REFUSED, NO_TIME = "done", "failed", "refused", "no time"
"""How a row ended; ``refused``: by Megatron, at its flags."""


class NoTimeError(Exception):
    """The time is up before there is a measurement."""


def main(request: str, answer: str) -> None:
    """Measure a row, and write what came out, or why nothing did.

    Args:
        request: A JSON object; :func:`measure` says what is in it.
        answer: The file to write: ``status``, and ``measured`` or ``reason``.
    """
    outcome: dict[str, Any]
    try:
        outcome = {"status": DONE, "measured": measure(json.loads(request))}
    except UserError as error:
        outcome = {"status": REFUSED, "reason": error.message()}
    except NoTimeError:
        outcome = {"status": NO_TIME, "reason": "the time budget was used up"}
    except Exception as error:
        traceback.print_exc()
        lines = str(error).strip().splitlines() or ["no message"]
        outcome = {"status": FAILED, "reason": f"{type(error).__name__}: {lines[0]}"}
    Path(answer).write_text(json.dumps(outcome))


def measure(request: dict[str, Any]) -> dict[str, Any]:
    """Measure the memory of each side of a row, then the time of all of them in turn.

    Args:
        request: ``device``; ``precision``; ``argv``: Megatron's flags; ``fp8_format``: for the FP8
            models, or None; ``rounds``; ``block_seconds``; ``deadline``: seconds since the epoch,
            or None; ``threads`` of torch, or None.

    Returns:
        ``bytes``: side -> peak memory, alone; ``seconds``: side -> seconds per step, by round;
        ``losses``: side -> loss of its first step; ``alphas``: side -> alpha of each layer; and
        what the run was like.

    Raises:
        UserError: Megatron refuses the flags.
        NoTimeError: The deadline leaves no time for a measurement.
        RuntimeError: Models that must compute the same do not, or the GPU's memory is too small.
    """
    warnings.filterwarnings("ignore", message=".*(Apex|apex|[Tt]ransformer[ -][Ee]ngine)")
    device.prepare(request["device"])

    import torch

    from studies.benchmark import trainee

    if request["threads"] is not None:
        torch.set_num_threads(request["threads"])
    args = trainee.start_megatron(request["device"], request["argv"])
    # Megatron's local layers have no other, and stock is to have the same as ProRes.
    attention = "unfused" if args.transformer_impl == "local" else args.attention_backend.name

    def build(model: str) -> Trainee:
        fp8 = None if model.endswith("bf16") else request["fp8_format"]
        schedule = "linear" if model == AFTER.model else trainee.STOCK
        return trainee.Trainee(schedule, "pre", attention, fp8)

    deadline = request["deadline"] or math.inf
    competitors = sides(request["precision"])
    memory = _count_memory(build, competitors, request["device"], deadline)
    times = _Times(request["rounds"], request["block_seconds"], deadline)
    found = times.take(build, competitors, models(request["precision"]))
    result = {
        "bytes": memory,
        **found,
        "sequences": args.global_batch_size,
        "sequence_length": args.seq_length,
        "vocabulary": args.padded_vocab_size,
        "flops_per_step": _flops(args),
        "implementation": args.transformer_impl,
        "gradient_accumulation_fusion": args.gradient_accumulation_fusion,
        "cross_entropy_fusion": args.cross_entropy_loss_fusion,
        "attention": _attention(attention),
    }
    torch.distributed.destroy_process_group()
    return result


def _flops(args: Any) -> float:
    from megatron.training.training import num_floating_point_operations

    return float(num_floating_point_operations(args, args.global_batch_size))


def _attention(backend: str) -> str:
    """Name the attention that ran: of Transformer Engine's, the one that it has chosen."""
    engine = sys.modules.get("transformer_engine.pytorch.attention.dot_product_attention")
    chosen = getattr(engine, "_attention_backends", None)
    if isinstance(chosen, dict):
        for name in ("flash", "fused", "unfused"):
            if chosen.get(f"use_{name}_attention"):
                return f"Transformer Engine {name}"
    return backend


def _check_time(deadline: float) -> None:
    if time.time() > deadline:
        raise NoTimeError


def _clean() -> None:
    """Free the models that are gone, and what Transformer Engine keeps of them."""
    import torch

    # A model and its optimizer refer to each other: nothing of them is freed without the collector.
    gc.collect()
    torch.cuda.empty_cache()
    quantization = sys.modules.get("transformer_engine.pytorch.quantization")
    if quantization is not None:
        quantization.FP8GlobalStateManager.reset()  # delayed scaling's history


def _count_memory(
    build: Callable[[str], Trainee], competitors: tuple[Side, ...], on: str, deadline: float
) -> dict[str, int]:
    """Return the peak memory of each side, in bytes: alone, from its first weight on."""
    from studies.benchmark.measure import peak_memory

    # What is made once in the life of a process should not count for the first side.
    with peak_memory(on):
        build(STOCK.model).step()
    peaks: dict[str, int] = {}
    for side in competitors:
        _check_time(deadline)
        _clean()
        with peak_memory(on) as peak:
            trainee = build(side.model)
            for _ in range(MEMORY_STEPS):
                trainee.step(side.opened)
            del trainee
        peaks[side.name] = peak.bytes
        _say(f"{side.name}: {peak.bytes / 2**30:.3f} GiB")
    return peaks


class _Times:
    """Times the sides of a row in turn."""

    def __init__(self, rounds: int, block_seconds: float, deadline: float) -> None:
        self.rounds = rounds
        self.block_seconds = block_seconds
        self.deadline = deadline

    def take(
        self, build: Callable[[str], Trainee], competitors: tuple[Side, ...], names: tuple[str, ...]
    ) -> dict[str, Any]:
        """Build all models of the row with the same weights, and times them."""
        from studies.benchmark.measure import interleave

        _clean()
        trainees: dict[str, Trainee] = {}
        for name in names:
            _check_time(self.deadline)
            trainees[name] = build(name)
            if name != STOCK.model:
                trainees[name].copy_weights(trainees[STOCK.model])
        losses = _first_losses(trainees, competitors)
        alphas: dict[str, list[float]] = {}
        for side in competitors:
            _check_time(self.deadline)
            trainees[side.model].block(WARM_STEPS, side.opened)
            alphas[side.name] = trainees[side.model].alphas()
        # The first block of a model still compiles; the second one of the same tells its speed.
        steps = max(1, round(self.block_seconds / trainees[STOCK.model].block(1, opened=False)))
        _say(f"{steps} steps a block")

        def block_of(side: Side) -> Callable[[], float]:
            return lambda: trainees[side.model].block(steps, side.opened)

        started = time.time()

        def go_on(done: int) -> bool:
            """Whether there is time for one more round."""
            now = time.time()
            return now + (now - started) / max(done, 1) < self.deadline

        blocks = {side.name: block_of(side) for side in competitors}
        taken = interleave(blocks, self.rounds, go_on=go_on)
        if len(taken[STOCK.name]) < min(MIN_ROUNDS, self.rounds):
            raise NoTimeError
        return {
            "seconds": taken,
            "steps_per_block": steps,
            "losses": losses,
            "alphas": alphas,
            "parameters": sum(p.numel() for p in trainees[STOCK.model].model[0].parameters()),
        }


def _first_losses(trainees: dict[str, Trainee], competitors: tuple[Side, ...]) -> dict[str, float]:
    """Take the first step of each model, and compare: the weights and the data are the same.

    Returns:
        Side -> loss.

    Raises:
        RuntimeError: Models that must compute the same do not, or FP8 changes nothing.
    """
    # One side per model, and ProRes with all its layers open.
    first = [side for side in (STOCK, AFTER, STOCK_BF16) if side in competitors]
    losses = {side.name: trainees[side.model].step(side.opened)[1] for side in first}
    if not math.isclose(losses[STOCK.name], losses[AFTER.name], rel_tol=1e-3):
        raise RuntimeError(f"the open ProRes model is not the stock one: losses {losses}")
    if losses[STOCK.name] == losses.get(STOCK_BF16.name):
        raise RuntimeError(f"FP8 was not used, its loss is that of bf16: {losses}")
    return losses


def _say(message: str) -> None:
    print(f"benchmark: {message}", flush=True)


if __name__ == "__main__":
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    main(*sys.argv[1:])
