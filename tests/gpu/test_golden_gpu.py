"""The authors' model on a GPU: logits, loss and gradients of every golden case."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests import golden
from tests.distributed.launch import free_port
from tests.gpu.jobs import VARIABLES

META = golden.load_json("meta.json")

# Of the largest logit; and of a gradient's norm. Transformer Engine takes float32 as TF32, which
# has 10 bits of mantissa; bf16 has 7.
TOLERANCES = {"local": (2e-5, 1e-3), "te": (5e-3, 1e-2), "te_bf16": (5e-2, 5e-2)}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs all cases in one process: starting takes longer than computing."""
    directory = tmp_path_factory.mktemp("golden")
    environment = os.environ | VARIABLES | {"MASTER_PORT": str(free_port())}
    command = [sys.executable, "-W", "ignore", "-m", "tests.gpu.golden_cases", str(directory)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return directory


def load(directory: Path) -> dict[str, NDArray[Any]]:
    with np.load(directory / "stage0.npz") as arrays:
        return dict(arrays)


@pytest.mark.parametrize(
    "kind", [pytest.param("local", marks=pytest.mark.without_te), "te", "te_bf16"]
)
@pytest.mark.parametrize("case", META["cases"])
def test_logits_loss_and_gradients(case: str, kind: str, results: Path) -> None:
    found = load(results / f"{case}-{kind}")
    of_logits, of_gradients = TOLERANCES[kind]
    expected = golden.load_arrays(f"forward_{case}.npz")["logits"]
    assert np.abs(found["logits"] - expected).max() <= of_logits * np.abs(expected).max()
    figures = META["cases"][case]
    assert float(found["loss"]) == pytest.approx(figures["loss"], abs=of_logits)
    norms = {
        name.removeprefix("gradient "): float(np.linalg.norm(gradient.astype(np.float64)))
        for name, gradient in found.items()
        if name.startswith("gradient ")
    }
    assert norms.keys() == figures["grad_l2"].keys()
    whole = max(figures["grad_l2"].values())
    assert norms == pytest.approx(figures["grad_l2"], rel=of_gradients, abs=of_gradients * whole)
