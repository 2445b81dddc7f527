"""The recipes that are compared, by name: Megatron's flags, and their emulation."""

from __future__ import annotations

from dataclasses import dataclass

from studies.fp8.formats import E4M3, E5M2, Fp8Format
from studies.fp8.scaling import Blocks, Current, Delayed, Scaling

BF16 = "bf16"
"""No FP8 at all: what every recipe is compared with."""


@dataclass(frozen=True)
class Recipe:
    """An FP8 recipe as Megatron's flags describe it; the defaults are Megatron's."""

    recipe: str = "delayed"
    """``--fp8-recipe``."""
    format: str = "hybrid"
    """``--fp8-format``: ``hybrid`` has E5M2 gradients, ``e4m3`` does not."""
    history_len: int = 1
    """``--fp8-amax-history-len``, in uses (micro-batches)."""
    algo: str = "most_recent"
    """``--fp8-amax-compute-algo``."""
    margin: int = 0
    """``--fp8-margin``."""
    bf16_ends: bool = False
    """``--first-last-layers-bf16``: the first and the last layer do without FP8."""

    def flags(self) -> list[str]:
        """Return Megatron's flags for the real recipe."""
        flags = ["--fp8-format", self.format, "--fp8-recipe", self.recipe]
        if self.recipe == "delayed":
            flags += ["--fp8-amax-history-len", str(self.history_len)]
            flags += ["--fp8-amax-compute-algo", self.algo, "--fp8-margin", str(self.margin)]
        return [*flags, "--first-last-layers-bf16"] if self.bf16_ends else flags

    def covers(self, layer: int, num_layers: int) -> bool:
        """Return whether layer 1..L runs in FP8."""
        return not (self.bf16_ends and layer in (1, num_layers))

    def format_of(self, tensor: str) -> Fp8Format:
        """Return the format of "input", "weight" or "gradient"."""
        return E5M2 if tensor == "gradient" and self.format == "hybrid" else E4M3

    def scaling_of(self, tensor: str) -> Scaling:
        """Make the scaling of "input", "weight" or "gradient" of one linear layer."""
        target = self.format_of(tensor)
        if self.recipe == "delayed":
            return Delayed(target, self.history_len, self.algo, self.margin)
        if self.recipe == "tensorwise":
            return Current(target)
        if self.recipe == "blockwise":
            return Blocks(target, 128, square=tensor == "weight", rounds_up=False)
        return Blocks(target, 32, square=False, rounds_up=True)


RECIPES: dict[str, Recipe | None] = {
    BF16: None,
    "delayed": Recipe(),
    "delayed-max16": Recipe(history_len=16, algo="max"),
    "delayed-max1024": Recipe(history_len=1024, algo="max"),
    "delayed-margin1": Recipe(margin=1),
    "delayed-e4m3": Recipe(format="e4m3"),
    "delayed-max1024-e4m3": Recipe(format="e4m3", history_len=1024, algo="max"),
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
