"""The command ``tools/compare_runs.py``."""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_prores.errors import Parser, UserError
from megatron_prores.runs.logged import EMA_WEIGHT, Run, load_run, tensorboard_dir
from megatron_prores.runs.numbers import compare, settings_that_differ, table
from megatron_prores.runs.picture import draw_runs
from megatron_prores.runs.plot import check_picture, save_figure
from megatron_prores.system.files import atomic_write


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command ``tools/compare_runs.py``.

    Raises:
        UserError: A run or an output is not usable.
    """
    args = _parser().parse_args(argv)
    if args.output is not None:
        check_picture(args.output)
    if args.json is not None and args.json.is_dir():
        raise UserError(f"--json {args.json} is a directory: name a file")
    if not 0 <= args.ema < 1:
        raise UserError(f"--ema {args.ema:g}: give a weight from 0 (no smoothing) to below 1")
    runs = _load(args.runs)
    numbers = compare(runs, args.ema)
    settings = settings_that_differ(runs, args.all_flags)
    print(table(numbers, settings))
    if args.json is not None:
        _write_json(args.json, {"runs": numbers, "settings": settings})
    if args.output is not None:
        save_figure(draw_runs(runs, args.ema), args.output)
        print(f"\n{args.output}")


def _load(words: Sequence[str]) -> list[Run]:
    places: dict[Path, str] = {}
    runs = []
    for word in words:
        name, equals, place = word.partition("=")
        named = equals and not Path(word).exists()
        path = Path(place if named else word)
        directory = tensorboard_dir(path).resolve()
        if directory in places:
            raise UserError(f"{places[directory]} and {word} are one run: give each once")
        places[directory] = word
        runs.append(load_run(path, name if named and name else None))
    name, count = Counter(run.name for run in runs).most_common(1)[0]
    if count > 1:
        raise UserError(f"{count} runs are called {name}: name them, as in first=PATH second=PATH")
    return runs


def _write_json(path: Path, content: dict[str, Any]) -> None:
    runs = {
        name: {key: value if math.isfinite(value) else None for key, value in numbers.items()}
        for name, numbers in content["runs"].items()
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            file.write(json.dumps({**content, "runs": runs}, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"--json {path}: cannot write: {error.strerror}") from error


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        description="Compare runs by their TensorBoard logs, finished or still going on: a table "
        "of their numbers and of the arguments in which they differ, and a picture of their curves."
    )
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN",
        help="directory of a run (RUN_DIR of the launch scripts, a --save in it, or a "
        "--tensorboard-dir), or NAME=DIRECTORY; gaps are measured from the first")  # fmt: skip
    add("--output", type=Path, metavar="FILE", help="picture to write, .png")
    add("--json", type=Path, metavar="FILE", help="write the table's numbers there as well")
    add("--ema", type=float, default=EMA_WEIGHT, metavar="WEIGHT",
        help="of the moving average of the training loss, per logged step; 0: none "
        "(default: %(default)s, the paper's)")  # fmt: skip
    add("--all-flags", action="store_true",
        help="show the arguments that only say where a run writes, too")  # fmt: skip
    return parser
