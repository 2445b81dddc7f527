"""How each recipe chooses the scales of a tensor, emulated after Transformer Engine 2.20.

A tensor enters one GEMM along its rows and another one along its columns. Recipes that scale blocks
quantize it twice, from the same high-precision values. docs/fp8.md names the sources.
"""

from __future__ import annotations

from collections import deque
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from studies.fp8.formats import Fp8Format

_LARGEST_FLOAT32 = torch.finfo(torch.float32).max


class Scaling(Protocol):
    """Chooses the scales of one tensor of one linear layer, use after use."""

    def scales(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return what to multiply ``x`` by before the cast.

        Args:
            x: [rows, columns], float32.

        Returns:
            Scales for the GEMM that sums along the rows (over the last dimension) and for the one
            that sums along the columns, each to be broadcast over ``x``.
        """


def scale_of(amax: Tensor, target: Fp8Format, otherwise: Tensor) -> Tensor:
    """Return the scale that maps ``amax`` to the largest number of the format.

    Args:
        amax: Largest magnitudes, any shape, float32.
        target: The format.
        otherwise: The scale where amax is 0, infinite or NaN.
    """
    scale = (target.largest / amax).clamp(max=_LARGEST_FLOAT32)
    return torch.where((amax > 0) & amax.isfinite(), scale, otherwise)


def power_of_two_below(x: Tensor) -> Tensor:
    """Return the largest power of two that is not above ``x``, which is positive."""
    return torch.ldexp(torch.ones_like(x), x.frexp().exponent - 1)


class Delayed:
    """One scale for the tensor, from the amaxes of earlier uses: the tensor's own comes too late.

    Transformer Engine updates the scales when the backward pass of a micro-batch reaches the first
    FP8 module of its forward pass; as every module is used once in it, that is here the end of the
    use itself.
    """

    def __init__(self, target: Fp8Format, history_len: int, algo: str, margin: int) -> None:
        """Start at the scale 1, as Transformer Engine does.

        Args:
            target: The format.
            history_len: Uses that are remembered, ``--fp8-amax-history-len``.
            algo: ``most_recent`` or ``max``, ``--fp8-amax-compute-algo``.
            margin: Powers of two that are left free above, ``--fp8-margin``.
        """
        self.target = target
        self.history: deque[Tensor] = deque(maxlen=history_len)
        self.algo = algo
        self.margin = margin
        self.scale = torch.ones(())

    def scales(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scale made so far, twice, and make the next one."""
        scale = self.scale
        self.history.append(x.abs().amax())
        amax = self.history[-1] if self.algo == "most_recent" else max(self.history)
        # Nothing can be learned from amax 0: the scale stays.
        margin = 2.0**self.margin
        self.scale = scale_of(amax, self.target, self.scale * margin) / margin
        return scale, scale


class Current:
    """One scale for the tensor, from its own amax (Megatron's ``tensorwise``)."""

    def __init__(self, target: Fp8Format) -> None:
        """Take the format."""
        self.target = target

    def scales(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scale twice; 1 for a tensor of zeros."""
        scale = scale_of(x.abs().amax(), self.target, torch.ones(()))
        return scale, scale


class Blocks:
    """A scale, a power of two, for every block of a tensor, from the block's own amax."""

    def __init__(self, target: Fp8Format, size: int, square: bool, rounds_up: bool) -> None:
        """Say what a block is.

        Args:
            target: The format.
            size: Elements along a block: 128 (``blockwise``) or 32 (``mxfp8``).
            square: size x size blocks, the same for both GEMMs, instead of 1 x size.
            rounds_up: Round the inverse of the scale up (E8M0 of ``mxfp8``) instead of the scale
                down. Both keep the amax within the format.
        """
        self.target = target
        self.size = size
        self.square = square
        self.rounds_up = rounds_up

    def scales(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scales along the rows and along the columns."""
        if self.square:
            scale = self._scales(x, self.size, self.size)
            return scale, scale
        return self._scales(x, 1, self.size), self._scales(x, self.size, 1)

    def _scales(self, x: Tensor, height: int, width: int) -> Tensor:
        """Return the scale of the block that each element is in, [rows, columns]."""
        rows, columns = x.shape
        filled = pad(x.abs(), (0, -columns % width, 0, -rows % height))
        shape = (filled.shape[0] // height, height, filled.shape[1] // width, width)
        scale = self._scale(filled.view(shape).amax((1, 3), keepdim=True))
        return scale.expand(shape).reshape(filled.shape)[:rows, :columns]

    def _scale(self, amax: Tensor) -> Tensor:
        one = torch.ones_like(amax)
        if not self.rounds_up:
            return power_of_two_below(scale_of(amax, self.target, one))
        inverse = amax / self.target.largest
        below = power_of_two_below(inverse)
        exponent = below.log2() + (below != inverse)
        # E8M0 has the exponents from -127 to 127.
        return torch.where(amax > 0, torch.exp2(-exponent.clamp(-127, 127)), one)
