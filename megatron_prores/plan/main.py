"""The command ``tools/plan.py``: its own options, "--", and the command line to plan."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_prores.errors import Parser, UserError, split_at_dashes
from megatron_prores.plan.planner import MAIN_PROGRAM, make_plan
from megatron_prores.runs.plot import check_picture
from megatron_prores.system.environment import check_environment

_TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")


def main(argv: Sequence[str] | None = None) -> None:
    """Plan a run; print the plan, and draw it where that is asked for.

    Args:
        argv: Arguments; those of the process by default.

    Raises:
        UserError: An option is wrong, or the main program would refuse the command line.
    """
    options = read_options(sys.argv[1:] if argv is None else argv, os.environ)
    plan = make_plan(
        options.argv,
        options.world_size,
        gpus_per_node=options.gpus_per_node,
        time_limit=options.time_limit,
        seconds_per_step=options.seconds_per_step,
        with_cache=options.prepare_cache,
    )
    if options.json:
        print(json.dumps(plan.as_dict(), indent=2))
    else:
        from megatron_prores.plan.report import text

        print(text(plan))
    if options.picture is not None:
        from megatron_prores.plan.picture import draw_plan

        draw_plan(plan, options.picture)
        if not options.json:
            print(f"\npicture: {options.picture}")


def read_options(argv: Sequence[str], variables: Mapping[str, str]) -> argparse.Namespace:
    """Read and check the planner's command line.

    Args:
        argv: Without the program's name.
        variables: The environment; WORLD_SIZE and LOCAL_WORLD_SIZE stand in for the options.

    Returns:
        The options; ``argv`` is the command line to plan, ``time_limit`` is in seconds.

    Raises:
        UserError: An option is wrong, or the part behind "--" is missing.
    """
    own, planned = _split(argv)
    options = _parser().parse_args(own)
    options.argv = planned
    world, local = (variables.get(name, "") for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    check_environment({"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": local, "RANK": world and "0"})
    if options.world_size is None:
        if not world:
            raise UserError("--world-size is missing: give the number of GPUs of the job")
        options.world_size = int(world)
    if options.gpus_per_node is None:
        options.gpus_per_node = int(local or 8)
    for name in ("world_size", "gpus_per_node"):
        if (number := getattr(options, name)) < 1:
            raise UserError(f"--{name.replace('_', '-')} {number}: must be at least 1")
    seconds = options.seconds_per_step
    if seconds is not None and not 0 < seconds < float("inf"):
        raise UserError(f"--seconds-per-step {seconds:g}: must be above 0")
    return options


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
        description=f"Tells what a command line of {MAIN_PROGRAM} will do, without a GPU.",
        usage=f"%(prog)s --world-size N [options] -- <flags of {MAIN_PROGRAM}>",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--world-size", type=int, metavar="N", help="GPUs of the whole job (default: $WORLD_SIZE)")
    add("--gpus-per-node", type=int, metavar="N", help="default: $LOCAL_WORLD_SIZE, or 8")
    add(
        "--time-limit",
        type=_seconds,
        metavar="TIME",
        help="how long the job may run, as Slurm takes it: minutes, H:MM:SS, D-HH:MM:SS",
    )
    add("--seconds-per-step", type=float, metavar="S", help="what a step takes, where it is known")
    add(
        "--prepare-cache",
        action="store_true",
        help="build Megatron's indices of the datasets now, so that the job need not",
    )
    add("--json", action="store_true", help="print the plan as JSON")
    add("--picture", type=_picture, metavar="FILE", help="draw how the stages open, a .png")
    return parser


def _seconds(text: str) -> float:
    """Read a time as sbatch's --time does."""
    match = _TIME.fullmatch(text)
    if match is None:
        raise UserError(f"--time-limit {text}: give minutes, H:MM:SS or D-HH:MM:SS")
    days, *rest = match.groups()
    numbers = [int(number) for number in rest if number is not None]
    if days is None and len(numbers) < 3:
        numbers = [0, *numbers]  # minutes, M:SS
    hours, minutes, seconds = [*numbers, 0, 0][:3]  # D-H, D-H:MM
    total = float(((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds)
    if not total:
        raise UserError(f"--time-limit {text}: must be above 0")
    return total


def _picture(text: str) -> Path:
    path = Path(text)
    check_picture(path, "--picture")
    if not path.absolute().parent.is_dir():
        raise UserError(f"--picture {path}: there is no directory {path.absolute().parent}")
    return path
