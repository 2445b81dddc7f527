"""The run-time replacements: applied once, undone, and clear about an upstream that has moved."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
from megatron.training import training

from megatron_prores.upstream import seams as upstream
from megatron_prores.upstream.registry import listed, undo, undone_afterwards, wrap


@pytest.fixture
def untouched(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Puts back, after the test, whatever the replacements replace."""
    with undone_afterwards():
        yield monkeypatch


def test_the_installed_megatron_has_what_is_replaced(untouched: pytest.MonkeyPatch) -> None:
    upstream.call_around_steps(lambda step: None, lambda iteration: None)
    upstream.let_torch_adam_resume()
    upstream.align_saved_optimizer_state()


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


def test_hooks_asked_for_twice_run_once_and_are_the_last_ones(
    untouched: pytest.MonkeyPatch,
) -> None:
    untouched.setattr(training, "train_step", lambda iteration: "result")
    untouched.setattr(training, "evaluate_and_print_results", lambda iteration: None)
    untouched.setattr(training, "training_log", lambda iteration: None)
    calls: list[object] = []

    class Hook:
        def __init__(self, name: str) -> None:
            self.name = name

        def before(self, step: int) -> None:
            calls.append((self.name, step))

    for name in ("first", "second"):
        upstream.call_around_steps(Hook(name).before, lambda iteration: None)
    upstream.call_around_steps(lambda step: calls.append(("another", step)), lambda step: None)
    assert training.train_step(3) == "result"
    assert calls == [("another", 3), ("second", 3)]
    undo(Hook.before)
    training.train_step(4)
    assert calls[2:] == [("another", 4)]


def module_with_functions() -> ModuleType:
    module = ModuleType("made_up")

    class Owner:
        @staticmethod
        def static(x: int) -> int:
            return x + 1

    module.Owner = Owner  # type: ignore[attr-defined]
    module.double = lambda x: 2 * x  # type: ignore[attr-defined]
    return module


def plus_ten(stock: Callable[[], Any], named: dict[str, Any]) -> Any:
    return stock() + 10


def twice(stock: Callable[[], Any], named: dict[str, Any]) -> Any:
    return stock() * 2


def test_wrappers_nest_once_each_and_are_taken_back() -> None:
    module = module_with_functions()
    stock = module.double
    with undone_afterwards():
        wrap(module, "double", ("x",), plus_ten)
        with undone_afterwards():
            for wrapper in (twice, plus_ten, twice):
                wrap(module, "double", ("x",), wrapper)
            assert module.double(3) == (2 * 3 + 10) * 2
            assert listed()["made_up.double"] == [f"{__name__}.plus_ten", f"{__name__}.twice"]
        assert module.double(3) == 2 * 3 + 10
    assert module.double is stock
    assert "made_up.double" not in listed()


def test_a_feature_is_undone_alone() -> None:
    module = module_with_functions()

    def feature(number: int) -> None:
        def add(stock: Callable[[], Any], named: dict[str, Any]) -> Any:
            return stock() + number

        wrap(module, "double", ("x",), add)

    with undone_afterwards():
        feature(100)
        wrap(module, "double", ("x",), twice)
        assert module.double(3) == (6 + 100) * 2
        undo(feature)
        assert module.double(3) == 12


def test_a_static_method_stays_one() -> None:
    owner = module_with_functions().Owner
    with undone_afterwards():
        wrap(owner, "static", ("x",), plus_ten)
        assert owner.static(1) == 12
    assert isinstance(vars(owner)["static"], staticmethod)
    assert owner().static(1) == 2


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
