"""The run-time replacements fail clearly when upstream moves."""

from __future__ import annotations

import sys

import pytest
from megatron.core.optimizer import distrib_optimizer
from megatron.training import training

from megatron_prores import upstream


@pytest.fixture
def untouched(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Puts back, after the test, whatever the replacements replace."""
    for owner, names in (
        (training, ("train_step", "evaluate_and_print_results", "training_log")),
        (
            distrib_optimizer.DistributedOptimizer,
            ("sharded_state_dict", "_set_main_param_and_optimizer_states", "load_state_dict"),
        ),
    ):
        for name in names:
            monkeypatch.setattr(owner, name, getattr(owner, name))
    return monkeypatch


def test_the_installed_megatron_has_what_is_replaced(untouched: pytest.MonkeyPatch) -> None:
    upstream.call_around_steps(lambda step: None, lambda iteration: None)
    upstream.let_torch_adam_resume()


def test_hooks_get_the_completed_iterations_before_and_after(
    untouched: pytest.MonkeyPatch,
) -> None:
    calls: list[object] = []

    def train_step(model: object, iteration: int | None = None) -> str:
        calls.append("train_step")
        return "result"

    def evaluate(prefix: str, iteration: int) -> None:
        calls.append("evaluate")

    def training_log(loss_dict: object, iteration: int) -> None:
        calls.append("training_log")

    untouched.setattr(training, "train_step", train_step)
    untouched.setattr(training, "evaluate_and_print_results", evaluate)
    untouched.setattr(training, "training_log", training_log)
    upstream.call_around_steps(
        lambda step: calls.append(("before", step)), lambda step: calls.append(("after", step))
    )
    assert training.train_step("model", iteration=6) == "result"
    training.training_log({}, 7)
    training.evaluate_and_print_results("prefix", 7)
    assert calls == [
        *(("before", 6), "train_step"),
        *("training_log", ("after", 7)),
        *(("before", 7), "evaluate"),
    ]


@pytest.mark.parametrize("change", ["renamed function", "renamed parameter"])
def test_an_upstream_that_has_moved_is_named(change: str, untouched: pytest.MonkeyPatch) -> None:
    if change == "renamed function":
        untouched.delattr(training, "train_step")
    else:
        untouched.setattr(training, "train_step", lambda step_number: None)
    with pytest.raises(RuntimeError, match=r"has moved: megatron\.training\.training\.train_step"):
        upstream.call_around_steps(lambda step: None, lambda iteration: None)


def test_a_wheel_with_a_compiled_helper_compiles_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from megatron.core.datasets import utils

    def compile_helpers() -> None:
        raise AssertionError("compiled")

    monkeypatch.setattr(utils, "compile_helpers", compile_helpers)
    upstream.use_prebuilt_dataset_helpers()
    utils.compile_helpers()

    monkeypatch.setattr(utils, "compile_helpers", compile_helpers)
    # Makes its import fail.
    monkeypatch.setitem(sys.modules, "megatron.core.datasets.helpers_cpp", None)
    upstream.use_prebuilt_dataset_helpers()
    with pytest.raises(AssertionError, match="compiled"):
        utils.compile_helpers()
