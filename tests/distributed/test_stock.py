"""Where ProRes has nothing to do, it does nothing: the run is stock Megatron's, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.conftest import MODEL, OPTIMIZER, SAVED_AT, Text, loading
from tests.distributed.launch import Job, run_job

STOCK = Path(__file__).with_name("stock_pretrain.py")

LAYOUTS = {
    "one rank": (1, []),
    "TP2 x PP2": (4, "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2".split()),
}


def scalars(job: Job) -> list[dict[int, float]]:
    assert job.succeeded, job.output[-3000:]
    return [job.scalars(tag) for tag in ("lm loss", "grad-norm", "lm loss validation")]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_open_layers_and_none_are_stock_megatron(
    layout: str, text: Text, checkpoint: Path, tmp_path: Path
) -> None:
    ranks, flags = LAYOUTS[layout]
    # Upstream decays the embedding; initial weights come from the checkpoint.
    argv = [*MODEL, *text.flags, *OPTIMIZER, *loading(checkpoint), *flags]
    argv += ["--embedding-weight-decay", "--prores-override-checkpoint"]
    stock = run_job(tmp_path / "stock", [*argv, "--prores-schedule", "none"], ranks, program=STOCK)
    none = run_job(tmp_path / "none", [*argv, "--prores-schedule", "none"], ranks)
    # All layers are open from the iteration of the checkpoint on. The attention is Megatron's own,
    # from which the CPU device's differs by rounding (test_attention.py).
    attention = ["--attention-backend", "unfused"]
    opened = run_job(
        tmp_path / "open", [*argv, *attention, "--prores-warmup-iters", str(SAVED_AT)], ranks
    )
    assert scalars(none) == scalars(stock)
    assert scalars(opened) == scalars(stock)
    assert not any("prores" in tag for tag in none.tags())
    assert {alpha for held in opened.alphas_by_step().values() for alpha in held.values()} == {1.0}
