"""How models are compared: timed in turn, so that all see the same machine; memory counted."""

from __future__ import annotations

import contextlib
import gc
import random
import statistics
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch


class Ratio(NamedTuple):
    """The median of ratios, and the ends of its 95 % bootstrap interval."""

    median: float
    low: float
    high: float


def interleave(sides: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Call every function once per round, each time in another random order.

    What slows the machine down for a while so slows down all of them, and none always runs on the
    caches that a certain other one has left.

    Args:
        sides: Name -> a function that returns the seconds that it took.
        rounds: How often each is called.

    Returns:
        Name -> seconds, by round.
    """
    order = random.Random(1234)
    names = list(sides)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    gc.freeze()
    for _ in range(rounds):
        order.shuffle(names)
        # The collector runs between rounds, not in some of the steps.
        gc.collect()
        gc.disable()
        try:
            for name in names:
                seconds[name].append(round(sides[name](), 6))
        finally:
            gc.enable()
    gc.unfreeze()
    return seconds


def ratio(seconds: list[float], base: list[float]) -> Ratio:
    """Return the median of the ratios within rounds, with its bootstrap interval.

    Args:
        seconds: By round.
        base: The same of what is compared with.
    """
    ratios = np.asarray(seconds) / np.asarray(base)
    picks = np.random.default_rng(1234).integers(len(ratios), size=(2000, len(ratios)))
    low, high = np.percentile(np.median(ratios[picks], axis=1), [2.5, 97.5])
    return Ratio(statistics.median(ratios.tolist()), float(low), float(high))


@contextlib.contextmanager
def peak_memory(device: str) -> Iterator[Callable[[], int]]:
    """Count the memory that is allocated for tensors within the block, at its fullest.

    On the GPU by the statistics of torch's allocator, and on the CPU by the record that torch's
    profiler keeps of every call of its allocator: exact, and the same on every run, which the
    resident set is not.

    Args:
        device: "cuda" or "cpu".

    Yields:
        A function that returns the bytes, once the block is left.
    """
    from megatron.core import parallel_state

    # The buffers that Megatron keeps for the life of a process and shares among models.
    parallel_state.destroy_global_memory_buffer()
    parallel_state._set_global_memory_buffer()
    gc.collect()
    gc.disable()  # what waits for the collector would count, and when it comes is chance
    try:
        if device == "cuda":
            torch.cuda.empty_cache()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            yield lambda: torch.cuda.max_memory_allocated() - before
            return
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
            yield lambda: _peak_of(profile)
    finally:
        gc.enable()


def _peak_of(profile: torch.profiler.profile) -> int:
    # The summary and the operators of the profile have net figures only.
    events: Any = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    return int(np.cumsum([size for _, size in sorted(changes, key=lambda change: change[0])]).max())
