"""A stand-in for CUDA graphs on the CPU: records operations once, replays them on the same memory.

As a CUDA graph, a replay runs no Python: each recorded operation reads the tensors that it read at
the capture, wherever their values have gone since, and writes where it wrote then. What the
captured code decided (which path a layer takes) stays decided, and a tensor that was exchanged for
another is read no more.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Graph:
    """Takes the place of ``torch.cuda.CUDAGraph``."""

    def __init__(self) -> None:
        self.operations: list[tuple[Callable[..., Any], Any, Any, Any]] = []

    def register_generator_state(self, state: Any) -> None:
        """Random numbers are drawn anew at a replay; the tests draw none."""

    def replay(self) -> None:
        print("replayed", flush=True)
        with torch.no_grad():
            for function, args, kwargs, outputs in self.operations:
                again = tree_leaves(function(*args, **kwargs))
                for old, new in zip(tree_leaves(outputs), again, strict=True):
                    if isinstance(old, torch.Tensor) and old is not new:
                        old.copy_(new)


class IterationGraph(Graph):
    """A graph of forward and backward passes that add to gradients.

    CUDA only records during a capture; here the operations run as well, so that the first replay,
    which Megatron has follow at once, has been done.
    """

    def __init__(self) -> None:
        super().__init__()
        self.just_recorded = True

    def replay(self) -> None:
        if self.just_recorded:
            self.just_recorded = False
        else:
            super().replay()


class Capture(TorchDispatchMode):
    """Takes the place of ``torch.cuda.graph``: what runs in here is recorded."""

    def __init__(self, graph: Graph, **options: Any) -> None:
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        aliases = [value.alias_info for value in func._schema.returns]
        # A view shows what is written to its base; an operation in place is done again.
        if not any(alias is not None and not alias.is_write for alias in aliases):
            self.graph.operations.append((func, args, kwargs or {}, outputs))
        return outputs


def use(graph: type[Graph] = IterationGraph) -> None:
    """Puts both where Megatron looks for CUDA's, and lets the CPU device capture."""
    from megatron.core import full_cuda_graph
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer import cuda_graphs

    from megatron_prores.command_line import cpu as flags

    torch.cuda.CUDAGraph = graph  # type: ignore[misc, assignment]
    torch.cuda.graph = Capture  # type: ignore[misc, assignment]
    torch.cuda.memory_stats = lambda *args: defaultdict(int)  # type: ignore[assignment]
    torch.cuda.graph_pool_handle = lambda: 0  # type: ignore[misc, assignment]
    torch.autograd.graph.set_override_stale_capture_stream = lambda on: None
    # Memory pools keep a graph's memory from others; here Python keeps it.
    for name in ("_cuda_beginAllocateCurrentThreadToPool", "_cuda_endAllocateToPool"):
        setattr(torch._C, name, lambda *args: None)
    full_cuda_graph.get_graph_pool = lambda single: None
    # Generators that a graph can capture are CUDA's alone.
    full_cuda_graph.get_all_rng_states = dict
    torch.cuda.default_generators = (torch.default_generator,)  # type: ignore[assignment]
    cuda_graphs._ensure_generator_state_is_cudagraph_safe = lambda generator: generator
    tracker = random.initialize_rng_tracker

    def initialize_rng_tracker(
        te: bool = False,
        inference: bool = False,
        graphable: bool = False,
        force_reset: bool = False,
    ) -> None:
        tracker(False, inference, False, force_reset)

    random.initialize_rng_tracker = initialize_rng_tracker
    flags.NOT_ON_CPU = tuple(rule for rule in flags.NOT_ON_CPU if rule[0] != "--cuda-graph-impl")


def use_for_layers() -> None:
    """For graphs of single layers, whose capture leaves nothing behind but its outputs."""
    use(Graph)


PREPARE: dict[str, Callable[[], None]] = {"full_iteration": use, "local": use_for_layers}


def plant(fault: Callable[[], None], prepare: Callable[[], None]) -> None:
    fault()
    prepare()


def exchange_alphas() -> None:
    """A fault: alpha is another tensor after each change, not the same tensor changed."""
    from megatron_prores.model.layer import ProResLayerMixin

    def set_alpha(layer: Any, value: float) -> None:
        layer.alpha = torch.full_like(layer.alpha, value)
        layer._alpha_value = value

    ProResLayerMixin.set_alpha = set_alpha  # type: ignore[method-assign]


def let_layers_open() -> None:
    """A fault: an open layer takes the stock path, also where a graph is to be captured."""
    from megatron_prores.model.layer import ProResLayerMixin

    stock = ProResLayerMixin.__init__

    def init(layer: Any, *args: Any, **kwargs: Any) -> None:
        stock(layer, *args, **kwargs)
        layer._always_scale = False

    ProResLayerMixin.__init__ = init  # type: ignore[method-assign]
