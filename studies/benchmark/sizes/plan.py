"""Which rows are measured, in which order, and how many layers of a size fit on the GPU."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from megatron_prores.errors import UserError
from studies.benchmark.model import Size, implementation_flags, llama_flags
from studies.benchmark.sizes.flops import flops_per_token
from studies.benchmark.sizes.options import BF16, FP8, FP8_FORMATS, Options

_FIRST = (("1.3B", BF16), ("7B", BF16), ("7B", FP8), ("130M", BF16), ("1.3B", FP8), ("3B", BF16))
"""What a short run should know: the rows that have targets, then the ends of the range."""


@dataclass(frozen=True)
class Side:
    """One of the competitors of a row."""

    name: str
    model: str
    """Which of the row's models takes the step: ``stock``, ``prores``, or ``stock bf16``."""
    opened: bool = False
    """Whether the warmup is over, rather than under way."""


STOCK = Side("stock Megatron", "stock")
AGAIN = Side("stock Megatron again", "stock")
WARMUP = Side("ProRes during warmup", "prores")
AFTER = Side("ProRes after warmup", "prores", opened=True)
STOCK_BF16 = Side("stock Megatron in bf16", "stock bf16")
"""In rows of FP8: what FP8 is compared with."""


def sides(precision: str) -> tuple[Side, ...]:
    """List the competitors of a row, the base first."""
    return (STOCK, AGAIN, WARMUP, AFTER, *((STOCK_BF16,) if precision == FP8 else ()))


def models(precision: str) -> tuple[str, ...]:
    """List the models of a row, all of which are on the GPU while it is timed."""
    return tuple(dict.fromkeys(side.model for side in sides(precision)))


@dataclass(frozen=True)
class Row:
    """One size in one precision."""

    size_name: str
    precision: str
    published: Size
    """The whole model."""
    size: Size
    """What is measured: perhaps fewer of its layers."""

    @property
    def name(self) -> str:
        """The row's name in the table and in the file: "1.3B bf16"."""
        return f"{self.size_name} {self.precision}"

    def as_json(self) -> dict[str, Any]:
        """Return the row as the file has it."""
        return asdict(self)


def plan(options: Options, memory_bytes: int, precisions: Sequence[str]) -> list[Row]:
    """List the rows in the order of their importance.

    Args:
        options: The sizes.
        memory_bytes: The GPU's.
        precisions: Those that the GPU has.

    Raises:
        UserError: Not a single layer of a size fits.
    """
    if options.memory_gib is not None:
        memory_bytes = int(options.memory_gib * 2**30)
    every = list(itertools.product(options.sizes, precisions))
    order = [row for row in _FIRST if row in every]
    order += [row for row in every if row not in order]
    rows = []
    for name, precision in order:
        size = options.sizes[name]
        layers = layers_that_fit(size, precision, memory_bytes)
        if layers < 1:
            raise UserError(
                f"--sizes {name}: not even one layer of it fits in {memory_bytes / 2**30:.1f} GiB"
            )
        rows.append(Row(name, precision, size, replace(size, num_layers=layers)))
    return rows


# Bytes per parameter that a model keeps: weight in bf16, gradient and master weight in float32,
# Adam's two moments in float32; with FP8 its weights once more, as they are and transposed.
_STATE_BYTES = {BF16: 2 + 4 + 4 + 8, FP8: 2 + 4 + 4 + 8 + 4}
_LIMIT = 0.85
"""Of the GPU's memory: the rest is for what the estimate leaves out, and for the allocator."""
_APART = 2 * 2**30
"""CUDA's context and the workspaces of its libraries."""


def memory_needed(size: Size, precision: str) -> int:
    """Estimate the bytes that a row takes while it is timed: all models, and one at work.

    At work, in bytes per token: 24 h + 6 f per layer (inputs and outputs of its norms, linears and
    attention, in bf16), and 14 V for the logits (bf16, float32 and gradient).
    """
    state = sum(
        _STATE_BYTES[FP8 if precision == FP8 and model != STOCK_BF16.model else BF16]
        for model in models(precision)
    )
    tokens = size.micro_batch_size * size.seq_length
    layer = (24 * size.hidden_size + 6 * size.ffn_hidden_size) * (1.2 if precision == FP8 else 1.0)
    at_work = tokens * (size.num_layers * layer + 14 * size.vocab_size)
    return int(state * size.parameters + at_work)


def layers_that_fit(size: Size, precision: str, memory_bytes: int) -> int:
    """Return how many of a size's layers fit, all models of a row at once; 0 if not even one."""
    # A machine's memory is there for more than this; a small figure is a test's or a user's own.
    available = _LIMIT * memory_bytes - min(_APART, 0.05 * memory_bytes)
    for layers in range(size.num_layers, 0, -1):
        if memory_needed(replace(size, num_layers=layers), precision) <= available:
            return layers
    return 0


def megatron_argv(row: Row, options: Options) -> list[str]:
    """Return the command line of a training run of the row's model, for Megatron's own parser."""
    # The tokenizer adds one id to its vocabulary.
    size = replace(row.size, vocab_size=row.size.vocab_size - 1)
    flags = ["--device", options.device, *llama_flags(size), "--bf16"]
    flags += ["--global-batch-size", str(options.sequences), *implementation_flags(options.device)]
    if options.device == "cuda":
        # As examples/ do. Not on the CPU: gloo frees its copies of gradients in threads of its
        # own, which the count of memory there does not see.
        flags.append("--use-distributed-optimizer")
    if options.device == "cuda" and "--transformer-impl" not in flags:
        # Megatron's own attention reads a mask; Transformer Engine's kernels know what is causal.
        flags.append("--no-create-attention-mask-in-dataloader")
    if row.precision == FP8:
        flags += ["--fp8-format", FP8_FORMATS[options.fp8_recipe]]
        flags += ["--fp8-recipe", options.fp8_recipe]
    return [*flags, *options.megatron_flags]


_START_SECONDS = 45.0
"""Of a row, for what no step takes: imports, building its models, compiling. An estimate."""
_SPEED = 0.33
"""Of the GPU's bf16 peak, a low estimate."""


def expected_seconds(row: Row, options: Options, peak_tflops: float | None) -> float:
    """Estimate how long a row takes, to tell whether it should still be started.

    Args:
        row: The row.
        options: How often it repeats.
        peak_tflops: The GPU's bf16 peak; without one only the start is counted.
    """
    if peak_tflops is None:
        return _START_SECONDS
    tokens = options.sequences * row.size.seq_length
    flops = tokens * flops_per_token(row.size, row.size.vocab_size)
    step = flops / (_SPEED * peak_tflops * 1e12)
    turns = len(sides(row.precision))
    block = max(step, options.block_seconds)
    return _START_SECONDS + 4 * turns * step + MIN_ROUNDS * turns * block


MIN_ROUNDS = 5
"""Fewer are no measurement."""
