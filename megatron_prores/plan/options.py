"""The planner's own command line: its options, "--", and the command line to plan."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_prores.environment import check_environment
from megatron_prores.errors import Parser, UserError, split_at_dashes
from megatron_prores.plan.planner import MAIN_PROGRAM

_TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")


@dataclass(frozen=True)
class Options:
    """What the user asks the planner."""

    argv: list[str]
    """The command line of the main program."""
    world_size: int
    gpus_per_node: int
    time_limit: float | None
    """Seconds."""
    seconds_per_step: float | None
    json: bool
    picture: Path | None


def read_options(argv: Sequence[str], variables: Mapping[str, str]) -> Options:
    """Read and check the planner's command line.

    Args:
        argv: Without the program's name.
        variables: The environment; WORLD_SIZE and LOCAL_WORLD_SIZE stand in for the options.

    Raises:
        UserError: An option is wrong, or the part behind "--" is missing.
    """
    own, planned = _split(argv)
    parsed = _parser().parse_args(own)
    check_environment(
        {name: variables[name] for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE") if name in variables}
        | ({"RANK": "0"} if variables.get("WORLD_SIZE") else {})
    )
    world_size = parsed.world_size
    if world_size is None:
        if not variables.get("WORLD_SIZE"):
            raise UserError("--world-size is missing: give the number of GPUs of the job")
        world_size = int(variables["WORLD_SIZE"])
    gpus_per_node = parsed.gpus_per_node
    if gpus_per_node is None:
        gpus_per_node = int(variables.get("LOCAL_WORLD_SIZE") or 8)
    for flag, number in (("--world-size", world_size), ("--gpus-per-node", gpus_per_node)):
        if number < 1:
            raise UserError(f"{flag} {number}: must be at least 1")
    if parsed.seconds_per_step is not None and not 0 < parsed.seconds_per_step < float("inf"):
        raise UserError(f"--seconds-per-step {parsed.seconds_per_step:g}: must be above 0")
    if parsed.picture is not None:
        _check_picture(parsed.picture)
    return Options(
        argv=planned,
        world_size=world_size,
        gpus_per_node=gpus_per_node,
        time_limit=None if parsed.time_limit is None else _seconds(parsed.time_limit),
        seconds_per_step=parsed.seconds_per_step,
        json=parsed.json,
        picture=parsed.picture,
    )


def _split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split at the first "--"; of a whole command behind it only the flags are kept."""
    own, planned = split_at_dashes(argv)
    if {"-h", "--help"} & set(own):
        return ["--help"], []
    if "--" not in argv:
        raise UserError(
            f"the command line to plan is missing: give it behind --, as in "
            f"tools/plan.py --world-size 8 -- <flags of {MAIN_PROGRAM}>"
        )
    for index, word in enumerate(planned):
        if os.path.basename(word) == MAIN_PROGRAM:
            planned = planned[index + 1 :]
            break
    if not planned:
        raise UserError(f"behind -- there is nothing: give the flags of {MAIN_PROGRAM}")
    return own, planned


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        description="Tells what a command line of pretrain_gpt_prores.py will do, without a GPU.",
        usage=f"tools/plan.py --world-size N [options] -- <flags of {MAIN_PROGRAM}>",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--world-size", type=int, metavar="N", help="GPUs of the whole job (default: $WORLD_SIZE)"
    )
    parser.add_argument(
        "--gpus-per-node", type=int, metavar="N", help="default: $LOCAL_WORLD_SIZE, or 8"
    )
    parser.add_argument(
        "--time-limit",
        metavar="TIME",
        help="how long the job may run, as Slurm takes it: minutes, H:MM:SS, D-HH:MM:SS",
    )
    parser.add_argument(
        "--seconds-per-step", type=float, metavar="S", help="what a step takes, where it is known"
    )
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    parser.add_argument(
        "--picture", type=Path, metavar="FILE", help="draw how the stages open, a .png"
    )
    return parser


def _seconds(text: str) -> float:
    """Read a time as sbatch's --time does."""
    match = _TIME.fullmatch(text)
    if match is None:
        raise UserError(f"--time-limit {text}: give minutes, H:MM:SS or D-HH:MM:SS")
    days, *rest = match.groups()
    numbers = [int(number) for number in rest if number is not None]
    if days is not None:
        numbers += [0] * (3 - len(numbers))  # D-H, D-H:MM
    elif len(numbers) == 1:
        numbers = [0, numbers[0], 0]  # minutes
    elif len(numbers) == 2:
        numbers = [0, *numbers]  # minutes:seconds
    hours, minutes, seconds = numbers
    total = float(((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds)
    if not total:
        raise UserError(f"--time-limit {text}: must be above 0")
    return total


def _check_picture(path: Path) -> None:
    if path.suffix.lower() != ".png" or path.is_dir():
        raise UserError(f"--picture {path} must name a .png file")
    if not path.absolute().parent.is_dir():
        raise UserError(f"--picture {path}: there is no directory {path.absolute().parent}")
