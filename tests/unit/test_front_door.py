"""The public names: what they import, what they say, and what a checkpoint keeps of them."""

from __future__ import annotations

import ast
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import megatron_prores as prores
from megatron_prores.config.flags import FLAGS, told_in_flags
from megatron_prores.errors import Argument, ArgumentError, UserError

SCHEDULE_ALONE = """
import sys
import megatron_prores as prores
assert "linear" in prores.SCHEDULES
config = prores.ProResConfig(schedule="linear", warmup_iters=40)
assert config.alphas(10, 4).tolist() == prores.alphas("linear", 10, 4, 40).tolist()
prores.check_settings(config.settings(4), config.settings(4))
dir(prores)
print(sorted({name.partition(".")[0] for name in sys.modules} & {"torch", "megatron"}))
"""


def test_a_schedule_needs_neither_torch_nor_megatron() -> None:
    result = subprocess.run(
        [sys.executable, "-c", SCHEDULE_ALONE], capture_output=True, text=True, check=True
    )
    assert result.stdout == "[]\n"


def test_every_name_is_there_once_and_the_type_checker_sees_the_same() -> None:
    for name in prores.__all__:
        assert getattr(prores, name) is not None
    assert set(prores.__all__) == set(prores._PLACES) <= set(dir(prores))
    tree = ast.parse(Path(prores.__file__).read_text())
    imported = {
        f"{(node.module or '').removeprefix('megatron_prores.')}.{alias.name}": alias
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("megatron_prores")
        for alias in node.names
    }
    places = {alias.asname or alias.name: place for place, alias in imported.items()}
    assert places == prores._PLACES
    with pytest.raises(AttributeError, match="no attribute 'with_pores'"):
        _ = prores.with_pores


WRONG = {
    "schedule='cosine': no such schedule; choose one of none, linear": {"schedule": "cosine"},
    "schedule='os:': write file:PATH": {"schedule": "os:"},
    "schedule='file:a.txt': the name must end in .csv or .json": {"schedule": "file:a.txt"},
    "norm_placement='foo': no such placement; choose one of pre,": {"norm_placement": "foo"},
    "branch_init='zero': no such initialisation": {"branch_init": "zero"},
    "warmup_iters=0: must be at least 1; .* use schedule='none'": {"warmup_iters": 0},
    "warmup_samples=2.5: must be a whole number": {"warmup_samples": 2.5},
    "warmup_iters and warmup_iters_per_layer each say": {
        "warmup_iters": 9,
        "warmup_iters_per_layer": 3,
    },
    "warmup_iters=9 cannot be used with schedule='file:a.csv'": {
        "warmup_iters": 9,
        "schedule": "file:a.csv",
    },
}


@pytest.mark.parametrize("words", WRONG)
def test_a_wrong_argument_is_an_ordinary_error_that_names_it(words: str) -> None:
    with pytest.raises(ValueError, match=f"^{words}") as error:
        prores.ProResConfig(**WRONG[words])  # type: ignore[arg-type]
    assert "--" not in str(error.value)
    # Through a pool of processes, for one.
    assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)


def test_the_command_line_says_the_same_in_flags() -> None:
    with pytest.raises(UserError) as error, told_in_flags():
        prores.ProResConfig(warmup_iters=9, schedule="file:a.csv")
    assert error.value.message() == (
        "--prores-warmup-iters 9 cannot be used with --prores-schedule file:a.csv: its steps are "
        "those of the file"
    )
    with pytest.raises(UserError) as error, told_in_flags():
        prores.ProResConfig(norm_placement="foo")
    assert error.value.message() == (
        "--norm-placement foo: no such placement; choose one of pre, sandwich, post, deepnorm, lns"
    )


def test_every_argument_has_its_flag() -> None:
    assert set(prores.ProResConfig.__dataclass_fields__) <= set(FLAGS)
    settings = prores.ProResConfig(schedule="linear").settings(4)
    assert set(settings) <= set(FLAGS)


def test_validation_reads_no_file_and_imports_nothing_of_the_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "harmful_schedule.py").write_text("raise RuntimeError('was imported')")
    config = prores.ProResConfig(schedule="harmful_schedule:alphas")
    with pytest.raises(ValueError, match=r"^schedule='harmful_schedule:alphas': .*was imported"):
        config.load()
    config = prores.ProResConfig(schedule=f"file:{tmp_path}/alpha.csv")
    with pytest.raises(ValueError, match="cannot read it: No such file"):
        config.alphas(0, 4)
    (tmp_path / "alpha.csv").write_text("step,1,2\n0,0,0\n")
    with pytest.raises(ValueError, match=r"for 2 layers, the model has 4 \(num_layers\)"):
        prores.ResidualWarmup(config, 4, [])


def test_without_a_schedule_every_layer_is_open() -> None:
    config = prores.ProResConfig(schedule="none")
    assert config.alphas(0, 3).tolist() == [1, 1, 1]
    assert config.opening_steps(3) == [0, 0, 0]
    prores.ResidualWarmup(config, 3, []).set_step(0)


LINEAR = prores.ProResConfig(schedule="linear", warmup_iters=48).settings(4)


def test_settings_are_plain_data_by_argument() -> None:
    assert LINEAR == {
        "schedule": "linear",
        "norm_placement": "pre",
        "branch_init": "normal",
        "num_layers": 4,
        "warmup_iters": 48,
    }
    prores.check_settings(
        LINEAR, prores.ProResConfig(schedule="linear", warmup_iters_per_layer=12).settings(4)
    )


BY_FLAG = {"--prores-schedule": "linear", "--norm-placement": "pre", "--prores-warmup-iters": 24}
OTHER_SETTINGS = {
    "warmup_iters 24 there, 48 here": {**LINEAR, "warmup_iters": 24},
    "schedule 'equal' there, 'linear' here": {**LINEAR, "schedule": "equal"},
    "num_layers 8 there, 4 here": {**LINEAR, "num_layers": 8},
    "schedule 'none' there, 'linear' here": None,
    "settings: warmup_iters 24 there": BY_FLAG,
    "warmup_iters None there, 48 here; warmup_samples 48 there, None here": prores.ProResConfig(
        schedule="linear", warmup_samples=48
    ).settings(4),
}


@pytest.mark.parametrize("words", OTHER_SETTINGS)
def test_other_settings_are_refused(words: str) -> None:
    with pytest.raises(ValueError, match=words):
        prores.check_settings(OTHER_SETTINGS[words], LINEAR)  # type: ignore[arg-type]


def test_a_checkpoint_of_plain_megatron_is_continued_without_prores() -> None:
    prores.check_settings(None, prores.ProResConfig(schedule="none").settings(4))


def weights(layers: int) -> dict[str, np.ndarray]:
    names = ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")
    return {
        "lm_head.weight": np.ones(2),
        **{f"model.layers.{n}.{name}.weight": np.ones(2) for n in range(layers) for name in names},
    }


def test_alphas_are_folded_into_the_last_weight_of_a_branch() -> None:
    folded = prores.fold_alphas(weights(2), "pre", [1.0, 0.25])
    changed = {name: weight[0] for name, weight in folded.items() if weight[0] != 1}
    assert changed == {
        "model.layers.1.self_attn.o_proj.weight": 0.25,
        "model.layers.1.mlp.down_proj.weight": 0.25,
    }


@pytest.mark.parametrize(
    ("layers", "placement", "words"),
    [
        (2, "foo", "^norm_placement='foo': no such placement"),
        (1, "pre", r"^weights: model\.layers\.1\.mlp\.down_proj\.weight is missing, for the 2"),
        (3, "pre", r"^weights: model\.layers\.2\.mlp\.down_proj\.weight is for no layer of the 2"),
    ],
)
def test_weights_that_do_not_fit_are_refused(layers: int, placement: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        prores.fold_alphas(weights(layers), placement, [1.0, 0.5])


def test_an_argument_is_shown_with_its_value_or_alone() -> None:
    error = ArgumentError(Argument("a", "x"), ": wrong, without ", Argument("b"))
    assert str(error) == "a='x': wrong, without b"
