"""Scalars of a run in TensorBoard and W&B, such as the alpha of every layer."""

from __future__ import annotations

from collections.abc import Mapping

from megatron.training import get_tensorboard_writer
from megatron.training.global_vars import get_wandb_writer

from megatron_prores.schedule.formulas import Alphas


def alpha_tag(layer: int) -> str:
    """Name the scalar of one layer, counted from 1."""
    return f"prores/alpha/layer_{layer}"


def log_alphas(alphas: Alphas, iteration: int) -> None:
    """Write one scalar per layer where Megatron's own writers are open (the last rank).

    Args:
        alphas: alpha(1..L, iteration), shape [L]. Like the learning rate that Megatron logs, it is
            the value after ``iteration`` updates, with which the evaluation at this iteration and
            the next training step run.
        iteration: Iterations completed, the x axis of Megatron's own scalars.
    """
    log_scalars(
        {alpha_tag(layer): float(alpha) for layer, alpha in enumerate(alphas, start=1)}, iteration
    )


def has_writer() -> bool:
    """Whether Megatron's writers are open on this rank: the last one, where any was asked for."""
    return bool(get_tensorboard_writer() or get_wandb_writer())


def log_scalars(scalars: Mapping[str, float], iteration: int) -> None:
    """Write scalars where Megatron's own writers are open.

    Args:
        scalars: By their tags.
        iteration: Iterations completed, the x axis of Megatron's own scalars.
    """
    if writer := get_tensorboard_writer():
        for tag, value in scalars.items():
            writer.add_scalar(tag, value, iteration)
    if wandb_writer := get_wandb_writer():
        wandb_writer.log(dict(scalars), iteration)


def close_tensorboard() -> None:
    """Write what the TensorBoard writer still holds, such as the evaluation after training.

    Megatron flushes it at the end of the training loop and never closes it.
    """
    if writer := get_tensorboard_writer():
        writer.close()
