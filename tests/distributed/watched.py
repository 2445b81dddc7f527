"""What the tests of measurements plant in a job: a record of its batches, and a spike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

SPIKE = 25
"""The iteration whose loss is a hundred times what it should be."""


def record(directory: str) -> None:
    """Keep the batches of the job, and what each forward pass finds on the model's modules."""
    from megatron_prores.training import gpt

    stock_batch, stock_step = gpt.get_batch, gpt.forward_step
    batches: list[Any] = []

    def get_batch(*args: Any) -> Any:
        batch = stock_batch(*args)
        batches.append((batch["tokens"], batch["labels"]))
        torch.save(batches, Path(directory, "batches.pt"))
        return batch

    def forward_step(data_iterator: Any, model: Any, *args: Any) -> Any:
        modules = [*model.modules()]
        hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules)
        bdas = [str(m.__dict__["mlp_bda"]) for m in modules if "mlp_bda" in m.__dict__]
        with Path(directory, "modules.jsonl").open("a") as file:
            file.write(json.dumps([hooks, sum("get_measured" in each for each in bdas)]) + "\n")
        return stock_step(data_iterator, model, *args)

    gpt.get_batch, gpt.forward_step = get_batch, forward_step


def record_counts(directory: str) -> None:
    """Keep how many elements of each place a rank counts in a measured step."""
    from megatron_prores.measure.layer_norms import LayerMeter

    stock = LayerMeter.figures

    def figures(meter: LayerMeter, hidden_size: int) -> Any:
        counts = meter.counts[: meter.gradient].tolist()
        Path(directory, "counts.json").write_text(json.dumps(counts))
        return stock(meter, hidden_size)

    LayerMeter.figures = figures  # type: ignore[method-assign]


def spike() -> None:
    """Multiply the loss of one iteration, on the rank that computes it."""
    from megatron.training import get_args

    from megatron_prores.training import gpt

    stock = gpt.loss_func

    def loss_func(loss_mask: Any, output: Any) -> Any:
        factor = 100.0 if get_args().curr_iteration + 1 == SPIKE else 1.0
        return stock(loss_mask, factor * output)

    gpt.loss_func = loss_func
