"""Train small models with every FP8 recipe, and write what each did to the branch gradients."""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import multiprocessing
import os
import platform
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_prores.command_line import device
from megatron_prores.config.flags import told_in_flags
from megatron_prores.config.placement import PLACEMENTS
from megatron_prores.config.prores_config import OFF, ProResConfig
from megatron_prores.errors import Parser, UserError, run_program
from studies.fp8.picture import draw
from studies.fp8.recipes import BF16, RECIPES
from studies.fp8.report import as_text, write_json
from studies.text import make_text

COUNTS = {
    "layers": (6, "layers of the model"),
    "hidden-size": (128, "a multiple of 64; the MLP is 3 times as wide"),
    "seq-length": (128, "tokens of a sequence"),
    "micro-batch-size": (2, "sequences of a micro-batch, of which a step has two"),
    "steps": (24, "training steps of each run"),
    "warmup-iters-per-layer": (1000, "T of the ProRes schedules"),
    "lr-warmup-iters": (2000, "steps over which the learning rate rises to 2e-3, then constant"),
    "corpus-megabytes": (4, "of text, where --data-dir is to be made"),
}


def main() -> None:
    """Run what the command line asks for, and write NAME.json and NAME.png.

    Raises:
        UserError: A flag is wrong, or a run failed.
    """
    options = read_options(sys.argv[1:])
    try:
        options.output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output-dir {options.output_dir}: {error.strerror}") from error
    document: dict[str, Any] = {"header": header(options, sys.argv[1:]), "runs": []}
    # Here, so that the runs, which are forks, need not import Megatron again.
    device.prepare("cpu")
    make_text(options.data_dir, options.corpus_megabytes, vocabulary=1024)
    placements, schedules, seeds = options.placements, options.schedules, options.seeds
    runs = list(itertools.product(placements, schedules, seeds, options.recipes))
    for number, run in enumerate(runs, start=1):
        start = time.monotonic()
        document["runs"].append(run_apart(options, *run))
        # What is there is kept, should a later run fail.
        write_json(options.output_dir / f"{options.name}.json", document)
        name = "{}, {}, seed {}, {}".format(*run)
        print(f"{number}/{len(runs)} {name}: {time.monotonic() - start:.0f} s", flush=True)
    print(as_text(document))
    draw(document, options.output_dir / f"{options.name}.png")


def read_options(argv: Sequence[str]) -> argparse.Namespace:
    """Read and check the command line, without Megatron."""
    parser = Parser(
        prog="python -m studies.fp8",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    several = partial(parser.add_argument, nargs="+", metavar="NAME")
    several("--recipes", choices=RECIPES, default=list(RECIPES), help=f"of {', '.join(RECIPES)}")
    several("--placements", choices=PLACEMENTS, default=["pre", "post"], help="of the norms")
    several("--schedules", default=["linear", OFF], help="as --prores-schedule takes them")
    several("--seeds", type=positive, default=[1], help="of weights and data")
    several("--recorded-steps", type=int, help="to keep gradients of; None: early ones, the last")
    add = parser.add_argument
    for name, (default, meaning) in COUNTS.items():
        add(f"--{name}", type=positive, default=default, metavar="N", help=meaning)
    add("--data-dir", type=Path, default=Path("fp8-data"), help="tokenized text; made, if missing")
    add("--output-dir", type=Path, default=Path("fp8-study"), help="for NAME.json and NAME.png")
    add("--name", default="fp8")
    options = parser.parse_args(argv)
    if options.recipes != [BF16] and BF16 not in options.recipes:
        raise UserError(
            f"--recipes {' '.join(options.recipes)}: {BF16} is missing, which all are compared with"
        )
    for schedule in options.schedules:
        try:
            with told_in_flags():
                ProResConfig(schedule=schedule).check_layers(options.layers)
        except UserError as error:
            raise UserError(f"--schedules {schedule}: {error}") from error
    if options.hidden_size % 64:
        raise UserError(f"--hidden-size {options.hidden_size}: must be a multiple of 64")
    if not options.name or Path(options.name).name != options.name:
        raise UserError(f"--name {options.name}: give the name of a file, without a folder")
    return options


def positive(text: str) -> int:
    """Read a whole number from 1 on, for argparse."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return int(text)


def header(options: argparse.Namespace, argv: Sequence[str]) -> dict[str, Any]:
    """Return what a reader of the figures must know to make them again."""
    return {
        "command": f"python -m studies.fp8 {shlex.join(argv)}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "megatron-core": importlib.metadata.version("megatron-core"),
        **{name: getattr(options, name.replace("-", "_")) for name in COUNTS},
    }


def run_apart(options: argparse.Namespace, *run: Any) -> dict[str, Any]:
    """Train in a process of its own: Megatron keeps its state for the life of one."""
    from studies.fp8.run import train

    fork = multiprocessing.get_context("fork")
    with tempfile.NamedTemporaryFile("r") as log:
        try:
            with ProcessPoolExecutor(1, fork, _write_output_to, (log.name,)) as pool:
                return pool.submit(train, options, *run).result()
        except Exception as error:
            print(log.read()[-4000:], file=sys.stderr)
            raise UserError(
                f"the run {', '.join(map(str, run))} failed; the end of its log is above: {error!r}"
            ) from error


def _write_output_to(path: str) -> None:
    log = os.open(path, os.O_WRONLY | os.O_APPEND)
    os.dup2(log, sys.stdout.fileno())
    os.dup2(log, sys.stderr.fileno())


if __name__ == "__main__":
    run_program(main)
