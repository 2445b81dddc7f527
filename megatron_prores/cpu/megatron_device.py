"""The places where Megatron itself has to differ on the CPU device, each for one reason."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from megatron_prores.upstream.registry import replace, wrap


def _get_rng_state(
    device: Any = "cuda", clone: bool = False, graph_safe: bool = False
) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(new_state: torch.Tensor, device: Any = -1, graph_safe: bool = False) -> None:
    torch.set_rng_state(new_state)


def _copy_to_write(stock: Callable[[], Any], named: dict[str, Any]) -> list[Any]:
    """Copy what is to be saved while the training process waits.

    Megatron hands the writer its memory, which the next steps change; on a GPU the way to the CPU
    is the copy.
    """
    return [
        (name, key, (data, [(item, tensor.detach().clone()) for item, tensor in tensors]))
        for name, key, (data, tensors) in named["write_buckets"]
    ]


def _fork_writer(stock: Callable[..., Any], named: dict[str, Any]) -> Any:
    """Fork the checkpoint writer: one that is not forked would look for a CUDA device."""
    return stock(mp_mode="fork")


def _expected_on_cpu(record: logging.LogRecord) -> bool:
    """Drop one warning: that the CPU generator moves is what the CPU device is."""
    return "CPU RNG state changed within GPU RNG context" not in record.getMessage()


def install() -> None:
    """Adapt Megatron to the CPU device.

    Must run after ``torch_device.install`` and before ``megatron.training`` is imported.

    Raises:
        RuntimeError: The installed Megatron has other functions than those relied on.
    """
    from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
    from megatron.core.tensor_parallel import random

    # The stock pair reads a generator of the CUDA device at index 0, which there is none of.
    replace(random, install, _get_cuda_rng_state=_get_rng_state, _set_cuda_rng_state=_set_rng_state)
    logging.getLogger(random.__name__).addFilter(_expected_on_cpu)
    wrap(FileSystemWriterAsync, "preload_tensors", ("write_buckets",), _copy_to_write)
    wrap(PersistentAsyncCaller, "_get_process", ("mp_mode",), _fork_writer)
