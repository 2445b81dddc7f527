"""Losses written down as they come: TensorBoard holds them back, and a killed run loses them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_prores.upstream.registry import wrap

RECORD = "PRORES_TEST_LOSSES"
"""Environment variable: the file that a rank with losses appends to."""


def record_losses() -> None:
    """Appends every step's loss, exactly, to the file that the environment names."""
    from megatron.training import training

    def training_log(stock: Callable[[], Any], named: dict[str, Any]) -> Any:
        if loss := named["loss_dict"].get("lm loss"):
            with open(os.environ[RECORD], "a") as file:
                file.write(f"{named['iteration']} {float(loss).hex()}\n")
        return stock()

    wrap(training, "training_log", ("loss_dict", "iteration"), training_log)


def read_losses(path: Path) -> list[tuple[int, float]]:
    """Reads (iteration, loss) in the order of the steps; a last line that was cut off is none."""
    if not path.exists():
        return []
    lines = path.read_text().split("\n")[:-1]
    return [(int(line.split()[0]), float.fromhex(line.split()[1])) for line in lines]
