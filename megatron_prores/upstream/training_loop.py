"""Hooks into Megatron's training loop, where it calls nothing of the user's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_prores.upstream.registry import replace, wrap

if TYPE_CHECKING:
    from megatron.training.dist_signal_handler import DistributedSignalHandler

StepHook = Callable[[int], None]


def call_around_steps(before_forward: StepHook, after_logging: StepHook) -> None:
    """Call the hooks from Megatron's training loop.

    Megatron 0.19.2 has no hook of its own between "the iteration is known" and "the forward pass of
    the step starts" that would also run when a captured CUDA graph is replayed.

    Both hooks get the number of completed iterations, from the counter that a checkpoint restores.
    (The global ``args.curr_iteration`` would not do: it is one behind in the evaluation after a
    step.)

    Several may ask; one that asks again, with the same function of another object, is called once.

    Args:
        before_forward: Called on every rank before the forward passes of each training step and of
            each evaluation, outside anything that is captured, replayed or recomputed.
        after_logging: Called on every rank after Megatron has logged a training step.

    Raises:
        RuntimeError: The installed Megatron has other signatures than those relied on.
    """
    from megatron.training import training

    def call_before(stock: Callable[[], Any], named: dict[str, Any]) -> Any:
        before_forward(named["iteration"])
        return stock()

    def call_after(stock: Callable[[], Any], named: dict[str, Any]) -> Any:
        result = stock()
        after_logging(named["iteration"])
        return result

    for name, wrapper in (
        ("train_step", call_before),
        ("evaluate_and_print_results", call_before),
        ("training_log", call_after),
    ):
        wrap(training, name, ("iteration",), wrapper, purpose=before_forward)


def call_around_train_step(around: Callable[[Callable[[], Any], int, Any, Any], Any]) -> None:
    """Let a function run every training step.

    Args:
        around: Takes the step, the iteration that it completes, the model chunks of the rank, and
            the optimizer; returns what the step returned.
    """
    from megatron.training import training

    def train_step(stock: Callable[[], Any], named: dict[str, Any]) -> Any:
        return around(stock, named["iteration"] + 1, named["model"], named["optimizer"])

    wrap(training, "train_step", ("iteration", "model", "optimizer"), train_step, purpose=around)


@dataclass(frozen=True)
class StepFigures:
    """What Megatron logs of one training step, on every rank."""

    iteration: int
    """That the step completed."""
    losses: Mapping[str, Any]
    """Name -> mean over the tokens of the global batch, a tensor; empty but on the last stage."""
    grad_norm: float | None
    """Of all gradients, before clipping; None where one of them is NaN or infinite."""
    skipped: bool
    """Whether the weights were left as they were."""


def call_after_steps(hook: Callable[[StepFigures], None]) -> None:
    """Call the hook on every rank after Megatron has logged a training step."""
    from megatron.training import training

    needs = ("iteration", "loss_dict", "grad_norm", "skipped_iter")

    def training_log(stock: Callable[[], Any], named: dict[str, Any]) -> Any:
        result = stock()
        norm = named["grad_norm"]
        hook(
            StepFigures(
                named["iteration"],
                named["loss_dict"],
                None if norm is None else float(norm),
                bool(named["skipped_iter"]),
            )
        )
        return result

    wrap(training, "training_log", needs, training_log, purpose=hook)


def end_interval_with_first_line() -> None:
    """Let the first line of a log be the end of an interval where it is one, as all later lines.

    After a start Megatron logs the first iteration for an early look at it, and does not count it
    as logged. Where a line was due there anyway, as with ``--log-interval 1``, losses and times of
    the next line would be the mean of two intervals, and not those of a run that was not resumed.
    """
    from megatron.training import training
    from megatron.training.global_vars import get_args

    def training_log(stock: Callable[..., Any], named: dict[str, Any]) -> Any:
        early = named.get("is_first_iteration", False)
        return stock(is_first_iteration=early and named["iteration"] % get_args().log_interval != 0)

    needs = ("iteration", "is_first_iteration")
    wrap(training, "training_log", needs, training_log, purpose=end_interval_with_first_line)


def call_with_throughput(hook: Callable[[int, float], None]) -> None:
    """Call the hook on every rank after Megatron has logged steps at its log interval.

    Args:
        hook: Takes the iteration, and the TFLOP/s of a GPU in the steps since the last log, which
            Megatron hands to a logger of its own and prints to one decimal.
    """
    from megatron.training import one_logger_utils, training

    computed: list[float] = []

    def track_e2e_metrics(stock: Callable[..., Any], named: dict[str, Any]) -> Any:
        if (throughput := named.get("throughput")) is not None:
            computed.append(throughput)
        return stock()

    def training_log(stock: Callable[..., Any], named: dict[str, Any]) -> Any:
        computed.clear()
        result = stock()
        # The first step of a start has compiled and filled caches: Megatron prints it alone.
        if computed and not named.get("is_first_iteration"):
            hook(named["iteration"], computed[0])
        return result

    wrap(one_logger_utils, "track_e2e_metrics", ("throughput",), track_e2e_metrics, purpose=hook)
    wrap(training, "training_log", ("iteration", "is_first_iteration"), training_log, purpose=hook)


def call_after_training(hook: Callable[[], None]) -> None:
    """Call the hook on every rank when the training loop ends, or ends the program."""
    from megatron.training import training

    def train(stock: Callable[[], Any], named: dict[str, Any]) -> Any:
        try:
            return stock()
        finally:
            hook()

    wrap(training, "train", (), train, purpose=hook)


def ask_for_signals(handler: DistributedSignalHandler) -> None:
    """Let Megatron's training loop ask this handler, which listens, whether a signal came.

    Args:
        handler: Its class is also used in the processes that load data.
    """
    from megatron.training import global_vars
    from megatron.training.datasets import data_samplers

    replace(global_vars, ask_for_signals, _GLOBAL_SIGNAL_HANDLER=handler)
    replace(data_samplers, ask_for_signals, DistributedSignalHandler=type(handler))
