"""What a plan says: the one thing that text, JSON and picture are made from."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Plan:
    """What a command line will do on a number of GPUs."""

    world_size: int
    layout: dict[str, int]
    """Ranks along each kind of parallelism, and virtual stages per pipeline rank."""
    groups: dict[str, dict[str, int]]
    """Kind of process group -> how many there are, of how many ranks."""
    fits: list[str]
    """Every division of the layout, in words."""
    model: dict[str, Any]
    parameters: dict[str, Any]
    """``total``, ``unpadded`` without padded vocabulary, ``per_rank`` of each pipeline stage, and
    of these ``per_rank_experts``."""
    stages: list[dict[str, Any]]
    """What each pipeline and virtual stage holds."""
    layers: list[dict[str, Any]]
    """Of layer 1..L where it is, and after how many steps, samples and tokens its alpha is 1 (None:
    never)."""
    layer_map: str
    """As the audit of a run logs it."""
    table: str | None
    """As the audit of a run would draw it, at step 0; for small worlds."""
    training: dict[str, Any]
    """Batch, steps, tokens, learning rate."""
    data: list[dict[str, Any]]
    """Of each dataset of the training: ``path``, ``share`` of the tokens that are drawn, ``tokens``
    that it has, ``epochs`` (None: not known here)."""
    cache: str | None
    """Where Megatron's indices of the datasets were built, None where they were not."""
    warmup: dict[str, Any]
    memory: dict[str, Any]
    """Bytes per rank."""
    curves: dict[str, Any]
    """``steps``, and ``alphas`` of layer 1..L at each of them: what the picture shows."""
    speed: list[str]
    """Flags that would make a run on GPUs faster and are not given, and why."""
    warnings: list[str]
    notes: list[str]
    """What was not checked, and what was assumed."""

    def as_dict(self) -> dict[str, Any]:
        """Return the plan for JSON, without the curves."""
        return {name: each for name, each in dataclasses.asdict(self).items() if name != "curves"}
