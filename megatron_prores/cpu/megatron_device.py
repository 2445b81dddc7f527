"""The places where Megatron itself has to differ on the CPU device, each for one reason.

Written against megatron-core 0.19.2.
"""

from __future__ import annotations

import logging
from typing import Any

import torch


def _get_rng_state(
    device: Any = "cuda", clone: bool = False, graph_safe: bool = False
) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(new_state: torch.Tensor, device: Any = -1, graph_safe: bool = False) -> None:
    torch.set_rng_state(new_state)


def _copy_to_write(write_buckets: list[Any], non_blocking: bool = True) -> list[Any]:
    return [
        (name, key, (data, [(item, tensor.detach().clone()) for item, tensor in tensors]))
        for name, key, (data, tensors) in write_buckets
    ]


def _expected_on_cpu(record: logging.LogRecord) -> bool:
    """Drop one warning: that the CPU generator moves is what the CPU device is."""
    return "CPU RNG state changed within GPU RNG context" not in record.getMessage()


def install() -> None:
    """Adapt Megatron to the CPU device.

    Must run after ``torch_device.install`` and before ``megatron.training`` is imported. A second
    call does nothing.
    """
    from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
    from megatron.core.tensor_parallel import random

    if random._get_cuda_rng_state is _get_rng_state:
        return
    # The stock pair reads a generator of the CUDA device at index 0, which there is none of.
    random._get_cuda_rng_state = _get_rng_state
    random._set_cuda_rng_state = _set_rng_state
    logging.getLogger(random.__name__).addFilter(_expected_on_cpu)

    # Copied while the training process waits: what that hands over to the writer is its memory,
    # which the next steps change. On a GPU the way to the CPU is the copy.
    FileSystemWriterAsync.preload_tensors = staticmethod(_copy_to_write)

    # A checkpoint writer that is not forked would look for a CUDA device.
    start_writer = PersistentAsyncCaller._get_process
    PersistentAsyncCaller._get_process = staticmethod(
        lambda rank, mp_mode="fork", *args: start_writer(rank, "fork", *args)
    )
