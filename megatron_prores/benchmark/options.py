"""The command line of the benchmark, and Megatron's flags that it stands for."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import NoReturn

from megatron_prores.arguments import DEVICES
from megatron_prores.environment import is_installed
from megatron_prores.errors import UserError
from megatron_prores.placement import PLACEMENTS


@dataclass(frozen=True)
class Size:
    """A Llama-like model and its batch."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    seq_length: int
    micro_batch_size: int
    vocab_size: int


SIZES: dict[str, Size] = {
    "laptop": Size(
        num_layers=4,
        hidden_size=256,
        ffn_hidden_size=688,
        num_attention_heads=4,
        seq_length=128,
        micro_batch_size=2,
        vocab_size=4096,
    ),
}
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
        flags = [
            *("--device", self.device, "--normalization", "RMSNorm", "--swiglu"),
            *("--disable-bias-linear", "--position-embedding-type", "rope"),
            *("--untie-embeddings-and-output-weights", "--attention-dropout", "0"),
            *("--hidden-dropout", "0", "--max-position-embeddings", str(self.size.seq_length)),
            *("--global-batch-size", str(self.size.micro_batch_size)),
            *("--lr", "1e-4", "--lr-decay-style", "constant", "--train-iters", "1000000"),
            *("--eval-iters", "0", "--eval-interval", "1000000"),
            *("--mock-data", "--tokenizer-type", "NullTokenizer"),
        ]
        for field in fields(Size):
            flags += [f"--{field.name.replace('_', '-')}", str(getattr(self.size, field.name))]
        if self.device == "cuda":
            flags.append("--bf16")
            if not is_installed("transformer_engine"):
                flags += ["--transformer-impl", "local", "--no-persist-layer-norm"]
                flags += ["--no-gradient-accumulation-fusion", "--no-masked-softmax-fusion"]
        return [*flags, *self.megatron_flags]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="benchmark.py",
        description="Times training steps of stock Megatron and of ProRes on the same model, in "
        "turn, and counts their memory. What follows -- goes to Megatron as it is.",
        allow_abbrev=False,
    )
    parser.add_argument("--device", default="cuda", help="cuda or cpu; default: cuda")
    parser.add_argument(
        "--size", default="laptop", help=f"one of {', '.join(SIZES)}; default: laptop"
    )
    for field in fields(Size):
        flag = f"--{field.name.replace('_', '-')}"
        parser.add_argument(flag, type=int, metavar="N", help="default: that of --size")
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
    """Reads and checks the command line, without Megatron.

    Args:
        argv: Without the program's name.

    Returns:
        What to measure.

    Raises:
        UserError: A value is wrong.
    """
    own, megatron = list(argv), []
    if "--" in own:
        at = own.index("--")
        own, megatron = own[:at], own[at + 1 :]
    args = _parser().parse_args(own)
    if args.device not in DEVICES:
        raise UserError(f"--device {args.device}: choose one of {', '.join(DEVICES)}")
    if args.size not in SIZES:
        raise UserError(f"--size {args.size}: choose one of {', '.join(SIZES)}")
    given = {field.name: getattr(args, field.name) for field in fields(Size)}
    given = {name: value for name, value in given.items() if value is not None}
    for name, value in {**given, "repetitions": args.repetitions, "threads": args.threads}.items():
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be at least 1")
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
