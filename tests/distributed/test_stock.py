"""Where ProRes has nothing to do, it does nothing: the run is NVIDIA's own, to the last digit."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.conftest import MODEL, OPTIMIZER, SAVED_AT, Text, loading
from tests.distributed.launch import Job, run_job
from tests.golden import load_json

STOCK = Path(__file__).with_name("stock_pretrain.py")

LAYOUTS = {
    "one rank": (1, []),
    "TP2 x PP2": (4, "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2".split()),
}

CASES: dict[str, dict[str, Any]] = load_json("stock.json")["cases"]
"""What NVIDIA's own pretrain_gpt.py printed, by case: ranks, flags, and its figures."""

# The model from NVIDIA's script, which has neither our initial weights nor our attention.
AS_STOCK = """
    --device cpu --prores-schedule none --branch-init scaled --embedding-init-method-std 0.02
    --embedding-weight-decay --attention-backend unfused
""".split()

PRINTED = {
    "loss": r"\| lm loss: (\S+)",
    "grad_norm": r"\| grad norm: (\S+)",
    "mtp_loss": r"\| mtp_1 loss: (\S+)",
    "validation_loss": r"lm loss value: (\S+)",
}
"""Figure -> where a run prints it."""

TOLERANCE = 1e-5
BF16_TOLERANCE = 2.0**-9
"""Half of what bfloat16 can tell apart: processors of other kinds sum its products otherwise."""

# The flags that say where a model's layers are; what is left is the model, its data and training.
LAYOUT_FLAGS = (
    "--tensor-model-parallel-size",
    "--pipeline-model-parallel-size",
    "--pipeline-model-parallel-layout",
    "--num-layers-per-virtual-pipeline-stage",
    "--num-virtual-stages-per-pipeline-rank",
    "--decoder-first-pipeline-num-layers",
    "--decoder-last-pipeline-num-layers",
    "--expert-model-parallel-size",
    "--expert-tensor-parallel-size",
)

WARMUP = "--device cpu --prores-schedule linear --prores-warmup-iters 16".split()


def scalars(job: Job) -> list[dict[int, float]]:
    assert job.succeeded, job.output[-3000:]
    return [job.scalars(tag) for tag in ("lm loss", "grad-norm", "lm loss validation")]


def printed(job: Job) -> dict[str, list[float]]:
    """Reads the figures of a run from what it printed, as its user sees them."""
    assert job.succeeded, job.output[-3000:]
    return {
        figure: [float(value) for value in re.findall(pattern, job.output)]
        for figure, pattern in PRINTED.items()
    }


def as_nvidia_prints(losses: list[float]) -> list[float]:
    """Turns the second loss that our log prints into what NVIDIA's own program prints there.

    That is the mean of the first two (training_loop.end_interval_with_first_line).
    """
    return [*losses[:1], *([sum(losses[:2]) / 2] if losses[1:] else []), *losses[2:]]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags that let the runs on the same mock data share its indices."""
    return ["--data-cache-path", str(tmp_path_factory.mktemp("cache"))]


@pytest.mark.parametrize("case", CASES)
def test_prints_what_nvidias_own_program_prints(
    case: str, cache: list[str], tmp_path: Path
) -> None:
    stock = CASES[case]
    flags, ranks, tolerance = [*stock["flags"], *AS_STOCK, *cache], stock["ranks"], TOLERANCE
    ours = printed(run_job(tmp_path / "ours", flags, ranks))
    for figure in ("loss", "mtp_loss"):
        ours[figure] = as_nvidia_prints(ours[figure])
    if "--bf16" in flags:
        tolerance = BF16_TOLERANCE
        theirs = printed(run_job(tmp_path / "stock", flags, ranks, program=STOCK))
        # To the last digit that is printed, as the mean of two is taken of printed ones.
        assert ours == {figure: pytest.approx(theirs[figure], rel=1e-6) for figure in ours}
    # Gradient norms are printed with three decimals.
    assert ours.pop("grad_norm") == pytest.approx(stock["grad_norm"], rel=tolerance, abs=1e-3)
    assert ours == {
        figure: pytest.approx(stock[figure], rel=tolerance) for figure in PRINTED if figure in ours
    }
    assert ours["loss"]


def without_layout(flags: list[str]) -> list[str]:
    model = list(flags)
    for flag in LAYOUT_FLAGS:
        if flag in model:
            at = model.index(flag)
            del model[at : at + 2]
    return model


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Callable[[list[str]], tuple[Path, Job]]:
    """Trains a model with ``linear`` on one rank: its checkpoint on the way, and the whole run."""
    made: dict[tuple[str, ...], tuple[Path, Job]] = {}

    def train(model: list[str]) -> tuple[Path, Job]:
        if (key := tuple(model)) not in made:
            root = tmp_path_factory.mktemp("one_rank")
            saving = ["--save", str(root / "saved"), "--save-interval", str(SAVED_AT)]
            exit_early = [*saving, "--exit-interval", str(SAVED_AT)]
            saved = run_job(root / "save", [*model, *WARMUP, *OPTIMIZER, *exit_early])
            assert saved.succeeded, saved.output[-3000:]
            load = ["--load", str(root / "saved")]
            made[key] = root / "saved", run_job(root / "go on", [*model, *WARMUP, *load])
        return made[key]

    return train


@pytest.mark.parametrize("case", [name for name, stock in CASES.items() if stock["ranks"] > 1])
def test_linear_on_the_layout_of_a_case_is_linear_on_one_rank(
    case: str,
    one_rank: Callable[[list[str]], tuple[Path, Job]],
    cache: list[str],
    tmp_path: Path,
) -> None:
    stock = CASES[case]
    # One vocabulary for all layouts: else Megatron pads it to 128 times the tensor-parallel size.
    flags = [*stock["flags"], *OPTIMIZER, "--make-vocab-size-divisible-by", "64"]
    flags += ["--train-iters", "5", "--eval-iters", "1", *cache]
    saved, alone = one_rank(without_layout(flags))
    job = run_job(tmp_path, [*flags, *WARMUP, "--load", str(saved)], stock["ranks"])
    assert job.alphas_by_step() == alone.alphas_by_step()
    assert len(job.alphas_by_step()) > 1
    for ours, theirs in zip(scalars(job), scalars(alone), strict=True):
        assert ours == pytest.approx(theirs, rel=TOLERANCE)


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
