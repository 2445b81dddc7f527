"""The command line of the benchmark of the published sizes."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_prores.command_line.arguments import check_device
from megatron_prores.command_line.values import flag_of
from megatron_prores.errors import Parser, UserError, split_at_dashes
from studies.benchmark.command_line import add_size_flags, check_counts, given_size
from studies.benchmark.model import PUBLISHED, Size

BF16, FP8 = PRECISIONS = ("bf16", "fp8")

FP8_FORMATS = {"tensorwise": "hybrid", "delayed": "hybrid", "blockwise": "e4m3", "mxfp8": "e4m3"}
"""``--fp8-recipe`` -> the ``--fp8-format`` that it is run with, which Transformer Engine's recipe
would take by itself."""
FP8_RECIPE = "tensorwise"
"""The recipe of ``PRECISION=fp8`` in examples/."""

ROUNDS, QUICK_ROUNDS = 24, 10
BLOCK_SECONDS, QUICK_BLOCK_SECONDS = 1.0, 0.5
QUICK_MINUTES = 7.5
SEQUENCES = 32
"""Of a training step, in micro-batches: what one of 16 GPUs has of the paper's batch of 512."""


@dataclass(frozen=True)
class Options:
    """What to measure, and for how long."""

    device: str
    sizes: dict[str, Size]
    """Name -> model, as the paper has it, or as the user's flags change it."""
    changes: tuple[str, ...]
    """Those flags, each with its value."""
    precisions: tuple[str, ...]
    precisions_given: bool
    """Whether the user has named the precisions, rather than taken what the GPU can do."""
    fp8_recipe: str
    sequences: int
    """Of a training step."""
    rounds: int
    """How often each side has a block of steps."""
    block_seconds: float
    """A block has as many steps as take about this long."""
    budget_seconds: float | None
    """For the whole program; None without a limit."""
    peak_tflops: float | None
    memory_gib: float | None
    output: Path
    fresh: bool
    threads: int | None
    megatron_flags: tuple[str, ...]

    @property
    def measured(self) -> dict[str, Any]:
        """What a figure depends on, beside the row's size and precision, as JSON has it.

        Rows of one file have it in common. How long the program may run is not among it, nor which
        rows are asked for.
        """
        return {
            "device": self.device,
            "changed_sizes": list(self.changes),
            "fp8_recipe": self.fp8_recipe,
            "sequences": self.sequences,
            "rounds": self.rounds,
            "block_seconds": self.block_seconds,
            "peak_tflops": self.peak_tflops,
            "memory_gib": self.memory_gib,
            "threads": self.threads,
            "megatron_flags": list(self.megatron_flags),
        }


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="benchmark.py --suite sizes",
        description="Measures training steps of the published sizes on one GPU: stock Megatron "
        "and ProRes, in bf16 and FP8, in turn in one process; tokens/s, MFU and peak memory. The "
        "most important rows come first, each is written when it is done, and the same command "
        "started again goes on. (--suite placements, the default on the CPU, compares the norm "
        "placements.) What follows -- goes to Megatron as it is.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--suite", help=argparse.SUPPRESS)
    add("--device", default="cuda", help="cuda or cpu; default: cuda")
    add(
        "--sizes",
        default=",".join(PUBLISHED),
        metavar="NAMES",
        help=f"with commas between; default: {','.join(PUBLISHED)}",
    )
    add(
        "--precisions",
        metavar="NAMES",
        help=f"with commas between; default: {','.join(PRECISIONS)}, as far as the GPU has them",
    )
    add(
        "--fp8-recipe",
        default=FP8_RECIPE,
        metavar="NAME",
        help=f"one of {', '.join(FP8_FORMATS)}; default: {FP8_RECIPE}",
    )
    add(
        "--quick",
        action="store_true",
        help=f"fewer and shorter repetitions, and --time-budget-minutes {QUICK_MINUTES}",
    )
    add(
        "--time-budget-minutes",
        type=float,
        metavar="M",
        help="end by then, with the rows that are done; default: no limit",
    )
    add(
        "--rounds",
        type=int,
        metavar="N",
        help=f"how often each model has its turn; default: {ROUNDS}, with --quick {QUICK_ROUNDS}",
    )
    add(
        "--block-seconds",
        type=float,
        metavar="S",
        help="a turn is as many steps as take about so long; "
        f"default: {BLOCK_SECONDS:g}, with --quick {QUICK_BLOCK_SECONDS:g}",
    )
    add(
        "--peak-tflops",
        type=float,
        metavar="TFLOPS",
        help="dense bf16 peak of the GPU, for MFU; default: known for H100, H200, B200, A100",
    )
    add(
        "--memory-gib",
        type=float,
        metavar="GIB",
        help="take as many layers as fit in so much memory; default: that of the GPU",
    )
    add("--sequences", type=int, default=SEQUENCES, metavar="N", help="of a step; default: 32")
    add_size_flags(parser, "of every size; default: the published one's")
    add("--threads", type=int, metavar="N", help="threads of torch on the CPU")
    add(
        "--output",
        type=Path,
        default=Path("benchmark-results"),
        metavar="DIR",
        help="for results.json, table.md and log.txt; default: benchmark-results",
    )
    add("--fresh", action="store_true", help="forget the rows that --output has")
    return parser


def read_options(argv: Sequence[str]) -> Options:
    """Read and check the command line, without torch and Megatron.

    Args:
        argv: Without the program's name.

    Returns:
        What to measure.

    Raises:
        UserError: A value is wrong.
    """
    own, megatron = split_at_dashes(argv)
    args = _parser().parse_args(own)
    check_device(args.device)
    precisions = args.precisions or ",".join(PRECISIONS if args.device == "cuda" else (BF16,))
    chosen = {
        "--sizes": _chosen("--sizes", args.sizes, tuple(PUBLISHED)),
        "--precisions": _chosen("--precisions", precisions, PRECISIONS),
    }
    if FP8 in chosen["--precisions"] and args.device == "cpu":
        raise UserError(f"--precisions {precisions}: FP8 cannot be used with --device cpu")
    if args.fp8_recipe not in FP8_FORMATS:
        raise UserError(f"--fp8-recipe {args.fp8_recipe}: choose one of {', '.join(FP8_FORMATS)}")
    shape = given_size(args)
    counts = {"rounds": args.rounds, "sequences": args.sequences, "threads": args.threads}
    check_counts({**shape, **counts})
    _check_numbers(args)
    sizes = {name: replace(PUBLISHED[name], **shape) for name in chosen["--sizes"]}
    for size in sizes.values():
        if args.sequences % size.micro_batch_size:
            raise UserError(
                f"--sequences {args.sequences}: does not divide into micro-batches of "
                f"{size.micro_batch_size}; give a multiple of it, or --micro-batch-size"
            )
    if args.output.exists() and not args.output.is_dir():
        raise UserError(f"--output {args.output}: not a directory")
    minutes = args.time_budget_minutes or (QUICK_MINUTES if args.quick else None)
    return Options(
        device=args.device,
        sizes=sizes,
        changes=tuple(f"{flag_of(name)} {value}" for name, value in shape.items()),
        precisions=chosen["--precisions"],
        precisions_given=args.precisions is not None,
        fp8_recipe=args.fp8_recipe,
        sequences=args.sequences,
        rounds=args.rounds or (QUICK_ROUNDS if args.quick else ROUNDS),
        block_seconds=args.block_seconds or (QUICK_BLOCK_SECONDS if args.quick else BLOCK_SECONDS),
        budget_seconds=None if minutes is None else 60.0 * minutes,
        peak_tflops=args.peak_tflops,
        memory_gib=args.memory_gib,
        output=args.output,
        fresh=args.fresh,
        threads=args.threads,
        megatron_flags=tuple(megatron),
    )


def _chosen(flag: str, value: str, known: tuple[str, ...]) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(value.split(",")))
    for name in names:
        if name not in known:
            raise UserError(f"{flag} {name or "''"}: choose some of {', '.join(known)}")
    return names


def _check_numbers(args: argparse.Namespace) -> None:
    for name in ("time_budget_minutes", "block_seconds", "peak_tflops", "memory_gib"):
        value = getattr(args, name)
        # Also true of nan.
        if value is not None and not 0 < value < float("inf"):
            raise UserError(f"{flag_of(name)} {value}: must be a number above 0")
