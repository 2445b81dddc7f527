"""The program ``tools/checkpoint.py``: lists, verifies and compares checkpoints."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_prores.checkpoint import safe_load
from megatron_prores.checkpoint.compare import Difference, compare
from megatron_prores.checkpoint.manifest import DamagedError
from megatron_prores.checkpoint.newest import newest
from megatron_prores.checkpoint.reader import (
    RELEASE,
    StoredCheckpoint,
    is_distributed,
    is_iteration,
    iteration_name,
    iterations,
)
from megatron_prores.checkpoint.summary import as_text, human_size, summarize
from megatron_prores.checkpoint.verify import Report, verify
from megatron_prores.errors import Parser, UserError

_SHOWN = 20
_CHECKPOINT_HELP = "What --save named, or the directory of one iteration in it."


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        description="Lists, verifies and compares checkpoints. Needs no GPU, executes nothing that "
        "a checkpoint holds, and changes nothing.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    listing = commands.add_parser(
        "list", help="Iterations, sizes, layout, and where the warmup of each layer stands."
    )
    listing.add_argument("directory", type=Path, help=_CHECKPOINT_HELP)
    verifying = commands.add_parser(
        "verify",
        help="Whether every file is there and unchanged, and every tensor readable and finite.",
        description="Exits with 1 when a checkpoint is damaged.",
    )
    verifying.add_argument("directory", type=Path, help=_CHECKPOINT_HELP)
    verifying.add_argument("--ckpt-step", type=int, metavar="N", help="Only that of iteration N.")
    comparing = commands.add_parser(
        "diff",
        help="How two checkpoints differ, also where they were saved from other layouts.",
        description="Exits with 1 when tensors differ.",
    )
    comparing.add_argument("a", type=Path, metavar="A", help=f"{_CHECKPOINT_HELP} Then the newest.")
    comparing.add_argument("b", type=Path, metavar="B")
    for command in (listing, verifying, comparing):
        command.add_argument("--json", action="store_true", help="Print one JSON object.")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the program and return its exit code.

    Raises:
        UserError: There is no such checkpoint.
    """
    args = _parser().parse_args(argv)
    safe_load.install()
    if args.command == "list":
        return _list(args.directory, args.json)
    if args.command == "verify":
        return _verify(args.directory, args.ckpt_step, args.json)
    return _diff(args.a, args.b, args.json)


def _all(directory: Path) -> list[Path]:
    directory = directory.absolute()
    if directory.is_dir() and is_iteration(directory):
        return [directory]
    found = list(iterations(directory).values())
    if (directory / RELEASE).is_dir():
        found.append(directory / RELEASE)
    if not found:
        raise UserError(f"{directory}: there is no checkpoint in it")
    return found


def _newest(directory: Path, found: list[Path]) -> tuple[str | None, str, str]:
    """Return the newest one's name, what is wrong with the tracker file, and a note about it."""
    try:
        choice = newest(found[0].parent)
    except DamagedError as error:
        return None, str(error), ""
    if choice is None:
        return None, "there is no tracker file", ""
    name = choice.directory.name
    if name not in [path.name for path in found] and not is_iteration(directory.absolute()):
        return name, f"the tracker file names {name}, which is missing", ""
    return name, "", choice.note


def _list(directory: Path, as_json: bool) -> int:
    found = _all(directory)
    name, problem, note = _newest(directory, found)
    summaries = [summarize(path) for path in found]
    if as_json:
        _print({
            "newest": name,
            "tracker_problem": problem,
            "tracker_note": note,
            "checkpoints": [asdict(summary) for summary in summaries],
        })  # fmt: skip
        return 0
    by = "its manifest" if note else "the tracker file"
    for summary in summaries:
        print(as_text(summary, by if summary.name == name else ""))
    if problem or note:
        print(f"note: {problem or note}")
    return 0


def _verify(directory: Path, step: int | None, as_json: bool) -> int:
    found = _all(directory)
    if step is not None:
        found = [path for path in found if path.name == iteration_name(step)]
        if not found:
            raise UserError(f"--ckpt-step {step}: {directory} has no checkpoint of that iteration")
    name, problem, note = _newest(directory, found if step is None else _all(directory))
    reports = {}
    for path in found:
        reports[path.name] = report = verify(path)
        if not as_json:
            print(_verdict(path, report), flush=True)
    intact = [name for name, report in reports.items() if report.intact]
    if as_json:
        _print({
            "newest": name,
            "tracker_problem": problem,
            "tracker_note": note,
            "newest_intact": intact[-1] if intact else None,
            "checkpoints": {
                name: {"intact": report.intact, **asdict(report)}
                for name, report in reports.items()
            },
        })  # fmt: skip
    else:
        if problem:
            print(f"DAMAGED {problem}")
        if note:
            print(f"note: {note}")
        if problem or len(intact) < len(reports):
            print(f"The newest intact checkpoint is {intact[-1]}." if intact else "None is intact.")
    return 1 if problem or len(intact) < len(reports) else 0


def _verdict(path: Path, report: Report) -> str:
    if not report.intact:
        shown = report.damage[:_SHOWN]
        if len(report.damage) > len(shown):
            shown.append(f"... and {len(report.damage) - len(shown)} more")
        return "\n".join(f"DAMAGED {path.name}: {damage}" for damage in shown)
    how = "files unchanged since they were saved (sha256)"
    if not report.by_manifest:
        how = "no integrity.json in it: files compared with their own checksums (CRC-32)"
    if not is_distributed(path):
        return f"intact  {path.name}: {report.files} files of the old format, tensors not read"
    return (
        f"intact  {path.name}: {report.files} files, {human_size(report.size)}, {report.tensors} "
        f"tensors readable and finite; {how}"
    )


def _one(path: Path) -> StoredCheckpoint:
    """Return the checkpoint that a path means: of one iteration, or the newest in a directory."""
    directory = path.absolute()
    try:
        if not is_iteration(directory):
            choice = newest(directory)
            if choice is None:
                raise UserError(f"{path}: there is no checkpoint, or no tracker file, in it")
            directory = choice.directory
    except DamagedError as error:
        raise UserError(f"{path}: {error}") from error
    if not directory.is_dir():
        raise UserError(f"{path}: there is no checkpoint {directory.name}")
    if not is_distributed(directory):
        raise UserError(f"{path}: Megatron's old format of a file per rank cannot be compared")
    return StoredCheckpoint(directory)


def _diff(a: Path, b: Path, as_json: bool) -> int:
    one, two = _one(a), _one(b)
    try:
        difference = compare(one, two)
    except DamagedError as error:
        raise UserError(f"{a} or {b}: damaged: {error}; see the subcommand verify") from error
    if as_json:
        _print(asdict(difference))
    else:
        print(_difference(difference))
    return 1 if difference.found else 0


def _difference(difference: Difference) -> str:
    lines = [
        f"argument {name}: {there} | {here}" for name, (there, here) in difference.arguments.items()
    ]
    lines += [f"tensor {name}: only in A" for name in difference.only_a]
    lines += [f"tensor {name}: only in B" for name in difference.only_b]
    lines += [f"tensor {name}: {one} | {two}" for name, (one, two) in difference.kinds.items()]
    lines += [
        f"tensor {each.name}: {each.count} values differ, by up to {each.largest:.3g}"
        for each in difference.values
    ]
    lines.append(f"{difference.equal} tensors are equal, {len(difference.values)} differ in value")
    return "\n".join(lines)


def _print(content: dict[str, Any]) -> None:
    # NaN is no JSON; a difference of NaN is written as null.
    print(json.dumps(json.loads(json.dumps(content), parse_constant=lambda _: None), indent=2))
