"""A user's own schedule from a function: what it gives, and what is refused."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_prores.command_line.arguments import read_prores_flags
from megatron_prores.config.prores_config import ProResConfig
from megatron_prores.schedule.formulas import alphas
from tests.unit.complaints import complaint_of

RAMP = """
def alphas(step, num_layers, warmup):
    return [min(step * num_layers / (warmup * layer), 1) for layer in range(1, num_layers + 1)]
"""


@pytest.fixture
def module_name(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> str:
    """A name of its own for the test's module, in the current directory."""
    monkeypatch.chdir(tmp_path)
    name = f"schedule_{hashlib.sha256(request.node.name.encode()).hexdigest()[:12]}"
    monkeypatch.delitem(sys.modules, name, raising=False)
    return name


def function_config(module_name: str, source: str, **settings: int) -> ProResConfig:
    Path(f"{module_name}.py").write_text(source)
    return ProResConfig(schedule=f"{module_name}:alphas", **settings)  # type: ignore[arg-type]


def test_a_function_gives_alpha_from_step_layers_and_warmup(module_name: str) -> None:
    config = function_config(module_name, RAMP, warmup_iters=48)
    config.check_layers(4)
    for step in range(60):
        assert config.alphas(step, 4) == pytest.approx(alphas("linear", step, 4, 48), abs=1e-15)
    assert config.total_warmup(4) == 48
    assert config.opening_steps(4) == [12, 24, 36, 48]


def test_a_functions_warmup_is_a_thousand_iterations_per_layer_by_default(module_name: str) -> None:
    config = function_config(module_name, RAMP)
    assert config.total_warmup(4) == 4000
    assert config.opening_steps(4) == [1000, 2000, 3000, 4000]


@pytest.mark.parametrize(
    "returned",
    [
        "(0.5,) * num_layers",
        "np.full(num_layers, 0.5, dtype=np.float32)",
        "np.arange(num_layers) < 0",
    ],
)
def test_any_sequence_of_numbers_will_do(module_name: str, returned: str) -> None:
    source = f"import numpy as np\ndef alphas(step, num_layers, warmup): return {returned}"
    config = function_config(module_name, source)
    config.check_layers(3)
    assert config.alphas(0, 3).dtype == np.float64
    assert set(config.alphas(0, 3).tolist()) <= {0.0, 0.5}


def test_a_layer_that_closes_again_opens_after_that(module_name: str) -> None:
    source = (
        "def alphas(step, num_layers, warmup): return [1, step >= 30 and not 70 <= step < 90, 0]"
    )
    config = function_config(module_name, source, warmup_iters=60)
    assert config.opening_steps(3) == [0, 90, None]


def test_the_current_directory_is_searched_last_and_only_for_the_import(
    module_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    (tmp_path / "colorsys.py").write_text("raise SystemExit('this hides the standard library')")
    before = list(sys.path)
    function_config(module_name, "import colorsys\n" + RAMP).check_layers(2)
    assert sys.path == before
    assert str(tmp_path) not in sys.path


def test_a_module_of_a_package_is_imported(module_name: str, tmp_path: Path) -> None:
    package = tmp_path / module_name
    package.mkdir()
    (package / "curves.py").write_text(RAMP)
    config = ProResConfig(schedule=f"{module_name}.curves:alphas", warmup_iters=10)
    assert config.alphas(5, 1).tolist() == [0.5]


# --- functions: what is refused

SIGNATURE = "def alphas(step, num_layers, warmup):"
WRONG_FUNCTIONS: dict[str, tuple[str, list[str]]] = {
    "no function of that name": ("alpha = 1", ["alphas is not in it"]),
    "no function": ("alphas = [1.0]", ["alphas is no function"]),
    "syntax": ("def alphas(:", ["cannot import", "SyntaxError", "line 1"]),
    "import inside": ("import no_such_module_at_all", ["ModuleNotFoundError", ".py, line 1"]),
    "ends the program": ("raise SystemExit(0)", ["cannot import", "SystemExit"]),
    "other arguments": ("def alphas(step): return [1]", ["at step 0", "TypeError"]),
    "raises": (f"{SIGNATURE}\n  return [1 / step] * 3", ["ZeroDivisionError", ".py, line 2"]),
    "one short": (f"{SIGNATURE} return [0.5] * 2", ["shape [2]", "3 numbers from 0 to 1"]),
    "one number": (f"{SIGNATURE} return 0.5", ["shape []", "one per layer"]),
    "two dimensions": (f"{SIGNATURE} return [[0.5] * 3]", ["shape [1, 3]"]),
    "ragged": (f"{SIGNATURE} return [[0.5], 1, 1]", ["no numbers"]),
    "nothing": (f"{SIGNATURE} pass", ["returned NoneType"]),
    "text": (f"{SIGNATURE} return ['0.5'] * 3", ["returned list", "3 numbers"]),
    "complex": (f"{SIGNATURE} return [1j] * 3", ["returned list"]),
    "generator": (f"{SIGNATURE} return (1 for _ in range(3))", ["returned generator"]),
    "NaN": (f"{SIGNATURE} return [1, float('nan'), 1]", ["alpha of layer 2 is nan"]),
    "inf": (f"{SIGNATURE} return [1, 1, float('inf')]", ["alpha of layer 3 is inf"]),
    "above 1 at W / 2": (f"{SIGNATURE} return [1, 1, 2 if step == 15 else 1]", ["step 15"]),
    "above 1 after W": (f"{SIGNATURE} return [step / warmup] * 3", ["step 31", "is 1.03"]),
    "below 0": (f"{SIGNATURE} return [-1e-9] * 3", ["alpha of layer 1 is -1e-09"]),
    "random": (f"import random\n{SIGNATURE} return [random.random()] * 3", ["called twice"]),
    "counting": (
        f"seen = []\n{SIGNATURE}\n  seen.append(0)\n  return [1 / len(seen)] * 3",
        ["called twice", "step, layers and warmup alone"],
    ),
}


@pytest.mark.parametrize("case", WRONG_FUNCTIONS)
def test_a_wrong_function_is_refused_before_any_work(case: str, module_name: str) -> None:
    source, words = WRONG_FUNCTIONS[case]
    Path(f"{module_name}.py").write_text(source)
    flags = ["--prores-schedule", f"{module_name}:alphas", "--prores-warmup-iters", "30"]
    complaint = complaint_of(read_prores_flags, [*flags, "--num-layers", "3"])
    assert f"{module_name}:alphas" in complaint
    assert all(word in complaint for word in words), complaint


def test_a_fault_that_comes_later_is_told_when_it_comes(module_name: str) -> None:
    source = f"{SIGNATURE} return [0.5, float('nan') if step == 1234 else 0.5]"
    config = function_config(module_name, source)
    config.check_layers(2)
    assert config.alphas(1233, 2).tolist() == [0.5, 0.5]
    assert "at step 1234" in complaint_of(config.alphas, 1234, 2)


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        ("no_such_module:alphas", ["cannot import no_such_module", "PYTHONPATH", "directory"]),
        ("os:", ["write file:PATH", "module:function"]),
        (":alphas", ["write file:PATH"]),
        ("os:path:join", ["write file:PATH"]),
        ("https://example.com/alpha.csv", ["write file:PATH"]),
        ("alpha.csv", ["no such schedule", "file:PATH or module:function"]),
    ],
)
def test_what_is_neither_a_file_nor_a_function_is_refused(schedule: str, words: list[str]) -> None:
    complaint = complaint_of(lambda: ProResConfig(schedule=schedule).load())
    assert all(word in complaint for word in words), complaint


def test_a_module_that_imports_megatron_is_refused(module_name: str, tmp_path: Path) -> None:
    # A stand-in for Megatron and a process of its own: this one may have imported the real one.
    (tmp_path / "megatron").mkdir()
    (tmp_path / "megatron" / "core.py").write_text("")
    Path(f"{module_name}.py").write_text("import megatron.core\n" + RAMP)
    script = f"""
import megatron_prores.command_line.arguments as arguments
from megatron_prores.errors import run_program
run_program(lambda: arguments.read_prores_flags(["--prores-schedule", "{module_name}:alphas"]))
"""
    root = Path(__file__).resolve().parents[2]
    paths = os.pathsep.join([str(tmp_path), str(root)])
    result = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": paths},
    )
    assert result.returncode == 2, result.stderr
    assert "imports Megatron, which is too early" in result.stderr


def test_the_digest_is_that_of_the_modules_file(module_name: str) -> None:
    config = function_config(module_name, RAMP)
    assert config.schedule_digest == hashlib.sha256(RAMP.encode()).hexdigest()
    assert ProResConfig(schedule="time:sleep").schedule_digest is None  # it has no file
