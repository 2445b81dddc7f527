"""The figures of the authors' model, and what their names mean for ours."""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

DIRECTORY = Path(os.environ.get("PRORES_GOLDEN_DIR", Path(__file__).parent))

PADDING_TOKEN = 0
"""The authors' model is made with this ``padding_idx``: the row is used, but never trained."""

_PLACEMENTS = {"deeppost": "deepnorm", "scale_pre": "pre"}


@cache
def load_json(name: str) -> Any:
    return json.loads((DIRECTORY / name).read_text())


def load_arrays(name: str) -> dict[str, NDArray[Any]]:
    with np.load(DIRECTORY / name) as arrays:
        return dict(arrays)


def placement(case: str) -> str:
    """Gives our name of a case's norm placement."""
    norm = case.removesuffix("_prores")
    return _PLACEMENTS.get(norm, norm)


def has_prores(case: str) -> bool:
    return case.endswith("_prores")


def parameters(kind: str, case: str) -> dict[str, NDArray[Any]]:
    """Gives the weights that a case starts from, by Llama names; ``kind``: forward or train."""
    own = DIRECTORY / f"{kind}_params_{case}.npz"
    name = own.name if own.exists() else f"{kind}_params_{case.removesuffix('_prores')}.npz"
    return load_arrays(name)
