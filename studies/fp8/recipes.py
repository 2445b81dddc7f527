"""The recipes that are compared, by name."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from studies.fp8.formats import E4M3, E5M2
from studies.fp8.scaling import Delayed, Scaling, blocks, current

BF16 = "bf16"
"""No FP8 at all: what every recipe is compared with."""


@dataclass(frozen=True)
class Recipe:
    """An FP8 recipe as Megatron's flags describe it; the defaults are Megatron's."""

    recipe: str = "delayed"
    """``--fp8-recipe``."""
    format: str = "hybrid"
    """``--fp8-format``: ``hybrid`` has E5M2 gradients, ``e4m3`` does not."""
    amax_history_len: int = 1
    """``--fp8-amax-history-len``, in uses (micro-batches). Of more than one the largest amax counts
    (``--fp8-amax-compute-algo max``)."""
    margin: int = 0
    """``--fp8-margin``."""
    bf16_ends: bool = False
    """``--first-last-layers-bf16``: the first and the last layer do without FP8."""

    def covers(self, layer: int, num_layers: int) -> bool:
        """Return whether layer 1..L runs in FP8."""
        return not (self.bf16_ends and layer in (1, num_layers))

    def format_of(self, tensor: str) -> torch.dtype:
        """Return the format of "input", "weight" or "gradient"."""
        return E5M2 if tensor == "gradient" and self.format == "hybrid" else E4M3

    def scalings_of(self, tensor: str) -> tuple[Scaling, Scaling]:
        """Make the scalings of "input", "weight" or "gradient" of one linear layer.

        A tensor enters one GEMM along its rows and another one along its columns. Recipes that
        scale blocks quantize it for each, from the same high-precision values.

        Returns:
            Along the rows (the GEMM sums over the last dimension), and along the columns; the same
            object where the GEMMs share what is quantized.
        """
        target = self.format_of(tensor)
        scaling: Scaling
        if self.recipe == "delayed":
            scaling = Delayed(target, self.amax_history_len, self.margin)
        elif self.recipe == "tensorwise":
            scaling = partial(current, target=target)
        elif self.recipe == "blockwise" and tensor == "weight":
            scaling = partial(blocks, target=target, height=128, width=128)
        else:
            size = 128 if self.recipe == "blockwise" else 32
            along_rows = partial(blocks, target=target, height=1, width=size)
            return along_rows, partial(blocks, target=target, height=size, width=1)
        return scaling, scaling


RECIPES: dict[str, Recipe | None] = {
    BF16: None,
    "delayed": Recipe(),
    "delayed-max16": Recipe(amax_history_len=16),
    "delayed-max1024": Recipe(amax_history_len=1024),
    "delayed-margin1": Recipe(margin=1),
    "delayed-e4m3": Recipe(format="e4m3"),
    "delayed-max1024-e4m3": Recipe(format="e4m3", amax_history_len=1024),
    "tensorwise": Recipe("tensorwise"),
    "tensorwise-e4m3": Recipe("tensorwise", "e4m3"),
    "tensorwise-bf16-ends": Recipe("tensorwise", bf16_ends=True),
    "blockwise": Recipe("blockwise", "e4m3"),
    "blockwise-hybrid": Recipe("blockwise"),
    "mxfp8": Recipe("mxfp8", "e4m3"),
    "mxfp8-hybrid": Recipe("mxfp8"),
}
"""By the names of ``--recipes``. Without a format in the name it is the one that Transformer Engine
would take by itself: hybrid for one scale per tensor, e4m3 for blocks."""
