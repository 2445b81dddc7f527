"""Measures the main program, whole, against the plain loop, in turn in one process.

``pretrain_gpt_prores.py`` runs as a user runs it. After each block of its iterations the plain loop
trains on the batches that it has read, from the same weights: both must come to the same losses.
"""

from __future__ import annotations

import contextlib
import gc
import math
import runpy
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron.training import get_args

from megatron_prores.config.flags import config_of
from megatron_prores.convert.llama import to_llama
from megatron_prores.errors import UserError
from megatron_prores.launch.network import set_single_process_env
from megatron_prores.training import gpt
from megatron_prores.upstream import training_loop
from megatron_prores.upstream.registry import undone_afterwards, wrap
from studies.benchmark.cases import MAIN_PROGRAM, PLAIN
from studies.benchmark.plain import PlainLoop, Recipe

PROGRAM = Path(__file__).resolve().parents[2] / "pretrain_gpt_prores.py"

WARM_STEPS = 3


class _Done(BaseException):
    """Ends the main program when all is measured."""


class Turns:
    """Lets the plain loop take its turns between iterations of the main program."""

    def __init__(self, rounds: int, block_seconds: float) -> None:
        """Take a number of rounds, and how long a turn is about."""
        self.rounds, self.block_seconds = rounds, block_seconds
        self.plain: PlainLoop | None = None
        self.steps = WARM_STEPS
        self.batches: list[dict[str, Any]] = []
        self.seconds: dict[str, list[float]] = {PLAIN.name: [], MAIN_PROGRAM.name: []}
        self.alphas: dict[str, list[float]] = {}
        self.started = 0.0

    def install(self) -> None:
        """Hook into the main program, before it starts."""
        wrap(gpt, "get_batch", (), self.note_batch)
        training_loop.call_around_train_step(self.around_step)
        training_loop.call_after_steps(self.after_step)

    def note_batch(self, stock: Callable[[], Any], named: dict[str, Any]) -> Any:
        """Keep what the main program reads."""
        batch = stock()
        self.batches.append(batch)
        return batch

    def around_step(
        self, step: Callable[[], Any], iteration: int, chunks: Any, optimizer: Any
    ) -> Any:
        """Build the plain loop before the first step, from the weights of the main program."""
        if self.plain is None:
            self.plain = _plain_loop(chunks)
        return step()

    def after_step(self, figures: Any) -> None:
        """Let the plain loop take the steps of a block, at the end of the main program's.

        Raises:
            RuntimeError: Its losses are not those of the main program.
        """
        if len(self.batches) < self.steps:
            return
        assert self.plain is not None
        mine = (time.perf_counter() - self.started) / self.steps
        alphas = _alphas(range(figures.iteration - self.steps, figures.iteration))
        gc.disable()  # it would go through the main program's objects at the plain loop's expense
        theirs, loss = self.plain.train(
            (batch["tokens"], batch["labels"], each)
            for batch, each in zip(self.batches, alphas, strict=True)
        )
        gc.enable()
        expected = float(figures.losses["lm loss"])
        if not math.isclose(loss, expected, rel_tol=1e-3):
            raise RuntimeError(f"the plain loop has another loss: {loss}, not {expected}")
        if self.alphas:
            self.seconds[PLAIN.name].append(round(theirs, 6))
            self.seconds[MAIN_PROGRAM.name].append(round(mine, 6))
            if len(self.seconds[PLAIN.name]) == self.rounds:
                raise _Done
        else:
            # The first block warms both up.
            self.alphas = dict.fromkeys(self.seconds, alphas[-1])
            self.steps = max(1, round(self.block_seconds / theirs))
        self.batches.clear()
        self.started = time.perf_counter()


def _alphas(iterations: range) -> list[list[float]]:
    args = get_args()
    return [config_of(args).alphas(each, args.num_layers).tolist() for each in iterations]


def _plain_loop(chunks: Any) -> PlainLoop:
    args = get_args()
    if args.micro_batch_size != args.global_batch_size:
        raise UserError("the plain loop takes one micro-batch a step: give two equal batch sizes")
    recipe = Recipe(
        layers=args.num_layers,
        hidden=args.hidden_size,
        ffn=args.ffn_hidden_size,
        heads=args.num_attention_heads,
        vocabulary=args.padded_vocab_size,
        seq_length=args.seq_length,
        lr=args.lr,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_eps,
        weight_decay=args.weight_decay,
        clip_grad=args.clip_grad,
    )
    return PlainLoop(recipe, to_llama(chunks, "pre", args.padded_vocab_size))


def take_turns(flags: Sequence[str], rounds: int, block_seconds: float) -> dict[str, Any]:
    """Measure the time of the main program and of the plain loop in turn.

    Args:
        flags: The command line of the main program: one micro-batch a step, ``pre``.
        rounds: How many turns each takes.
        block_seconds: In each turn a side takes as many steps as take about so long.

    Returns:
        ``seconds``: side -> seconds per step, by round; ``alphas``: side -> alpha of each layer in
        the first steps; ``steps_per_block`` and ``parameters``.

    Raises:
        UserError: The main program refuses the flags, or the plain loop does.
        RuntimeError: The two do not compute the same.
    """
    set_single_process_env()
    # Reading data takes no core of its own.
    sys.argv = [str(PROGRAM), *flags, "--num-workers", "0", "--log-interval", "10"]
    turns = Turns(rounds, block_seconds)
    with undone_afterwards(), contextlib.suppress(_Done):
        turns.install()
        runpy.run_path(str(PROGRAM))["main"]()
    assert turns.plain is not None
    return {
        "seconds": turns.seconds,
        "alphas": turns.alphas,
        "steps_per_block": turns.steps,
        "parameters": sum(each.numel() for each in turns.plain.model.parameters()),
    }
