"""Event files as Megatron writes them: arguments as text, scalars over iterations and samples."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from megatron_prores.runs import logged

EPOCH = 1_000_000.0


def write_start(
    directory: Path,
    losses: Mapping[int, float],
    *,
    began: float = EPOCH,
    seconds: float = 36.0,
    batch: int = 10,
    settings: Mapping[str, object] | None = None,
    more: Mapping[str, Mapping[int, float]] | None = None,
    skipped: frozenset[int] = frozenset(),
) -> None:
    """Writes one start of a run.

    Args:
        directory: Of the event file.
        losses: Iteration -> training loss.
        began: When the first of them was written, in seconds; a step takes ``seconds``.
        seconds: As above.
        batch: Samples of an iteration.
        settings: Megatron's arguments, over those that every run has.
        more: Tag -> iteration -> value of other scalars.
        skipped: Iterations without an update, hence without a gradient norm.
    """
    first = min(losses)
    with SummaryWriter(str(directory), filename_suffix=f".{began:.0f}") as writer:
        for name, value in {"seq_length": 4, "save": directory, **(settings or {})}.items():
            writer.add_text(name, str(value), global_step=0, walltime=began - 1000)
        for step, loss in losses.items():
            written = began + seconds * (step - first)
            norm = math.nan if math.isnan(loss) else 2 * loss
            values = {"batch-size": float(batch), logged.TRAIN_TAG: loss}
            if step not in skipped:
                values[logged.GRAD_NORM_TAG] = norm
            for tag, value in values.items():
                writer.add_scalar(tag, value, step, walltime=written)
                writer.add_scalar(f"{tag} vs samples", value, step * batch, walltime=written)
        for tag, points in (more or {}).items():
            for step, value in points.items():
                writer.add_scalar(tag, value, step, walltime=began + seconds * (step - first))
