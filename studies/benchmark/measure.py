"""How two models are compared: in turn, so that both see the same machine."""

from __future__ import annotations

import contextlib
import gc
import random
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

_RESAMPLES = 2000


@dataclass(frozen=True)
class Ratio:
    """The median of ratios, and how sure it is."""

    median: float
    low: float
    """Lower end of the median's 95 % bootstrap interval."""
    high: float
    """Upper end of it."""


def interleave(
    steps: dict[str, Callable[[], float]],
    repetitions: int,
    seed: int = 1234,
    go_on: Callable[[int], bool] = lambda done: True,
) -> dict[str, list[float]]:
    """Call every function once per repetition, each time in another random order.

    Whatever slows the machine down for a while so slows down all of them alike, and none always
    runs on the caches that a certain other one has left.

    Args:
        steps: Name -> a function that gives the seconds that it took.
        repetitions: How often each is called.
        seed: Of the order.
        go_on: Asked before each repetition, with the number of those done, whether to do it.

    Returns:
        Name -> seconds, by repetition.
    """
    order = random.Random(seed)
    names = list(steps)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    gc.freeze()
    for done in range(repetitions):
        if not go_on(done):
            break
        # The collector runs between steps, not in some of them.
        gc.collect()
        order.shuffle(names)
        gc.disable()
        try:
            for name in names:
                seconds[name].append(round(steps[name](), 6))
        finally:
            gc.enable()
    gc.unfreeze()
    return seconds


def ratio(seconds: list[float], base: list[float], seed: int = 1234) -> Ratio:
    """Return the median of the ratios within repetitions, with its bootstrap interval.

    Args:
        seconds: By repetition.
        base: The same of what is compared with.
        seed: Of the resampling.
    """
    ratios = np.asarray(seconds) / np.asarray(base)
    picks = np.random.default_rng(seed).integers(len(ratios), size=(_RESAMPLES, len(ratios)))
    low, high = np.percentile(np.median(ratios[picks], axis=1), [2.5, 97.5])
    return Ratio(statistics.median(ratios.tolist()), float(low), float(high))


@dataclass
class Peak:
    """What :func:`peak_memory` found."""

    bytes: int = 0


@contextlib.contextmanager
def peak_memory(device: str) -> Iterator[Peak]:
    """Count the memory that is allocated for tensors within the block, at its fullest.

    On the GPU by the statistics of torch's allocator, and on the CPU by the record that torch's
    profiler keeps of every call of its allocator. That is what ``torch.cuda.max_memory_allocated``
    says, on the CPU too: exact, and the same on every run, which the resident set is not.

    Args:
        device: "cuda" or "cpu".
    """
    gc.collect()
    _forget_scratch_memory()
    peak = Peak()
    # What waits for the collector would count, and when the collector comes is chance.
    gc.disable()
    try:
        if device == "cuda":
            torch.cuda.empty_cache()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            yield peak
            peak.bytes = torch.cuda.max_memory_allocated() - before
            return
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
            yield peak
    finally:
        gc.enable()
    # The summary and the operators of the profile tell of net figures only.
    events = profile.profiler.kineto_results.events()
    changes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    held = np.cumsum([size for _, size in sorted(changes, key=lambda change: change[0])])
    peak.bytes = int(held.max())


def _forget_scratch_memory() -> None:
    """Drop the buffers that Megatron keeps for the life of a process and share among models."""
    from megatron.core import parallel_state

    parallel_state.destroy_global_memory_buffer()
    parallel_state._set_global_memory_buffer()
