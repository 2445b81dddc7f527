"""The paper's training recipe is the default, whatever the schedule; Megatron's own is at hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_prores.placement import PLACEMENTS
from tests.distributed import golden_ranks
from tests.distributed.conftest import MODEL, Text
from tests.distributed.launch import run_job, run_ranks
from tests.distributed.test_stock import STOCK, scalars

MEGATRONS_RECIPE = """
    --branch-init scaled --embedding-init-method-std 0.02 --embedding-weight-decay
""".split()


def print_weight_decay() -> None:
    """Prints for each parameter the factor on its weight decay."""
    from megatron.training import training

    stock = training.get_megatron_optimizer

    def get_megatron_optimizer(config: Any, chunks: list[Any], **kwargs: Any) -> Any:
        optimizer = stock(config, chunks, **kwargs)
        names = {id(p): name for chunk in chunks for name, p in chunk.named_parameters()}
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                print("decay", names[id(parameter)], group["wd_mult"])
        return optimizer

    training.get_megatron_optimizer = get_megatron_optimizer


@pytest.mark.parametrize(
    ("flags", "spared"),
    [
        ([], {"norm", "bias", "word_embeddings"}),
        (["--prores-schedule", "none"], {"norm", "bias", "word_embeddings"}),
        (["--embedding-weight-decay"], {"norm", "bias"}),
    ],
    ids=["ProRes", "no ProRes", "asked for"],
)
def test_weight_decay_spares_embeddings_norms_and_biases(
    flags: list[str], spared: set[str], text: Text, tmp_path: Path
) -> None:
    model = [flag for flag in MODEL if flag != "--disable-bias-linear"]
    job = run_job(
        tmp_path, [*model, *text.flags, *flags, "--train-iters", "1"], prepare=print_weight_decay
    )
    assert job.succeeded, job.output[-3000:]
    lines = [line.split() for line in job.output.splitlines() if line.startswith("decay ")]
    factors = {name: float(factor) for _, name, factor in lines}
    assert any(factor == 1.0 for factor in factors.values())
    for name, factor in factors.items():
        assert factor == (0.0 if any(kind in name for kind in spared) else 1.0), name
    assert {kind for kind in spared if any(kind in name for name in factors)} == spared


def test_megatrons_recipe_is_stock_megatron_from_the_start(text: Text, tmp_path: Path) -> None:
    argv = [*MODEL, *text.flags, "--train-iters", "4", "--prores-schedule", "none"]
    stock = run_job(tmp_path / "stock", argv, program=STOCK)
    same = run_job(tmp_path / "same", [*argv, *MEGATRONS_RECIPE])
    assert scalars(same) == scalars(stock)
    other = run_job(tmp_path / "other", argv)
    assert scalars(other) != scalars(stock)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_every_schedule_starts_from_the_same_weights(
    placement: str, text: Text, tmp_path: Path
) -> None:
    argv = [*MODEL, *text.flags, "--train-iters", "1", "--norm-placement", placement]
    weights = []
    for schedule in ("none", "linear"):
        directory = tmp_path / schedule
        job = run_ranks(
            directory,
            golden_ranks.write_initial_statistics,
            ([*argv, "--prores-schedule", schedule], 512, str(directory)),
        )
        assert job.succeeded, job.output[-3000:]
        with np.load(directory / "weights.npz") as arrays:
            weights.append(dict(arrays))
    none, linear = weights
    assert none.keys() == linear.keys()
    assert all(np.array_equal(none[name], linear[name]) for name in none)
