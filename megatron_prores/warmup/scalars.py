"""Scalars of a run: the alpha of every layer, in TensorBoard and W&B."""

from __future__ import annotations

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
    scalars = {alpha_tag(layer): float(alpha) for layer, alpha in enumerate(alphas, start=1)}
    if writer := get_tensorboard_writer():
        for tag, value in scalars.items():
            writer.add_scalar(tag, value, iteration)
    if wandb_writer := get_wandb_writer():
        wandb_writer.log(scalars, iteration)


def close_tensorboard() -> None:
    """Write what the TensorBoard writer still holds, such as the evaluation after training.

    Megatron flushes it at the end of the training loop and never closes it.
    """
    if writer := get_tensorboard_writer():
        writer.close()
