"""The study's command line: trains what is missing, and writes the report of what is there."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megatron_prores.errors import EXIT_INTERRUPTED, Parser, UserError
from megatron_prores.runs.plot import save_figure
from studies.paper import cluster
from studies.paper.pictures import side_by_side
from studies.paper.report import write_report
from studies.paper.results import read_results
from studies.paper.runner import Interrupted, train
from studies.paper.scales import EXHIBITS, SCALES, Run, runs_of
from studies.text import make_text

CLUSTER = "cluster"


def main(argv: Sequence[str] | None = None) -> None:
    """Run ``python -m studies.paper``.

    Args:
        argv: Arguments; those of the process by default.

    Raises:
        UserError: A flag is wrong, or a run failed.
    """
    args = _parse(argv)
    if args.scale == CLUSTER:
        if args.dry_run:
            print("\n".join(cluster.show(args.exhibit)))
        else:
            cluster.submit(args.exhibit)
        return
    scale = SCALES[args.scale]
    if args.iterations is not None:
        scale = replace(scale, iterations=args.iterations)
    root = (args.output or Path("runs/paper") / scale.name).absolute()
    runs = runs_of(args.exhibit, scale)
    if args.dry_run:
        print("\n".join(run.name for run in runs))
        return
    if not args.report_only:
        make_text(root / "data", scale.text_megabytes, scale.vocabulary, validation=0.1)
        try:
            train(runs, scale, root, args.slots or _slots(scale.device), _show)
        except Interrupted:
            _show("interrupted; the runs have saved, and the same command goes on with them")
            sys.exit(EXIT_INTERRUPTED)
    if args.exhibit == "see":
        print(see(root, runs))
        return
    for path in write_report(root, scale, args.report_dir or root):
        print(path)


def see(root: Path, runs: Sequence[Run]) -> str:
    """Draw two runs into one picture.

    Args:
        root: Of the study's runs.
        runs: One plain, one with ProRes.

    Returns:
        A sentence with their losses, and where the picture is.
    """
    found = {result["name"]: result for result in read_results(root).all}
    plain, ours = (found[run.name] for run in runs)
    save_figure(side_by_side(plain, ours), root / "see.png")
    losses = [result["validation_loss"] for result in (plain, ours)]
    ends = ["diverged" if loss is None else f"{loss:.3f}" for loss in losses]
    return (
        f"After {plain['tokens']} tokens the plain {plain['layers']}-layer Post-LN model has a "
        f"validation loss of {ends[0]}, the one with ProRes {ends[1]}; the largest gradient norms "
        f"were {plain['largest_gradient_norm']:.1f} and {ours['largest_gradient_norm']:.1f}. "
        f"Picture: {root / 'see.png'}"
    )


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m studies.paper",
        description="Train the runs of a figure or table of the paper at a smaller scale, and "
        "write one report of the paper's figures beside ours. It goes on where it was stopped.",
    )
    add = parser.add_argument
    add(
        "exhibit",
        choices=tuple(EXHIBITS),
        help="figure or table; main: the main comparison; see, short: a first look",
    )
    sizes = "minutes, laptop: two CPU cores; kit, gpu: one GPU; cluster: the paper's own, by Slurm"
    add("--scale", choices=(*SCALES, CLUSTER), required=True, help=sizes)
    add("--output", type=Path, metavar="DIR", help="of the runs; default: runs/paper/SCALE")
    add("--report-dir", type=Path, metavar="DIR", help="of the report; default: beside the runs")
    add("--iterations", type=int, metavar="N", help="of each run, instead of the scale's: a try")
    add("--slots", type=int, metavar="N", help="runs beside each other; default: cores or GPUs")
    add("--dry-run", action="store_true", help="only list the runs")
    add("--report-only", action="store_true", help="write the report of the runs that are there")
    args = parser.parse_args(argv)
    for flag, value, least in (("--slots", args.slots, 1), ("--iterations", args.iterations, 20)):
        if value is not None and value < least:
            raise UserError(f"{flag} {value}: must be at least {least}")
    return args


def _slots(device: str) -> int:
    if device == "cpu":
        return len(os.sched_getaffinity(0))
    import torch

    if not (count := torch.cuda.device_count()):
        raise UserError("--scale gpu: no CUDA GPU was found on this machine")
    return count


def _show(line: str) -> None:
    print(line, flush=True)
