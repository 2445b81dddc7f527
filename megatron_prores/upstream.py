"""The run-time replacements: the only places where a function of Megatron is exchanged.

Written against megatron-core 0.19.2, which offers no seam for them: its training loop calls nothing
of the user's between "the iteration is known" and "the forward pass of the step starts" that would
also run when a captured CUDA graph is replayed. Every replacement checks the signature that it
relies on and refuses to run against an upstream that has moved.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

import megatron.core

StepHook = Callable[[int], None]


def _wrap(module: ModuleType, name: str, needs: tuple[str, ...], wrapper: Callable[..., Any]) -> None:
    """Replaces ``module.name`` by ``wrapper(stock, arguments by name, args, kwargs)``."""
    stock = getattr(module, name, None)
    parameters = inspect.signature(stock).parameters if stock is not None else {}
    missing = [parameter for parameter in needs if parameter not in parameters]
    if stock is None or missing:
        raise RuntimeError(
            f"megatron-core {megatron.core.__version__} has moved: {module.__name__}.{name} "
            f"{'has no parameter ' + ', '.join(missing) if missing else 'is gone'}. "
            "megatron_prores/upstream.py was written against 0.19.2."
        )
    signature = inspect.signature(stock)

    @functools.wraps(stock)
    def replacement(*args: Any, **kwargs: Any) -> Any:
        named = signature.bind(*args, **kwargs).arguments
        return wrapper(functools.partial(stock, *args, **kwargs), named)

    setattr(module, name, replacement)


def call_around_steps(before_forward: StepHook, after_logging: StepHook) -> None:
    """Calls the hooks from Megatron's training loop.

    Both get the number of completed iterations, from the counter that a checkpoint restores. (The
    global ``args.curr_iteration`` would not do: it is one behind in the evaluation after a step.)

    Args:
        before_forward: Called on every rank before the forward passes of each training step and of
            each evaluation, outside anything that is captured, replayed or recomputed.
        after_logging: Called on every rank after Megatron has logged a training step.

    Raises:
        RuntimeError: The installed Megatron has other signatures than those relied on.
    """
    from megatron.training import training

    def train_step(stock: Callable[[], Any], named: dict[str, Any]) -> Any:
        before_forward(named["iteration"])
        return stock()

    def evaluate(stock: Callable[[], Any], named: dict[str, Any]) -> Any:
        before_forward(named["iteration"])
        return stock()

    def training_log(stock: Callable[[], Any], named: dict[str, Any]) -> Any:
        result = stock()
        after_logging(named["iteration"])
        return result

    _wrap(training, "train_step", ("iteration",), train_step)
    _wrap(training, "evaluate_and_print_results", ("iteration",), evaluate)
    _wrap(training, "training_log", ("iteration",), training_log)


def use_prebuilt_dataset_helpers() -> None:
    """Keeps Megatron from compiling its dataset helper where the wheel has brought it compiled.

    The wheel has the compiled module but no Makefile, so that the compilation at start-up fails
    although nothing needs compiling.
    """
    from megatron.core.datasets import utils

    try:
        import megatron.core.datasets.helpers_cpp  # noqa: F401
    except ImportError:
        return
    _wrap(utils, "compile_helpers", (), lambda stock, named: None)
