"""One model, many layouts: the same losses, gradients, alphas and sizes of layers on each."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_prores.schedule.formulas import alphas
from tests.distributed import faults
from tests.distributed.conftest import (
    LAST,
    MEASURED,
    MODEL,
    OPTIMIZER,
    SAVED_AT,
    WARMUP,
    Text,
    loading,
    saving,
)
from tests.distributed.launch import Job, run_job

# float32 on another layout adds up the same numbers in another order; measured below 4e-7.
TOLERANCE = 1e-5
NORM_TOLERANCE = 1e-4

PP2 = "--pipeline-model-parallel-size 2"
LAYOUTS = {
    "TP2": (2, "--tensor-model-parallel-size 2"),
    "TP2 with sequence parallelism": (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
    "PP2": (2, PP2),
    "PP2 with 2 virtual stages": (2, f"{PP2} --num-layers-per-virtual-pipeline-stage 1"),
    "DP2 with the distributed optimizer": (2, ""),
    "TP2 x PP2": (4, f"--tensor-model-parallel-size 2 {PP2}"),
    "PP3, uneven first and last stage": (
        3,
        "--pipeline-model-parallel-size 3 --decoder-first-pipeline-num-layers 1 "
        "--decoder-last-pipeline-num-layers 1",
    ),
    "full recompute": (
        1,
        "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
    ),
}

MOE = """
    --num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 64 --moe-aux-loss-coeff 0.01
    --moe-token-dispatcher-type allgather --no-load-optim
""".split()

MTP = ["--mtp-num-layers", "1"]


def assert_same_curves(job: Job, reference: Job, first: int = SAVED_AT + 1) -> None:
    """Compares losses, gradient norms and alphas, from an iteration on."""
    assert job.succeeded, job.output[-3000:]
    for tag in ("lm loss", "grad-norm", "lm loss validation"):
        values = job.scalars(tag)
        assert values, tag
        expected = {step: value for step, value in reference.scalars(tag).items() if step >= first}
        assert values == pytest.approx(expected, rel=TOLERANCE), tag
    assert len(job.scalars("lm loss")) == LAST - first + 1
    alphas = {step: held for step, held in reference.alphas_by_step().items() if step >= first - 1}
    assert job.alphas_by_step() == alphas


def assert_same_run(job: Job, reference: Job) -> None:
    assert_same_curves(job, reference)
    assert job.layer_norms() == pytest.approx(reference.layer_norms(), rel=NORM_TOLERANCE)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_run_on_every_layout(
    layout: str, text: Text, checkpoint: Path, on_one_rank: Job, tmp_path: Path
) -> None:
    ranks, flags = LAYOUTS[layout]
    argv = [*MODEL, *text.flags, *WARMUP, *OPTIMIZER, *MEASURED, *loading(checkpoint)]
    argv += flags.split()
    assert_same_run(run_job(tmp_path, argv, ranks), on_one_rank)


def test_alphas_are_the_schedules_and_differ_between_layers(on_one_rank: Job) -> None:
    by_step = on_one_rank.alphas_by_step()
    assert sorted(by_step) == list(range(SAVED_AT, LAST + 1))
    for step, held in by_step.items():
        assert list(held.values()) == pytest.approx(alphas("linear", step, 4, 48), rel=1e-7)
        assert len(set(held.values())) == 4


def test_alphas_are_logged_beside_the_losses(on_one_rank: Job) -> None:
    for layer in range(1, 5):
        logged = on_one_rank.scalars(f"prores/alpha/layer_{layer}")
        expected = {t: alphas("linear", t, 4, 48)[layer - 1] for t in range(SAVED_AT, LAST + 1)}
        assert logged == pytest.approx(expected, rel=1e-6)


def test_layer_map_is_logged_with_the_step_that_opens_each_layer(on_one_rank: Job) -> None:
    lines = [line.split() for line in on_one_rank.output.splitlines()]
    for layer in range(1, 5):
        assert [">", "ProRes:", str(layer), "0", "0", str(12 * layer)] in lines


def test_experts_on_two_ranks_give_the_run_of_one(text: Text, tmp_path: Path) -> None:
    flags = [*MODEL, *text.flags, *WARMUP, *MOE]
    saved = run_job(tmp_path / "save", [*flags, *saving(tmp_path / "saved")])
    assert saved.succeeded, saved.output[-3000:]
    load = [*flags, *MEASURED, *loading(tmp_path / "saved")]
    one = run_job(tmp_path / "one", load)
    assert one.succeeded, one.output[-3000:]
    two = run_job(tmp_path / "two", [*load, "--expert-model-parallel-size", "2"], ranks=2)
    assert_same_run(two, one)
    # Megatron's other dispatcher needs nothing of gloo while each rank has all experts.
    alltoall = [*load, "--moe-token-dispatcher-type", "alltoall"]
    assert_same_run(run_job(tmp_path / "alltoall", alltoall), one)
    at, measured = load.index("--num-layers"), load.index(MEASURED[0])
    hybrid = [*load[:at], *load[at + 2 : measured], *load[measured + 2 :]]
    hybrid += ["--hybrid-layer-pattern", "*E*E*E*E"]
    assert_same_curves(run_job(tmp_path / "hybrid", hybrid), one)


def test_prediction_layers_are_no_part_of_the_warmup(text: Text, tmp_path: Path) -> None:
    flags = [*MODEL, *text.flags, *WARMUP, *OPTIMIZER, *MTP]
    saved = run_job(tmp_path / "save", [*flags, *saving(tmp_path / "saved")])
    assert saved.succeeded, saved.output[-3000:]
    load = [*flags, *MEASURED, *loading(tmp_path / "saved")]
    one = run_job(tmp_path / "one", load)
    assert_same_run(run_job(tmp_path / "two", [*load, *PP2.split()], ranks=2), one)
    assert all(list(held) == [1, 2, 3, 4] for held in one.alphas_by_step().values())


def test_layers_numbered_by_stage_are_stopped_by_the_audit(
    text: Text, checkpoint: Path, tmp_path: Path
) -> None:
    argv = [*MODEL, *text.flags, *WARMUP, *OPTIMIZER, *loading(checkpoint), *PP2.split()]
    job = run_job(tmp_path, argv, ranks=2, prepare=faults.number_layers_by_stage)
    assert job.exit_codes == [1, 1]
    assert "pipeline 0: layer 1 is held by 0, 1" in job.output
    assert "pipeline 0: layer 3 is held by no rank" in job.output
    # The table: what the second stage holds.
    assert ["1", "0", "1", "0", "1", "(0.1667),", "2", "(0.08333)"] in [
        line.split() for line in job.output.splitlines()
    ]
    assert "Traceback" not in job.output


def test_a_rank_with_another_schedule_is_stopped_by_the_audit(text: Text, tmp_path: Path) -> None:
    argv = [*MODEL, *text.flags, *WARMUP, "--train-iters", "1"]
    fault = faults.start_rank_1_with_another_schedule
    job = run_job(tmp_path, argv, ranks=2, prepare=fault)
    assert job.exit_codes == [1, 1]
    assert "schedule='linear_square'" in job.output
    assert "start all ranks with the same settings" in job.output
    assert "Traceback" not in job.output


@pytest.mark.parametrize(
    "fault", [faults.number_layers_by_stage_unaudited, faults.forget_alpha_in_deepest_layer]
)
def test_the_layout_test_sees_a_fault_that_no_audit_stops(
    fault: object, text: Text, checkpoint: Path, on_one_rank: Job, tmp_path: Path
) -> None:
    argv = [*MODEL, *text.flags, *WARMUP, *OPTIMIZER, *loading(checkpoint), *PP2.split()]
    job = run_job(tmp_path, argv, ranks=2, prepare=fault)  # type: ignore[arg-type]
    assert job.succeeded, job.output[-3000:]
    assert job.scalars("lm loss") != pytest.approx(on_one_rank.scalars("lm loss"), rel=TOLERANCE)


def test_a_model_that_is_configured_twice_is_warmed_up_once(
    text: Text, checkpoint: Path, on_one_rank: Job, tmp_path: Path
) -> None:
    argv = [*MODEL, *text.flags, *WARMUP, *OPTIMIZER, *MEASURED, *loading(checkpoint)]
    job = run_job(tmp_path, argv, prepare=faults.configure_twice)
    assert_same_run(job, on_one_rank)
    # The recorder writes a line each time that alpha is set.
    alphas_set = [line for line in (tmp_path / "alphas0.jsonl").read_text().splitlines() if line]
    assert len(alphas_set) == len(
        (on_one_rank.directory / "alphas0.jsonl").read_text().splitlines()
    )
