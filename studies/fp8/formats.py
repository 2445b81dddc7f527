"""The two FP8 formats of training, and what a cast to one of them loses."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Fp8Format:
    """A float format of eight bits, as torch has it."""

    name: str
    dtype: torch.dtype
    mantissa_bits: int

    @property
    def largest(self) -> float:
        """The largest finite number: 448 of E4M3, 57344 of E5M2."""
        return torch.finfo(self.dtype).max

    @property
    def overflow(self) -> float:
        """What is larger would round beyond the largest number, had the format a next one."""
        exponent = torch.tensor(self.largest).frexp().exponent.item() - 1
        return self.largest + 2.0 ** (exponent - self.mantissa_bits - 1)

    @property
    def smallest_normal(self) -> float:
        """Numbers below have less than the format's precision."""
        return torch.finfo(self.dtype).smallest_normal

    def cast(self, x: Tensor) -> Tensor:
        """Round float32 ``x`` to the nearest number of the format, as float32.

        It saturates, as Transformer Engine's kernels do (``cvt.rn.satfinite``); torch's own cast
        gives NaN or infinity instead.
        """
        return x.clamp(-self.largest, self.largest).to(self.dtype).float()


E4M3 = Fp8Format("E4M3", torch.float8_e4m3fn, mantissa_bits=3)
E5M2 = Fp8Format("E5M2", torch.float8_e5m2, mantissa_bits=2)


@dataclass(frozen=True)
class Loss:
    """What one cast of a tensor lost. Counts of elements, and squared L2 norms."""

    elements: int
    nonzero: int
    saturated: int
    """Beyond the largest number, by more than rounding."""
    flushed: int
    """Not zero before, zero after."""
    subnormal: int
    """Not zero after, but below the normal numbers."""
    squared_norm: float
    squared_error: float


def quantize(x: Tensor, scale: Tensor, target: Fp8Format) -> Tensor:
    """Cast ``x * scale`` to FP8, and return what a GEMM that divides by the scale again sees.

    Args:
        x: Any shape, float32.
        scale: float32, broadcast over ``x``.
        target: The format.
    """
    return target.cast(x * scale) / scale


def loss_of(x: Tensor, scale: Tensor, target: Fp8Format) -> Loss:
    """Say what :func:`quantize` loses of the same tensor."""
    return loss_between(x, quantize(x, scale, target), scale, target)


def loss_between(x: Tensor, seen: Tensor, scale: Tensor | None, target: Fp8Format) -> Loss:
    """Compare a tensor with what is left of it.

    Args:
        x: The tensor.
        seen: The same, quantized and dequantized.
        scale: What ``x`` was multiplied by before the cast; None: not known, and with it nothing
            of what saturated or is subnormal, which then counts as none.
        target: The format.
    """
    # Of x itself: a scale below 1 can turn a number of float32 into 0.
    is_nonzero, is_kept = x != 0, seen != 0
    saturated = subnormal = 0
    if scale is not None:
        saturated = int(((x * scale).abs() > target.overflow).sum())
        # Dequantized numbers are off by a last bit of float32.
        bound = target.smallest_normal * (1 - 2.0**-10)
        subnormal = int((is_kept & ((seen * scale).abs() < bound)).sum())
    return Loss(
        elements=x.numel(),
        nonzero=int(is_nonzero.sum()),
        saturated=saturated,
        flushed=int((is_nonzero & ~is_kept).sum()),
        subnormal=subnormal,
        squared_norm=float(x.double().square().sum()),
        squared_error=float((seen.double() - x.double()).square().sum()),
    )
