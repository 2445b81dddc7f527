"""The command line of the placements' benchmark, and Megatron's flags that it stands for."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_prores.command_line.arguments import check_device
from megatron_prores.errors import Parser, UserError, split_at_dashes
from megatron_prores.placement import PLACEMENTS
from studies.benchmark.command_line import add_size_flags, check_counts, given_size
from studies.benchmark.model import LAPTOP, Size, implementation_flags, llama_flags

SIZES = {"laptop": LAPTOP}
"""Models by the names of ``--size``."""

ATTENTION = "attention"
"""The comparison of the attentions, beside those of the placements."""


@dataclass(frozen=True)
class Options:
    """What to measure."""

    device: str
    size: Size
    comparisons: tuple[str, ...]
    """Norm placements, and :data:`ATTENTION`."""
    repetitions: int
    threads: int | None
    """Threads of torch on the CPU, None for as many as torch takes."""
    output: Path | None
    megatron_flags: tuple[str, ...]
    """Flags of Megatron's that the user has added."""

    @property
    def argv(self) -> list[str]:
        """The command line of a training run of this model, for Megatron's own parser."""
        flags = ["--device", self.device, *llama_flags(self.size)]
        flags += ["--global-batch-size", str(self.size.micro_batch_size)]
        if self.device == "cuda":
            flags += ["--bf16", *implementation_flags(self.device)]
        return [*flags, *self.megatron_flags]


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="benchmark.py --suite placements",
        description="Times training steps of stock Megatron and of ProRes on the same model, in "
        "turn, and counts their memory, for each norm placement at one size. (--suite sizes, the "
        "default on a GPU, measures the published sizes.) What follows -- goes to Megatron as it "
        "is.",
        allow_abbrev=False,
    )
    parser.add_argument("--suite", help=argparse.SUPPRESS)
    parser.add_argument("--device", default="cuda", help="cuda or cpu; default: cuda")
    parser.add_argument(
        "--size", default="laptop", help=f"one of {', '.join(SIZES)}; default: laptop"
    )
    add_size_flags(parser, "default: that of --size")
    every = ",".join((*PLACEMENTS, ATTENTION))
    parser.add_argument(
        "--placements",
        default=every,
        metavar="NAMES",
        help=f"norm placements with commas between, and {ATTENTION}: the fused attention against "
        f"Megatron's unfused one, in the local spec. Default: {every}",
    )
    parser.add_argument(
        "--repetitions",
        type=int,
        default=80,
        metavar="N",
        help="how often every model of a comparison takes its step; default: 80",
    )
    parser.add_argument("--threads", type=int, metavar="N", help="threads of torch on the CPU")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="write the figures here")
    return parser


def read_options(argv: Sequence[str]) -> Options:
    """Read and check the command line, without Megatron.

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
    if args.size not in SIZES:
        raise UserError(f"--size {args.size}: choose one of {', '.join(SIZES)}")
    given = given_size(args)
    check_counts({**given, "repetitions": args.repetitions, "threads": args.threads})
    comparisons = tuple(dict.fromkeys(args.placements.split(",")))
    for name in comparisons:
        if name not in (*PLACEMENTS, ATTENTION):
            raise UserError(
                f"--placements {name}: choose some of {', '.join((*PLACEMENTS, ATTENTION))}"
            )
    if args.output is not None and not args.output.parent.is_dir():
        raise UserError(f"--output {args.output}: no such directory {args.output.parent}")
    return Options(
        device=args.device,
        size=replace(SIZES[args.size], **given),
        comparisons=comparisons,
        repetitions=args.repetitions,
        threads=args.threads,
        output=args.output,
        megatron_flags=tuple(megatron),
    )
