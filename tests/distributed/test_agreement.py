"""A run goes on from a checkpoint with the warmup that it was trained with, or says why not."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from megatron_prores.schedule.formulas import alphas
from tests.distributed import fused_backend
from tests.distributed.conftest import (
    LAST,
    MODEL,
    OPTIMIZER,
    SAVED_AT,
    WARMUP,
    Text,
    loading,
    saving,
)
from tests.distributed.launch import Job, run_job
from tests.distributed.test_layouts import TOLERANCE


def last_error(job: Job) -> str:
    (line,) = job.errors
    assert set(job.exit_codes) == {2}
    assert "Traceback" not in job.output
    return line


DIFFERENT = {
    "schedule": (["--prores-schedule", "equal"], ["--prores-schedule linear there, equal here"]),
    "no warmup": (["--prores-schedule", "none"], ["--prores-schedule linear there, none here"]),
    "length": (["--prores-warmup-iters", "49"], ["--prores-warmup-iters 48 there, 49 here"]),
    "placement": (["--norm-placement", "lns"], ["--norm-placement pre there, lns here"]),
    "initial weights": (
        ["--branch-init", "scaled", "--prores-schedule", "reverse"],
        ["--branch-init normal there, scaled here", "--prores-schedule linear there, reverse here"],
    ),
}


@pytest.mark.parametrize("case", DIFFERENT)
def test_other_settings_are_refused_with_both_values(
    case: str, text: Text, checkpoint: Path, tmp_path: Path
) -> None:
    flags, words = DIFFERENT[case]
    argv = [*MODEL, *text.flags, *WARMUP, *flags, *OPTIMIZER, *loading(checkpoint)]
    line = last_error(run_job(tmp_path, argv, ranks=2))
    assert all(word in line for word in [*words, "--prores-override-checkpoint"])


def test_the_same_warmup_in_other_words_is_no_difference(
    text: Text, checkpoint: Path, on_one_rank: Job, tmp_path: Path
) -> None:
    words = ["--prores-warmup-iters-per-layer", "12", "--branch-init", "normal"]
    job = run_job(tmp_path, [*MODEL, *text.flags, *words, *OPTIMIZER, *loading(checkpoint)])
    assert job.succeeded, job.output[-3000:]
    assert job.scalars("lm loss") == on_one_rank.scalars("lm loss")


def test_an_override_goes_on_with_the_new_settings_and_remembers_them(
    text: Text, checkpoint: Path, tmp_path: Path
) -> None:
    flags = [*MODEL, *text.flags, *OPTIMIZER, "--prores-warmup-iters", "100"]
    save = ["--save", str(tmp_path / "saved"), "--save-interval", "4"]
    override = [*loading(checkpoint), "--prores-override-checkpoint"]
    job = run_job(tmp_path / "first", [*flags, *override, *save])
    assert job.succeeded, job.output[-3000:]
    assert list(job.alphas_by_step()[4].values()) == pytest.approx(
        alphas("linear", 4, 4, 100), rel=1e-6
    )
    again = run_job(tmp_path / "again", [*flags, *loading(tmp_path / "saved")])
    assert again.succeeded, again.output[-3000:]


def test_use_checkpoint_args_restores_the_warmup(
    text: Text, checkpoint: Path, on_one_rank: Job, tmp_path: Path
) -> None:
    argv = [*MODEL, *text.flags, *OPTIMIZER, *loading(checkpoint), "--use-checkpoint-args"]
    job = run_job(tmp_path / "restored", argv)
    assert job.succeeded, job.output[-3000:]
    assert job.scalars("lm loss") == on_one_rank.scalars("lm loss")
    assert job.alphas_by_step() == on_one_rank.alphas_by_step()
    # What the command line has is not overruled, and so is compared.
    other = run_job(tmp_path / "other", [*argv, "--prores-schedule", "reverse"])
    assert "--prores-schedule linear there, reverse here" in last_error(other)


def test_a_checkpoint_of_plain_megatron_is_such_a_difference(text: Text, tmp_path: Path) -> None:
    flags = [*MODEL, *text.flags, *OPTIMIZER, "--prores-schedule", "none"]
    saved = run_job(tmp_path / "save", [*flags, *saving(tmp_path / "saved")], prepare=forget)
    assert saved.succeeded, saved.output[-3000:]
    load = loading(tmp_path / "saved")
    linear = run_job(tmp_path / "linear", [*MODEL, *text.flags, *OPTIMIZER, *load])
    assert "--prores-schedule none there, linear here" in last_error(linear)
    none = run_job(tmp_path / "none", [*flags, *load])
    assert none.succeeded, none.output[-3000:]


def forget() -> None:
    """Saves a checkpoint without our settings, as stock Megatron does."""
    from megatron.training import checkpointing

    stock = checkpointing.save_checkpoint

    @functools.wraps(stock)
    def save_checkpoint(*args: object, **kwargs: object) -> object:
        saved_args = checkpointing.get_args()
        vars(saved_args).pop("prores_settings", None)
        return stock(*args, **kwargs)

    checkpointing.save_checkpoint = save_checkpoint
    from megatron.training import training

    training.save_checkpoint = save_checkpoint


def test_finetuning_does_not_switch_a_trained_model_off(
    text: Text, checkpoint: Path, tmp_path: Path
) -> None:
    argv = [*MODEL, *text.flags, *OPTIMIZER, *loading(checkpoint), "--finetune"]
    line = last_error(run_job(tmp_path / "refused", [*argv, *WARMUP]))
    assert all(
        word in line for word in ("--finetune", "--prores-schedule none", "--prores-restart")
    )
    none = run_job(tmp_path / "none", [*argv, "--prores-schedule", "none"])
    restart = run_job(tmp_path / "restart", [*argv, *WARMUP, "--prores-restart"])
    for job in (none, restart):
        assert job.succeeded, job.output[-3000:]
        assert list(job.scalars("lm loss")) == list(range(1, LAST + 1))
    assert set(restart.alphas_by_step()[0].values()) == {0.0}


def test_training_on_for_longer_needs_a_word_on_the_learning_rate(
    text: Text, checkpoint: Path, tmp_path: Path
) -> None:
    argv = [*MODEL, *text.flags, *WARMUP, *OPTIMIZER, *loading(checkpoint)]
    argv += ["--train-iters", str(LAST + 2)]
    line = last_error(run_job(tmp_path / "refused", argv))
    assert f"--train-iters {LAST}, this run has {LAST + 2}" in line
    assert "--override-opt-param-scheduler" in line
    longer = run_job(tmp_path / "longer", [*argv, "--override-opt-param-scheduler"])
    assert longer.succeeded, longer.output[-3000:]
    assert max(longer.scalars("lm loss")) == LAST + 2


def test_a_pretrained_checkpoint_is_finetuned_as_well(
    text: Text, checkpoint: Path, tmp_path: Path
) -> None:
    argv = [*MODEL, *text.flags, *WARMUP, *OPTIMIZER, "--train-iters", "1"]
    argv += ["--pretrained-checkpoint", str(checkpoint)]
    for load in ([], ["--load", str(tmp_path / "nothing yet")]):
        line = last_error(run_job(tmp_path / "job", [*argv, *load]))
        assert "--pretrained-checkpoint" in line
        assert "--prores-restart" in line


def test_restart_without_finetune_is_refused(text: Text, checkpoint: Path, tmp_path: Path) -> None:
    argv = [*MODEL, *text.flags, *WARMUP, *OPTIMIZER, *loading(checkpoint), "--prores-restart"]
    assert "--prores-restart is for --finetune" in last_error(run_job(tmp_path, argv))


def test_evaluation_alone_uses_the_alpha_of_its_iteration(
    text: Text, checkpoint: Path, on_one_rank: Job, tmp_path: Path
) -> None:
    argv = [*MODEL, *text.flags, *WARMUP, *loading(checkpoint), "--skip-train"]
    job = run_job(tmp_path, argv)
    assert job.succeeded, job.output[-3000:]
    held = job.alphas_by_step()
    assert list(held) == [SAVED_AT]
    assert held[SAVED_AT] == on_one_rank.alphas_by_step()[SAVED_AT]


def test_warmup_in_samples_follows_a_growing_batch(text: Text, tmp_path: Path) -> None:
    """4 samples an iteration until 8 (512 tokens) are consumed, then 8."""
    model = [*MODEL]
    at = model.index("--global-batch-size")
    del model[at : at + 2]
    flags = [*model, *text.flags, *OPTIMIZER, "--prores-warmup-samples", "400"]
    flags += ["--step-batch-size-schedule", "0:4 512:8", "--eval-global-batch-size", "8"]
    straight = run_job(tmp_path / "straight", [*flags, "--train-iters", str(LAST)])
    assert straight.succeeded, straight.output[-3000:]
    consumed = [0, 4, 8, 16, 24, 32, 40]
    held = straight.alphas_by_step()
    for iteration, samples in enumerate(consumed):
        expected = alphas("linear", samples, 4, 400)
        assert list(held[iteration].values()) == pytest.approx(expected, rel=1e-6)
    logged = straight.scalars("prores/alpha/layer_1")
    assert logged[3] == pytest.approx(alphas("linear", 16, 4, 400)[0], rel=1e-6)

    saved = run_job(tmp_path / "save", [*flags, *saving(tmp_path / "saved")])
    assert saved.succeeded, saved.output[-3000:]
    resumed = run_job(tmp_path / "resumed", [*flags, *loading(tmp_path / "saved")])
    assert resumed.succeeded, resumed.output[-3000:]
    losses = straight.scalars("lm loss")
    assert resumed.scalars("lm loss") == {i: losses[i] for i in range(SAVED_AT + 1, LAST + 1)}
    assert "opens fully after (samples)" in resumed.output


def test_a_checkpoint_loads_under_the_names_of_a_fusing_backend(
    text: Text, checkpoint: Path, on_one_rank: Job, tmp_path: Path
) -> None:
    argv = [*MODEL, *text.flags, *WARMUP, *OPTIMIZER, *loading(checkpoint)]
    job = run_job(tmp_path, argv, prepare=fused_backend.use_instead_of_local)
    assert job.succeeded, job.output[-3000:]
    assert "NormThenLinear" in job.output
    assert job.scalars("lm loss") == pytest.approx(on_one_rank.scalars("lm loss"), rel=TOLERANCE)


def test_an_optimizer_of_another_layout_is_refused(text: Text, tmp_path: Path) -> None:
    flags = [*MODEL, *text.flags, *WARMUP, "--use-distributed-optimizer"]
    job = run_job(tmp_path / "first", [*flags, *saving(tmp_path / "saved")])
    assert job.succeeded, job.output[-3000:]
    other = [*flags, *loading(tmp_path / "saved"), "--tensor-model-parallel-size", "2"]
    line = last_error(run_job(tmp_path / "refused", other, ranks=2))
    assert "--tensor-model-parallel-size 1 lays it out, and this run has 2" in line
    job = run_job(tmp_path / "anew", [*other, "--no-load-optim"], ranks=2)
    assert job.succeeded, job.output[-3000:]
