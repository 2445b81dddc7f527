"""What is read from the logs of a run, and the numbers made of it, against numbers by hand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from torch.utils.tensorboard import SummaryWriter

from megatron_prores.errors import ArgumentError, UserError
from megatron_prores.runs.logged import (
    TRAIN_TAG,
    VALID_TAG,
    Run,
    Series,
    ema,
    gap,
    load_run,
    summary,
)
from tests.unit.event_files import EPOCH, write_start


def a_run(tokens: list[float], losses: list[float], name: str = "a") -> Run:
    steps = np.arange(1, len(tokens) + 1)
    return Run(
        name,
        {},
        {TRAIN_TAG: Series(steps, np.array(losses))},
        Series(steps, np.array(tokens)),
        Series(steps, steps / 3600),
    )


def test_tokens_hours_and_the_summary_of_a_run(tmp_path: Path) -> None:
    losses = {step: 3.0 - step / 10 for step in range(1, 21)}
    valid = {0: 9.0, 10: 2.5, 15: 1.75, 20: 2.0}
    write_start(
        tmp_path / "mine/tensorboard", losses, more={VALID_TAG: valid}, settings={"lr": 2e-3}
    )
    run = load_run(tmp_path / "mine")
    assert run.name == "mine"
    assert run.settings["lr"] == "0.002"
    assert run.tokens.values.tolist() == [40.0 * step for step in range(1, 21)]
    np.testing.assert_allclose(run.hours.values, np.arange(20) / 100, atol=1e-9)
    evaluated = run.over_tokens(VALID_TAG)
    assert evaluated.steps.tolist() == [0, 400, 600, 800]
    assert evaluated.values.tolist() == [9.0, 2.5, 1.75, 2.0]
    np.testing.assert_allclose(run.over_hours(VALID_TAG).steps, [0, 0.09, 0.14, 0.19], atol=1e-9)
    found = summary(run)
    expected = {
        "iterations": 20, "tokens": 800, "hours": 0.19, "tokens_per_second": 40 / 36,
        "train_loss": 3 - 1.55, "train_loss_steps": 10, "valid_loss": 2.0, "valid_loss_best": 1.75,
        "perplexity": math.exp(2), "grad_norm_max": 5.8, "loss_spike_score": 0.0,
        "grad_norm_spike_score": 0.0, "nan_iterations": 0, "skipped_iterations": 0,
    }  # fmt: skip
    assert found == pytest.approx(expected, rel=1e-5)


def test_a_resumed_run_goes_on_where_it_began_again(tmp_path: Path) -> None:
    # To 8, lost; from 5 on again, a day later, with twice the batch from there; it is at 6 now. The
    # later file has the name that sorts first: the time of writing must decide.
    logs = tmp_path / "tensorboard"
    write_start(logs, dict.fromkeys(range(1, 9), 5.0), more={"rms": {2: 0.5, 6: 0.5}})
    for file in logs.iterdir():
        file.rename(logs / "z.tfevents")
    later = EPOCH + 86_400
    write_start(logs, {5: 4.0, 6: 4.0}, began=later, seconds=72, settings={"seed": 7})
    run = load_run(tmp_path)
    assert run.scalars[TRAIN_TAG].values.tolist() == [5, 5, 5, 5, 4, 4]
    assert run.tokens.values.tolist() == [40, 80, 120, 160, 200, 240]
    assert run.settings["seed"] == "7"
    # Seven steps' time of the first start; the day between the two is none of it.
    np.testing.assert_allclose(run.hours.values, [0, 0.01, 0.02, 0.03, 0.07, 0.09], atol=1e-9)
    assert summary(run)["tokens_per_second"] == pytest.approx(40 / 36)


def test_a_run_that_goes_on_without_loss_has_no_step_of_no_time(tmp_path: Path) -> None:
    write_start(tmp_path, {1: 5.0, 2: 5.0})
    write_start(tmp_path, {3: 4.0, 4: 4.0}, began=EPOCH + 1000)
    rates = load_run(tmp_path).tokens_per_second()
    assert rates.steps.tolist() == [2, 4]
    np.testing.assert_allclose(rates.values, 40 / 36)


def test_a_run_that_is_being_written_is_read_as_far_as_it_is(tmp_path: Path) -> None:
    write_start(tmp_path, dict.fromkeys(range(1, 31), 5.0))
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    lengths = set()
    for length in range(len(whole) - 660, len(whole), 13):
        file.write_bytes(whole[:length])
        run = load_run(tmp_path)
        summary(run)
        assert run.tokens.values[-1] == 40 * len(run.tokens.steps) == 40 * len(run.hours.steps)
        lengths.add(len(run.tokens.steps))
    assert lengths == {28, 29, 30}


def test_steps_without_number_and_skipped_ones_are_counted(tmp_path: Path) -> None:
    losses = {**dict.fromkeys(range(1, 16), 3.0), 4: math.nan, 15: math.inf}
    write_start(tmp_path, losses, skipped=frozenset({6, 7}))
    found = summary(load_run(tmp_path))
    assert (found["nan_iterations"], found["skipped_iterations"]) == (2, 2)
    assert found["train_loss"] == 3.0
    assert math.isnan(found["valid_loss"])
    assert math.isnan(found["perplexity"])


def test_the_test_set_that_megatron_logs_as_validation_is_left_out(tmp_path: Path) -> None:
    write_start(tmp_path, {1: 3.0, 2: 3.0}, more={VALID_TAG: {2: 2.0}})
    (file,) = tmp_path.iterdir()
    with SummaryWriter(str(tmp_path / "more")) as writer:
        writer.add_scalar(VALID_TAG, 9.0, 2, walltime=EPOCH + 99)
    (more,) = (tmp_path / "more").iterdir()
    # The records of the second file, behind those of the first.
    file.write_bytes(file.read_bytes() + more.read_bytes())
    assert load_run(tmp_path).scalars[VALID_TAG].values.tolist() == [2.0]


def test_averages_are_tensorboards() -> None:
    # By hand: 1; (1/2 1/2 + 3/2) / (3/4); NaN; then as if it had not been there.
    np.testing.assert_allclose(
        ema([1.0, 3.0, math.nan, 5.0], weight=0.5), [1, 7 / 3, math.nan, (1.75 / 2 + 2.5) / 0.875]
    )
    assert ema([2.0, 5.0], weight=0.0).tolist() == [2, 5]
    np.testing.assert_allclose(ema(np.full(1000, 3.0)), 3.0)
    assert ema([math.nan, 4.0], 0.9)[1] == 4.0
    with pytest.raises(ArgumentError, match=r"weight=1\.0: must be"):
        ema([1.0], 1.0)


def test_a_gap_is_over_the_tokens_that_both_have_seen() -> None:
    # Steps of 10 and of 20 tokens; the reference is interpolated between its own.
    fine = a_run([10, 20, 30, 40, 50], [5.0, 4.0, math.nan, 3.0, 2.0])
    coarse = a_run([20, 40], [4.5, 3.5])
    found = gap(fine, coarse, weight=0)
    assert found.steps.tolist() == [20, 40]
    assert found.values.tolist() == [-0.5, -0.5]
    back = gap(coarse, fine, weight=0)
    assert back.steps.tolist() == [20, 40]
    assert back.values.tolist() == [0.5, 0.5]
    # Smoothed over its own steps, before the two are laid over each other.
    np.testing.assert_allclose(
        gap(fine, coarse, weight=0.5).values[0], (5 / 4 + 4 / 2) / 0.75 - 4.5
    )
    assert not len(gap(fine, a_run([60, 70], [1.0, 1.0])).steps)
    assert not len(gap(fine, coarse, VALID_TAG).steps)
    assert not np.any(gap(fine, fine).values)


@pytest.mark.parametrize(("given", "name"), [(".", "mine"), ("tensorboard", "mine"), ("ck", "ck")])
def test_a_run_is_found_by_any_of_its_directories(
    given: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "mine"
    write_start(run / "tensorboard", {1: 3.0})
    (run / "ck").mkdir()
    (run / "ck/latest_checkpointed_iteration.txt").write_text("1")
    monkeypatch.chdir(run)
    assert load_run(Path(given)).name == name
    assert load_run(Path(given), "other").name == "other"


def test_what_is_no_run_is_said_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none: no such directory"):
        load_run(tmp_path / "none")
    with pytest.raises(UserError, match="no TensorBoard event files"):
        load_run(tmp_path)
    write_start(tmp_path / "there/tensorboard", {1: 3.0})
    (tmp_path / "there/src").mkdir()
    with pytest.raises(UserError, match="no TensorBoard event files"):
        load_run(tmp_path / "there/src")  # beside the logs, and not a run's
    with SummaryWriter(str(tmp_path / "other")) as writer:
        writer.add_scalar("loss", 1.0, 1)
    with pytest.raises(UserError, match="no training step is logged"):
        load_run(tmp_path / "other")
    with SummaryWriter(str(tmp_path / "bare")) as writer:
        for tag in (TRAIN_TAG, "batch-size", "batch-size vs samples"):
            writer.add_scalar(tag, 1.0, 1)
    with pytest.raises(UserError, match="--seq-length"):
        load_run(tmp_path / "bare")
