"""Makes the CPU stand in for the CUDA device that Megatron assumes.

Megatron asks torch for "the CUDA device" in three ways: it calls functions of ``torch.cuda``, it
passes ``device="cuda"`` (or an int, or ``torch.device("cuda")``) to whatever makes or moves a
tensor, and it hands a device to torch.distributed. Each is answered with the CPU here.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
import torch.cuda.nvtx
import torch.distributed
import torch.utils.data
from torch.utils._device import _device_constructors

from megatron_prores.upstream.registry import replace, wrap

CPU = torch.device("cpu")


class _Stream:
    """A CUDA stream or event where everything has already happened: CPU operations are in order."""

    cuda_stream = 0
    device = CPU

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *exc_info: object) -> None:
        pass

    def _done(self, *args: Any, **kwargs: Any) -> None:
        pass

    synchronize = wait = wait_stream = wait_event = record = _done

    def record_event(self, event: _Stream | None = None) -> _Stream:
        return event or _Stream()

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: _Stream) -> float:
        return 0.0


_STREAM = _Stream()


def _is_cuda(device: Any) -> bool:
    if isinstance(device, bool):
        return False
    if isinstance(device, int):
        return True
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, torch.device) and device.type == "cuda"


# Functions that make a tensor like another one; torch lists the others that take a device.
_LIKE = ("empty", "full", "ones", "rand", "randint", "randn", "zeros")
_METHODS = ("new_empty", "new_full", "new_ones", "new_tensor", "new_zeros")


def _on_cpu(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function that makes or moves a tensor: a CUDA device that it is handed is the CPU.

    Function by function, because a torch-function mode, which would see them all, costs a fifth of
    a step of a small model: it is called at every operation.
    """

    @functools.wraps(stock)
    def on_cpu(*args: Any, **kwargs: Any) -> Any:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        # Pinned memory exists for copies to a GPU and cannot be had without a driver.
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return stock(*args, **kwargs)

    return on_cpu


def _to_cpu(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function whose second argument may be a device: ``Tensor.to``, ``torch.load``."""
    named = _on_cpu(stock)

    @functools.wraps(stock)
    def to_cpu(*args: Any, **kwargs: Any) -> Any:
        if len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], CPU, *args[2:])
        return named(*args, **kwargs)

    return to_cpu


def _makers() -> dict[str, Any]:
    """List the functions of torch that take a device, wrapped."""
    makers = {function.__name__: function for function in _device_constructors()}
    makers = {name: each for name, each in makers.items() if getattr(torch, name, None) is each}
    makers |= {f"{name}_like": getattr(torch, f"{name}_like") for name in _LIKE}
    return {name: _on_cpu(function) for name, function in makers.items()} | {
        "load": _to_cpu(torch.load)
    }


def _self(tensor_or_module: Any, *args: Any, **kwargs: Any) -> Any:
    return tensor_or_module


def _constant(value: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: value


def _nothing() -> Callable[..., None]:
    return _constant(None)


def _zero() -> Callable[..., int]:
    return _constant(0)


_CURRENT_DEVICE = _constant(CPU)


def _manual_seed(seed: int) -> None:
    # Not torch.manual_seed: that calls torch.cuda.manual_seed_all, which leads back here.
    torch.default_generator.manual_seed(int(seed))


def _set_rng_state(new_state: torch.Tensor, device: Any = None) -> None:
    torch.set_rng_state(new_state)


def _get_rng_state(device: Any = None) -> torch.Tensor:
    return torch.get_rng_state()


def _uncompiled(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """Stand in for torch.compile, and leave a function as it is.

    Megatron's fuser compiles its elementwise functions; for the CPU that costs a minute at the
    start and gains little at the sizes of a laptop.
    """
    return function if function is not None else lambda decorated: decorated


def _tensor_type(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap Tensor.type, whose answer upstream compares with torch.cuda.FloatTensor's name."""

    def type_(tensor: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is not None:
            return stock(tensor, dtype, *args, **kwargs)
        return f"torch.cuda.{stock(tensor).rpartition('.')[2]}"

    return type_


def _cuda_replacements() -> dict[str, Any]:
    """List what ``torch.cuda`` says on the CPU device, name by name.

    Each name has a function of its own, as torch's compiler wants when it lists them.
    """
    properties = SimpleNamespace(
        name="CPU", major=0, minor=0, total_memory=0, multi_processor_count=os.cpu_count()
    )
    return {
        # One device per local rank: upstream checks that each rank has one.
        "is_available": _constant(True),
        "is_initialized": _constant(True),
        "device_count": lambda: int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        "current_device": _CURRENT_DEVICE,
        "set_device": _nothing(),
        "init": _nothing(),
        "_lazy_init": _nothing(),
        "_lazy_call": lambda call, **kwargs: call(),
        "synchronize": _nothing(),
        "empty_cache": _nothing(),
        "ipc_collect": _nothing(),
        "get_device_properties": _constant(properties),
        "get_device_capability": _constant((0, 0)),
        "get_device_name": _constant("CPU"),
        "is_current_stream_capturing": _constant(False),
        # Streams and events.
        "Stream": _Stream,
        "Event": _Stream,
        "current_stream": _constant(_STREAM),
        "default_stream": _constant(_STREAM),
        "set_stream": _nothing(),
        "stream": _constant(contextlib.nullcontext()),
        "device": _constant(contextlib.nullcontext()),
        # Memory statistics.
        "memory_stats": _constant({}),
        "memory_allocated": _zero(),
        "max_memory_allocated": _zero(),
        "memory_reserved": _zero(),
        "max_memory_reserved": _zero(),
        "device_memory_used": _zero(),
        "reset_peak_memory_stats": _nothing(),
        "mem_get_info": _constant((0, 0)),
        # What the straggler detector asks of a GPU.
        "temperature": _zero(),
        "power_draw": _zero(),
        "utilization": _zero(),
        "clock_rate": _zero(),
        # The random state is the CPU generator's.
        "manual_seed": _manual_seed,
        "manual_seed_all": _manual_seed,
        "seed": _nothing(),
        "initial_seed": lambda: torch.initial_seed(),
        "get_rng_state": _get_rng_state,
        "set_rng_state": _set_rng_state,
        # Legacy tensor types, which upstream compares with Tensor.type().
        "FloatTensor": torch.FloatTensor,
        "HalfTensor": torch.HalfTensor,
        "BFloat16Tensor": torch.BFloat16Tensor,
        "DoubleTensor": torch.DoubleTensor,
        "IntTensor": torch.IntTensor,
        "LongTensor": torch.LongTensor,
        "ByteTensor": torch.ByteTensor,
    }


@contextlib.contextmanager
def _no_range(*args: Any, **kwargs: Any) -> Iterator[None]:
    yield


def _init_on_gloo(stock: Callable[..., None], named: dict[str, Any]) -> None:
    """Run every collective on gloo, and bind no process group to a device."""
    backend = "fake" if named.get("backend") == "fake" else "gloo"
    stock(backend=backend, device_id=None)


def _barrier_on_gloo(stock: Callable[..., Any], named: dict[str, Any]) -> Any:
    """Name no device to a barrier."""
    return stock(device_ids=None)


def _draw_nothing(stock: Callable[..., None], named: dict[str, Any]) -> None:
    """Start a data loader, which draws a seed for its workers, and leave the random state as it is.

    On a GPU that comes from another generator than dropout's, and here it would move dropout's: by
    once more in a run that was resumed, so that this was another run.
    """
    state = torch.get_rng_state()
    stock()
    torch.set_rng_state(state)


def _step(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the step of an optimizer as torch does, without a word to its compiler."""

    @functools.wraps(stock)
    def step(optimizer: torch.optim.Optimizer, closure: Any = None) -> Any:
        with torch.set_grad_enabled(optimizer.defaults["differentiable"]):
            return stock(optimizer, closure)

    return step


def _keep_compiler_out() -> None:
    """Keep torch's optimizers from importing torch's compiler, which takes a third of a start.

    They tell it what not to compile. Nothing is compiled here (see :func:`_uncompiled`).
    """
    names = ("add_param_group", "load_state_dict", "state_dict", "zero_grad")
    methods = {name: inspect.unwrap(getattr(torch.optim.Optimizer, name)) for name in names}
    replace(torch.optim.Optimizer, install, **methods)
    for kind in (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD):  # Megatron's
        if "step" in vars(kind):
            replace(kind, install, step=_step(inspect.unwrap(kind.step)))


def install() -> None:
    """Replace CUDA by the CPU in this process.

    It is for good; a second call does nothing. Must run before Megatron is imported: its modules
    bind names of ``torch.cuda`` at import.

    Raises:
        RuntimeError: The installed torch has other functions than those relied on.
    """
    if torch.cuda.current_device is _CURRENT_DEVICE:
        return
    # Upstream's flag checks ask for it wherever tensor parallelism overlaps with communication.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    cuda = _cuda_replacements()
    replace(torch.cuda, install, **cuda)
    seeds_and_states = ("manual_seed", "manual_seed_all", "get_rng_state", "set_rng_state")
    replace(torch.cuda.random, install, **{name: cuda[name] for name in seeds_and_states})
    nvtx = torch.cuda.nvtx
    replace(
        nvtx, install, range_push=_nothing(), range_pop=_nothing(), mark=_nothing(), range=_no_range
    )
    moves = {"cuda": _self, "pin_memory": _self, "record_stream": _nothing()}
    makers = {name: getattr(torch.Tensor, name) for name in _METHODS}
    makers = {name: _on_cpu(method) for name, method in makers.items()}
    moved = {**moves, "to": _to_cpu(torch.Tensor.to), "type": _tensor_type(torch.Tensor.type)}
    replace(torch.Tensor, install, **moved, **makers)
    replace(torch.nn.Module, install, cuda=_self)
    _keep_compiler_out()
    # Pinned-memory loaders ask this, not torch.cuda.
    replace(torch.accelerator, install, is_available=_constant(False))
    replace(torch, install, compile=_uncompiled, **_makers())
    wrap(torch.utils.data.dataloader._BaseDataLoaderIter, "__init__", (), _draw_nothing)
    needs = ("backend", "device_id")
    wrap(torch.distributed, "init_process_group", needs, _init_on_gloo)
    wrap(torch.distributed, "barrier", ("device_ids",), _barrier_on_gloo)
