"""How two checkpoints differ: arguments, tensors, values."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass, field

import torch

from megatron_prores.checkpoint.reader import StoredCheckpoint

_ABSENT = "(absent)"


@dataclass
class TensorDifference:
    """A tensor whose values differ."""

    name: str
    count: int
    """Values that differ."""
    largest: float
    """The largest absolute difference; infinity or NaN where only one of the two is finite."""


@dataclass
class Difference:
    """All that differs between checkpoint A and checkpoint B."""

    arguments: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Argument -> its value in A and in B."""
    only_a: list[str] = field(default_factory=list)
    """Tensors that only A has."""
    only_b: list[str] = field(default_factory=list)
    kinds: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Tensor -> its type and shape in A and in B, where these differ."""
    values: list[TensorDifference] = field(default_factory=list)
    equal: int = 0
    """Tensors with the same values, bit for bit."""

    @property
    def found(self) -> bool:
        """Whether anything differs but the arguments, of which some always do."""
        return bool(self.only_a or self.only_b or self.kinds or self.values)


def compare(a: StoredCheckpoint, b: StoredCheckpoint) -> Difference:
    """Compare two checkpoints, whatever layouts they were saved from, a tensor at a time.

    Raises:
        DamagedError: One of them cannot be read.
    """
    difference = Difference(arguments=_arguments(_args(a), _args(b)))
    in_a, in_b = a.tensors, b.tensors
    difference.only_a = sorted(in_a.keys() - in_b.keys())
    difference.only_b = sorted(in_b.keys() - in_a.keys())
    for name in sorted(in_a.keys() & in_b.keys()):
        kinds = [f"{kind.properties.dtype} {list(kind.size)}" for kind in (in_a[name], in_b[name])]
        if kinds[0] != kinds[1]:
            difference.kinds[name] = (kinds[0], kinds[1])
            continue
        one, two = a.tensor(name), b.tensor(name)
        if torch.equal(_bits(one), _bits(two)):
            difference.equal += 1
            continue
        unlike = _bits(one).reshape(-1, one.itemsize) != _bits(two).reshape(-1, one.itemsize)
        count = int(unlike.any(dim=1).sum())
        largest = float((one.double() - two.double()).abs().max())
        difference.values.append(TensorDifference(name, count, largest))
    return difference


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """View a tensor as bytes: NaN is then like NaN, and -0 unlike 0."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _args(stored: StoredCheckpoint) -> Namespace:
    return stored.args if stored.has_common else Namespace()


def _arguments(a: Namespace, b: Namespace) -> dict[str, tuple[str, str]]:
    found = {}
    for name in sorted(vars(a).keys() | vars(b).keys()):
        values = [repr(vars(args)[name]) if name in vars(args) else _ABSENT for args in (a, b)]
        if values[0] != values[1]:
            found[name] = (values[0], values[1])
    return found
