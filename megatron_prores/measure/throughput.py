"""Throughput as users speak of it: tokens/s, TFLOP/s and MFU of a GPU (``--log-throughput``)."""

from __future__ import annotations

from datetime import datetime
from functools import cached_property

import torch
from megatron.training import get_args
from megatron.training.training import num_floating_point_operations
from megatron.training.utils import print_rank_last

from megatron_prores.measure.peak import peak_tflops
from megatron_prores.warmup.scalars import log_scalars


class ThroughputLog:
    """Says beside Megatron's TFLOP/s what they are in tokens, and of the peak of the GPU.

    MFU is their share of the dense peak: of FP8's where there is FP8, although attention and the
    output head stay in bf16. Recomputation is no part of Megatron's count of operations.
    """

    @cached_property
    def peak(self) -> float | None:
        """Find the GPU's peak, TFLOP/s, when there is one; say so once where it is not known."""
        args = get_args()
        gpu = "the CPU" if args.device == "cpu" else torch.cuda.get_device_name()
        is_half = args.bf16 or args.fp16 or args.peak_tflops
        peak = peak_tflops(gpu, args.peak_tflops, fp8=bool(args.fp8)) if is_half else None
        if peak is None:
            numbers = "" if is_half else " in float32"
            print_rank_last(
                f"> no MFU is logged: the peak of {gpu}{numbers} is not known (--peak-tflops "
                "gives it)"
            )
        return peak

    def after_log(self, iteration: int, tflops: float) -> None:
        """Log the figures of the steps since the last log.

        Args:
            iteration: The last of them.
            tflops: Of a GPU, as Megatron has computed it.
        """
        args = get_args()
        tokens = args.seq_length * tflops * 1e12 / num_floating_point_operations(args, 1)
        figures = {"tokens_per_second": tokens, "tflops": tflops}
        line = f"throughput per GPU: {tokens:.0f} tokens/s, {tflops:.4g} TFLOP/s"
        if self.peak is not None:
            figures["mfu_percent"] = 100 * tflops / self.peak
            line += f", MFU {figures['mfu_percent']:.1f}% of {self.peak:g} TFLOP/s"
        print_rank_last(f" [{datetime.now():%Y-%m-%d %H:%M:%S}] {line}")
        log_scalars({f"throughput_per_gpu/{name}": v for name, v in figures.items()}, iteration)
