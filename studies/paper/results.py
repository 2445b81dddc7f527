"""What a run came to: its curves, its final losses, and how it was made."""

from __future__ import annotations

import json
import math
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_prores.checkpoint.reader import iterations
from megatron_prores.evaluation import layer_cosine
from megatron_prores.runs.logged import (
    EMPTY,
    GRAD_NORM_TAG,
    TRAIN_TAG,
    VALID_TAG,
    Series,
    load_run,
    summary,
)
from studies.paper.scales import PRORES, Run

FILE = "result.json"
"""In a run's directory, written when it has ended."""

DIVERGED = "diverged"

RESIDUAL_RMS = "prores/residual_rms/layer_"
"""Tag of a layer's figure, without its number."""

Result = dict[str, Any]

_POINTS = 200
"""Of a curve as it is kept: means over equal parts of the run."""


def collect(run: Run, directory: Path, is_diverged: bool) -> dict[str, Any]:
    """Read the logs of a run that has ended.

    Args:
        run: The run.
        directory: Of the run, with TensorBoard's files.
        is_diverged: Whether its loss became NaN.

    Returns:
        What is kept of it, for json: losses in nats per token (``validation_loss`` is None where it
        diverged), the spike scores, the largest gradient norm, and curves of at most 200 points.
    """
    logged = load_run(directory, run.name)
    numbers, scalars = summary(logged), logged.scalars
    times = [float(line) for line in (directory / "seconds.txt").read_text().split()]
    return {
        "name": run.name,
        "placement": run.placement,
        "arm": run.arm,
        "layers": run.layers,
        "seed": run.seed,
        "schedule": run.schedule,
        "warmup": run.warmup,
        "norms": run.norms,
        "validation_loss": None if is_diverged else numbers["valid_loss"],
        "training_loss": numbers["train_loss"],
        "largest_gradient_norm": numbers["grad_norm_max"],
        "spike_score_loss": numbers["loss_spike_score"],
        "spike_score_gradient_norm": numbers["grad_norm_spike_score"],
        "tokens": int(numbers["tokens"]),
        "seconds": sum(times),
        "commit": _commit(),
        "curves": {
            "training loss": thinned(scalars[TRAIN_TAG]),
            "validation loss": thinned(scalars.get(VALID_TAG, EMPTY)),
            "gradient norm": thinned(scalars[GRAD_NORM_TAG]),
            **{tag: thinned(scalars[tag]) for tag in scalars if tag.startswith(RESIDUAL_RMS)},
        },
        "cosine": _cosine(directory) if run.norms and not is_diverged else None,
    }


def _cosine(directory: Path) -> list[float]:
    """Compute, per layer, the cosine of what it adds after a tenth of the run and at its end."""
    steps = sorted(iterations(directory / "checkpoints"))
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder, "cosine.json")
        layer_cosine.main(
            [
                *("--load", str(directory / "checkpoints"), "--json", str(found)),
                *("--ckpt-step", str(steps[0]), "--other-step", str(steps[-1])),
                *("--text", str(directory.parent / "data" / "valid.jsonl"), "--cache", folder),
            ]
        )
        cosines: list[float] = json.loads(found.read_text())["cosine"]
    return cosines


def thinned(series: Series, points: int = _POINTS) -> list[list[float]]:
    """Return iterations and values as means over equal parts, at most ``points`` of each."""
    parts = max(1, min(points, len(series.steps)))
    return [
        [round(float(part.mean()), 5) for part in np.array_split(values, parts) if len(part)]
        for values in (series.steps, series.values)
    ]


def _commit() -> str:
    """Return the commit of this clone, with a plus where files differ from it."""
    where = Path(__file__).parent
    command = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    found = subprocess.run(command, cwd=where, capture_output=True, text=True)
    return found.stdout.strip() or "unknown"


class Results:
    """The results that are there, by what they were made for."""

    def __init__(self, results: Sequence[Result]) -> None:
        self.all = list(results)

    def of(self, **wanted: Any) -> list[Result]:
        """Return the results with these values; schedule linear, T 1% unless asked otherwise."""
        wanted = {"norms": False, **wanted}
        if wanted.get("arm") == PRORES:
            wanted = {"schedule": "linear", "warmup": 0.01, **wanted}
        return [r for r in self.all if all(r[name] == value for name, value in wanted.items())]

    def losses(self, **wanted: Any) -> dict[int, float]:
        """Return seed -> validation loss, nats per token; infinite where a run diverged."""
        losses = {result["seed"]: result["validation_loss"] for result in self.of(**wanted)}
        return {
            seed: math.inf if (loss := losses[seed]) is None else loss for seed in sorted(losses)
        }

    def cases(self) -> list[tuple[str, int]]:
        """Return placements and depths of the runs, those of the main comparison first."""
        found = dict.fromkeys((r["placement"], r["layers"]) for r in self.all if not r["norms"])
        return sorted(found, key=lambda case: (-len(self.losses(placement=case[0])), case))


def read_results(root: Path) -> Results:
    """Read the results of a study: of its runs, or the one file of a committed report."""
    kept = root / "runs.json"
    found = {r["name"]: r for r in json.loads(kept.read_text())["runs"]} if kept.is_file() else {}
    for path in sorted(root.glob(f"*/{FILE}")):
        result = json.loads(path.read_text())
        found[result["name"]] = result
    return Results(list(found.values()))
