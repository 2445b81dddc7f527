"""The command line of the study, and Megatron's flags that it stands for."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_prores.command_line.arguments import check_device
from megatron_prores.config import OFF, ProResConfig
from megatron_prores.errors import Parser, UserError
from megatron_prores.placement import PLACEMENTS
from megatron_prores.schedule.custom import is_custom
from megatron_prores.schedule.formulas import SCHEDULES
from studies.fp8.recipes import BF16, RECIPES
from studies.fp8.run import Spec

HEADS = 4
FFN_FACTOR = 3
VOCAB_SIZE = 1024

_COUNTS = (
    ("layers", 8, "layers of the model"),
    ("hidden-size", 128, f"a multiple of {16 * HEADS}; the MLP is {FFN_FACTOR} times as wide"),
    ("seq-length", 128, "tokens of a sequence"),
    ("micro-batch-size", 4, "sequences of a micro-batch"),
    ("micro-batches", 2, "micro-batches of a step"),
    ("steps", 24, "training steps of each run"),
    ("warmup-iters-per-layer", 1000, "T of the ProRes schedules"),
    ("lr-warmup-iters", 2000, "steps over which the learning rate rises to 2e-3, then constant"),
    ("threads", 1, "threads of torch on the CPU"),
    ("corpus-megabytes", 4, "of text, where --data-dir is to be made"),
)

_LISTS = (
    ("recipes", tuple(RECIPES), tuple(RECIPES)),
    ("placements", tuple(PLACEMENTS), ("pre", "post")),
    ("schedules", (OFF, *SCHEDULES), ("linear", OFF)),
)


@dataclass(frozen=True)
class Options:
    """What to compare, on which model."""

    device: str
    recipes: tuple[str, ...]
    placements: tuple[str, ...]
    schedules: tuple[str, ...]
    seeds: tuple[int, ...]
    recorded: tuple[int, ...]
    """Steps whose gradients are kept; none: early ones, and the last."""
    counts: dict[str, int]
    """The whole numbers of the command line, by their names in it."""
    data_dir: Path
    output_dir: Path
    name: str

    def specs(self) -> list[Spec]:
        """List the runs: every recipe on every placement, schedule and seed."""
        flags = tuple(self._flags())
        return [
            Spec(
                placement=placement,
                schedule=schedule,
                recipe=recipe,
                seed=seed,
                device=self.device,
                flags=flags,
                record=self._recorded(schedule),
                warmup_iters_per_layer=self.counts["warmup-iters-per-layer"],
            )
            for placement in self.placements
            for schedule in self.schedules
            for seed in self.seeds
            for recipe in self.recipes
        ]

    def _recorded(self, schedule: str) -> tuple[int, ...]:
        """List the steps whose gradients are kept."""
        last = self.counts["steps"] - 1
        steps = set(self.recorded) or {0, 1, 2, 3, 4, 5, 8, 16, last}
        if schedule.startswith("stagewise"):
            # A layer opens after the one before it: here too the step before, and two after.
            opening = self.counts["warmup-iters-per-layer"]
            steps |= {opening, opening + 1, opening + 2, opening + 3}
        return tuple(sorted(step for step in steps if step <= last))

    def _flags(self) -> list[str]:
        counts, data = self.counts, self.data_dir
        batch = counts["micro-batch-size"]
        flags = [
            *("--num-layers", counts["layers"], "--hidden-size", counts["hidden-size"]),
            *("--ffn-hidden-size", FFN_FACTOR * counts["hidden-size"]),
            *("--num-attention-heads", HEADS, "--seq-length", counts["seq-length"]),
            *("--max-position-embeddings", counts["seq-length"], "--normalization", "RMSNorm"),
            *("--swiglu", "--disable-bias-linear", "--position-embedding-type", "rope"),
            *("--untie-embeddings-and-output-weights", "--attention-dropout", 0),
            *("--hidden-dropout", 0, "--init-method-std", 0.02, "--micro-batch-size", batch),
            *("--global-batch-size", batch * counts["micro-batches"], "--lr", 2e-3),
            *("--lr-decay-style", "constant", "--lr-warmup-iters", counts["lr-warmup-iters"]),
            *("--weight-decay", 0.1, "--adam-beta2", 0.95, "--clip-grad", 1.0),
            # The end is not that of the learning rate's schedule, which must be longer.
            *("--train-iters", counts["steps"] + counts["lr-warmup-iters"]),
            *("--exit-interval", counts["steps"], "--eval-iters", 0, "--eval-interval", 10**6),
            *("--num-workers", 0, "--tokenizer-type", "SentencePieceTokenizer"),
            *("--tokenizer-model", data / "tokenizer.model"),
            *("--train-data-path", data / "train_text_document"),
        ]
        return [str(flag) for flag in flags]


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="fp8_study.py",
        description="Trains small models with every FP8 recipe and writes what each did to the "
        "gradients of the residual branches. On the CPU the recipes are emulated; on a GPU they "
        "are Transformer Engine's.",
        allow_abbrev=False,
    )
    parser.add_argument("--device", default="cuda", help="cuda or cpu; default: cuda")
    for name, known, default in _LISTS:
        parser.add_argument(
            f"--{name}",
            default=",".join(default),
            metavar="NAMES",
            help=f"with commas between, of {', '.join(known)}; default: {','.join(default)}",
        )
    parser.add_argument("--seeds", default="1", metavar="N,N", help="default: 1")
    parser.add_argument(
        "--recorded-steps",
        default="",
        metavar="N,N",
        help="steps whose gradients are kept; default: the first ones, 8, 16, and the last",
    )
    for name, number, words in _COUNTS:
        parser.add_argument(
            f"--{name}", type=int, default=number, metavar="N", help=f"{words}; default: {number}"
        )
    parser.add_argument("--output-dir", type=Path, required=True, metavar="FOLDER")
    parser.add_argument(
        "--name", default="fp8", help="of the .json, .md and .png that are written; default: fp8"
    )
    parser.add_argument(
        "--data-dir",
        type=Path,
        metavar="FOLDER",
        help="tokenized text; made there, of this machine's Python library, where it is missing; "
        "default: data in --output-dir",
    )
    return parser


def read_options(argv: Sequence[str]) -> Options:
    """Read and check the command line, without Megatron.

    Args:
        argv: Without the program's name.

    Raises:
        UserError: A value is wrong.
    """
    args = _parser().parse_args(argv)
    check_device(args.device)
    chosen = {}
    for name, known, _ in _LISTS:
        chosen[name] = tuple(dict.fromkeys(getattr(args, name).split(",")))
        for choice in chosen[name]:
            if choice not in known and not (name == "schedules" and is_custom(choice)):
                raise UserError(f"--{name} {choice}: choose some of {', '.join(known)}")
    for schedule in filter(is_custom, chosen["schedules"]):
        try:
            ProResConfig(schedule=schedule).check_layers(args.layers)
        except UserError as error:
            raise UserError(f"--schedules {schedule}: {error}") from error
    if chosen["recipes"] != (BF16,) and BF16 not in chosen["recipes"]:
        raise UserError(f"--recipes {args.recipes}: {BF16} is missing, which all are compared with")
    counts = {name: getattr(args, name.replace("-", "_")) for name, _, _ in _COUNTS}
    for name, count in counts.items():
        if count < 1:
            raise UserError(f"--{name} {count}: must be at least 1")
    if counts["hidden-size"] % (16 * HEADS):
        raise UserError(
            f"--hidden-size {counts['hidden-size']}: must be a multiple of {16 * HEADS}"
        )
    seeds = _numbers("--seeds", args.seeds)
    if not seeds or min(seeds) < 1:
        raise UserError(f"--seeds {args.seeds}: give whole numbers above 0 with commas between")
    if args.output_dir.exists() and not args.output_dir.is_dir():
        raise UserError(f"--output-dir {args.output_dir}: not a folder")
    if not args.name or Path(args.name).name != args.name:
        raise UserError(f"--name {args.name}: give the name of a file, without a folder")
    return Options(
        device=args.device,
        seeds=seeds,
        recorded=_numbers("--recorded-steps", args.recorded_steps),
        counts=counts,
        data_dir=args.data_dir or args.output_dir / "data",
        output_dir=args.output_dir,
        name=args.name,
        **chosen,
    )


def _numbers(flag: str, text: str) -> tuple[int, ...]:
    numbers = text.split(",") if text else []
    if not all(number.isascii() and number.isdigit() for number in numbers):
        raise UserError(f"{flag} {text}: give whole numbers with commas between")
    return tuple(dict.fromkeys(map(int, numbers)))
