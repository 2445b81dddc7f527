"""The two FP8 formats of training, and what a cast to one of them loses."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

E4M3 = torch.float8_e4m3fn
E5M2 = torch.float8_e5m2


def overflow(target: torch.dtype) -> float:
    """Return the bound above which a number would round to more than the largest one."""
    info = torch.finfo(target)
    spacing = 2.0 ** (math.frexp(info.max)[1] - 1) * info.eps
    return info.max + spacing / 2


@dataclass(frozen=True)
class Loss:
    """What one cast of a tensor lost. Counts of elements, and squared L2 norms."""

    amax: float
    """Largest magnitude before the cast."""
    scale: float | None
    """The largest one; None: there was no cast."""
    nonzero: int
    """Before the cast."""
    saturated: int
    """Beyond the largest number, by more than rounding."""
    flushed: int
    """Not zero before, zero after."""
    squared_norm: float
    squared_error: float


@dataclass(frozen=True)
class Quantized:
    """A tensor that was cast to FP8, and what a GEMM sees of it."""

    x: Tensor
    """Before the cast, float32."""
    seen: Tensor
    """After the cast, divided by the scale again."""
    scale: Tensor | None = None
    """Broadcast over ``x``; None: there was no cast."""
    saturates_above: float = math.inf
    """Of ``x * scale``."""

    def loss(self) -> Loss:
        """Count what the cast lost."""
        # Of x itself: a scale below 1 can turn a number of float32 into 0.
        is_nonzero = self.x != 0
        scaled = self.x if self.scale is None else self.x * self.scale
        return Loss(
            amax=float(self.x.abs().amax()),
            scale=None if self.scale is None else float(self.scale.amax()),
            nonzero=int(is_nonzero.sum()),
            saturated=int((scaled.abs() > self.saturates_above).sum()),
            flushed=int((is_nonzero & (self.seen == 0)).sum()),
            squared_norm=float(self.x.double().square().sum()),
            squared_error=float((self.seen.double() - self.x.double()).square().sum()),
        )


def quantize(x: Tensor, scale: Tensor, target: torch.dtype) -> Quantized:
    """Cast ``x * scale``, both float32, to an FP8 format; the scale is broadcast over ``x``.

    It rounds to nearest and saturates, as Transformer Engine's kernels do (``cvt.rn.satfinite``);
    torch's own cast to E5M2 gives infinity instead.
    """
    largest = torch.finfo(target).max
    seen = (x * scale).clamp(-largest, largest).to(target).float() / scale
    return Quantized(x, seen, scale, overflow(target))
