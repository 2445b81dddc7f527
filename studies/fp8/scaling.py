"""How recipes choose the scale of a tensor, emulated after Transformer Engine 2.20.

docs/fp8.md names the sources.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

Scaling = Callable[[Tensor], Tensor]
"""Takes a tensor [rows, columns], float32; returns what to multiply it by, broadcast over it."""


def scale_of(amax: Tensor, target: torch.dtype, otherwise: Tensor | float = 1.0) -> Tensor:
    """Return the scale that maps ``amax`` to the largest number of the format.

    Where amax is 0, infinite or NaN, that is ``otherwise``.
    """
    scale = (torch.finfo(target).max / amax).clamp(max=torch.finfo(torch.float32).max)
    return torch.where((amax > 0) & amax.isfinite(), scale, otherwise)


class Delayed:
    """One scale for the tensor, from the amaxes of earlier uses: the tensor's own comes too late.

    Transformer Engine updates the scales when the backward pass of a micro-batch reaches the first
    FP8 module of its forward pass; as every module is used once in it, that is here the end of the
    use itself.
    """

    def __init__(self, target: torch.dtype, history_len: int = 1, margin: int = 0) -> None:
        """Start at the scale 1, as Transformer Engine does.

        Args:
            target: The format.
            history_len: Uses of which the largest amax counts.
            margin: Powers of two that are left free above it.
        """
        self.target = target
        self.history: deque[Tensor] = deque(maxlen=history_len)
        self.margin = 2.0**margin
        self.scale = torch.ones(())

    def __call__(self, x: Tensor) -> Tensor:
        """Return the scale made so far, and make the next one."""
        scale = self.scale
        self.history.append(x.abs().amax())
        # Nothing can be learned from amax 0: the scale stays.
        otherwise = scale * self.margin
        self.scale = scale_of(max(self.history), self.target, otherwise) / self.margin
        return scale


def current(x: Tensor, target: torch.dtype) -> Tensor:
    """Return one scale for the tensor, from its own amax (Megatron's ``tensorwise``)."""
    return scale_of(x.abs().amax(), target)


def blocks(x: Tensor, target: torch.dtype, height: int, width: int) -> Tensor:
    """Return a scale for every block of the tensor, from the block's own amax.

    It is rounded down to a power of two. Rounding up its inverse, as E8M0 scales are made, comes to
    the same.

    Args:
        x: [rows, columns].
        target: The format.
        height: Rows of a block. One at the edge has what is left.
        width: Columns of a block.

    Returns:
        The scale of the block that each element is in, [rows, columns].
    """
    rows, columns = x.shape
    filled = pad(x.abs(), (0, -columns % width, 0, -rows % height))
    shape = (filled.shape[0] // height, height, filled.shape[1] // width, width)
    scale = scale_of(filled.view(shape).amax((1, 3), keepdim=True), target)
    scale = torch.ldexp(torch.ones_like(scale), scale.frexp().exponent - 1)
    return scale.expand(shape).reshape(filled.shape)[:rows, :columns]
