"""The run-time replacements: applied once, undone, and clear about an upstream that has moved."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from megatron.training import training

from megatron_prores.launch import main as launch
from megatron_prores.upstream.datasets import use_prebuilt_dataset_helpers
from megatron_prores.upstream.elastic_agent import Ranks
from megatron_prores.upstream.optimizer import align_saved_optimizer_state, let_torch_adam_resume
from megatron_prores.upstream.registry import (
    Entry,
    listed,
    replace,
    stock,
    undo,
    undone_afterwards,
    wrap,
)
from megatron_prores.upstream.training_loop import call_around_steps


@pytest.fixture
def untouched(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Puts back, after the test, whatever the replacements replace."""
    with undone_afterwards():
        yield monkeypatch


def test_the_installed_megatron_has_what_is_replaced(untouched: pytest.MonkeyPatch) -> None:
    call_around_steps(lambda step: None, lambda iteration: None)
    let_torch_adam_resume()
    align_saved_optimizer_state()


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
    call_around_steps(
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
        call_around_steps(Hook(name).before, lambda iteration: None)
    call_around_steps(lambda step: calls.append(("another", step)), lambda step: None)
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
    """Add ten.

    Not twenty.
    """
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
            entries = listed()["made_up.double"]
            assert [entry.function for entry in entries] == [
                f"{__name__}.plus_ten",
                f"{__name__}.twice",
            ]
        assert module.double(3) == 2 * 3 + 10
    assert module.double is stock
    assert "made_up.double" not in listed()


def test_an_entry_says_why_and_for_which_version() -> None:
    with undone_afterwards():
        wrap(training, "train_step", ("iteration",), plus_ten)
        assert listed()["megatron.training.training.train_step"] == [
            Entry("Add ten.", f"{__name__}.plus_ten", "megatron-core 0.19.2", ("iteration",))
        ]
    assert "megatron.training.training.train_step" not in listed()


def half(x: int) -> int:
    return x // 2


def test_an_attribute_is_replaced_once_and_put_back() -> None:
    module = module_with_functions()
    first, owner = module.double, module.Owner
    with undone_afterwards():
        for _ in range(2):
            replace(module, plus_ten, double=half)
            replace(owner, plus_ten, static=half, __doc__="ours")
        assert module.double(8) == 4
        assert owner.static(8) == owner().static(8) == 4
        assert owner.__doc__ == "ours"
        assert stock(module, "double") is first
        assert [entry.purpose for entry in listed()["made_up.double"]] == ["Add ten."]
        # Another purpose on top of it, which is taken back alone.
        wrap(module, "double", ("x",), twice)
        assert module.double(8) == 8
        undo(twice)
        assert module.double is half
        with undone_afterwards():
            replace(module, twice, double=owner)
            assert module.double is owner
        assert module.double is half
    assert module.double is first
    assert isinstance(vars(owner)["static"], staticmethod)
    assert owner.__doc__ is None


def test_a_function_that_is_inherited_is_inherited_again() -> None:
    owner = module_with_functions().Owner
    heir = type("Heir", (owner,), {})
    with undone_afterwards():
        replace(heir, plus_ten, static=half)
        assert (heir.static(8), owner.static(8)) == (4, 9)
    assert "static" not in vars(heir)


def test_a_method_may_be_replaced_by_a_function_with_another_name_for_self() -> None:
    class Owner:
        def method(self, x: int) -> int:
            return x

    with undone_afterwards():
        replace(Owner, plus_ten, method=lambda owner, x: 10 + x)
        assert Owner().method(x=1) == 11


def test_what_is_no_more_or_takes_more_is_not_replaced() -> None:
    module = module_with_functions()
    with pytest.raises(RuntimeError, match=r"has moved: made_up\.triple is gone"):
        replace(module, plus_ten, triple=half)
    module.double = lambda x, times: times * x  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match=r"made_up\.double also has the parameter times"):
        replace(module, plus_ten, double=half)
    assert not [name for name in listed() if name.startswith("made_up")]


def test_arguments_of_the_wrapper_go_before_those_of_the_caller() -> None:
    module = ModuleType("made_up")

    def function(a: int, b: int = 2, **more: int) -> tuple[int, int, dict[str, int]]:
        return a, b, more

    def change(stock: Callable[..., Any], named: dict[str, Any]) -> Any:
        return stock(b=5, c=6)

    module.function = function  # type: ignore[attr-defined]
    with undone_afterwards():
        wrap(module, "function", ("a",), change)
        assert module.function(1, 3) == (1, 5, {"c": 6})
        assert module.function(b=3, c=4, d=5, a=1) == (1, 5, {"c": 6, "d": 5})


def test_torchruns_agent_is_replaced_or_named_by_its_version(
    untouched: pytest.MonkeyPatch,
) -> None:
    Ranks().watch()
    Ranks().watch()
    names = [name for name in listed() if name.startswith("torch.distributed.elastic")]
    place = "torch.distributed.elastic.multiprocessing.api"
    assert names == [
        f"{place}._terminate_process_handler",
        *(f"{place}.SubprocessContext.{name}" for name in ("_start", "_close")),
    ]
    assert all(len(listed()[name]) == 1 for name in names)
    untouched.setattr(launch.api.SubprocessContext, "_close", lambda self: None)
    with pytest.raises(
        RuntimeError, match=rf"^torch {version('torch')} has moved: .*_close has no .* timeout"
    ):
        launch.main(["--nproc-per-node", "1", "true"])


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
        call_around_steps(lambda step: None, lambda iteration: None)


def test_a_wheel_with_a_compiled_helper_compiles_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from megatron.core.datasets import utils

    def compile_helpers() -> None:
        raise AssertionError("compiled")

    monkeypatch.setattr(utils, "compile_helpers", compile_helpers)
    use_prebuilt_dataset_helpers()
    utils.compile_helpers()

    monkeypatch.setattr(utils, "compile_helpers", compile_helpers)
    # Makes its import fail.
    monkeypatch.setitem(sys.modules, "megatron.core.datasets.helpers_cpp", None)
    use_prebuilt_dataset_helpers()
    with pytest.raises(AssertionError, match="compiled"):
        utils.compile_helpers()


REPOSITORY = Path(__file__).resolve().parents[2]
REPLACED = ("megatron", "torch", "transformer_engine")
REGISTRY = Path("megatron_prores/upstream/registry.py")


def root(node: ast.AST) -> str | None:
    """Name the variable that an expression reads an attribute or an item of."""
    while not isinstance(node, ast.Name):
        if isinstance(node, ast.Attribute | ast.Subscript):
            node = node.value
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("vars", "getattr"):
            node = node.args[0]
        else:
            return None
    return node.id


def direct_replacements(source: str) -> list[str]:
    """Find assignments to what a module imports of Megatron, torch or Transformer Engine.

    Also where it has another name there, and by a function that is handed any owner.
    """
    nodes = list(ast.walk(ast.parse(source)))
    theirs: set[str | None] = set()
    for node in nodes:
        if isinstance(node, ast.Import | ast.ImportFrom):
            for alias in node.names:
                module = alias.name if isinstance(node, ast.Import) else node.module or ""
                if module.partition(".")[0] in REPLACED:
                    theirs.add((alias.asname or alias.name).partition(".")[0])
    for node in [*nodes, *nodes]:  # twice, for a name of a name
        if isinstance(node, ast.Assign):
            target, value = node.targets[0], node.value
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            target, value = node.target, node.value
        elif isinstance(node, ast.For):
            target, value = node.target, node.iter
        else:
            continue
        values = value.elts if isinstance(value, ast.Tuple | ast.List) else [value]
        if isinstance(target, ast.Name) and any(root(each) in theirs for each in values):
            theirs.add(target.id)
    handed = {node.arg for node in nodes if isinstance(node, ast.arg)} - {"self"}
    found = []
    for node in nodes:
        if isinstance(node, ast.Attribute | ast.Subscript) and not isinstance(node.ctx, ast.Load):
            replaced = root(node) in theirs
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("setattr", "delattr"):
            owner = node.args[0]
            replaced = root(owner) in theirs or (isinstance(owner, ast.Name) and owner.id in handed)
        else:
            continue
        if replaced:
            found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.cuda.is_available = f",
        "from torch.distributed.checkpoint import filesystem\nvars(filesystem)['pickle'] = safe",
        "from megatron.training import training as t\nowner = t.X\nowner.y: int = 3",
        "from megatron import a, b\nfor module in (a, b):\n    module.x = 1",
        "import torch.nn\ntorch.nn.Module.__dict__['x'] = 1",
        "from transformer_engine import x\nsetattr(x.y, 'name', 1)",
        "def f(owner):\n    setattr(owner, 'name', 1)",
        "from torch import api\ndel api.x",
    ],
)
def test_a_replacement_past_the_registry_is_seen(source: str) -> None:
    assert direct_replacements(source)


def test_every_replacement_is_in_the_registry() -> None:
    paths = [REPOSITORY / "pretrain_gpt_prores.py"]
    for top in ("megatron_prores", "studies", "tools"):
        paths += sorted((REPOSITORY / top).rglob("*.py"))
    found = {
        str(path.relative_to(REPOSITORY)): places
        for path in paths
        if path.relative_to(REPOSITORY) != REGISTRY
        and (places := direct_replacements(path.read_text()))
    }
    assert not found
