"""The FP8 study: casts, scales, its runs in a small form, and the figures of docs/fp8.md."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_prores.command_line.fp8 import fp8_advice
from megatron_prores.config.prores_config import ProResConfig
from megatron_prores.errors import UserError
from studies.fp8 import __main__ as study_program
from studies.fp8 import report
from studies.fp8.formats import E4M3, E5M2, Loss, overflow, quantize
from studies.fp8.recipes import RECIPES, Recipe
from studies.fp8.scaling import Delayed, Scaling, blocks, current

REPOSITORY = Path(__file__).resolve().parents[2]
DOCUMENT = REPOSITORY / "docs" / "fp8.md"
FIGURES = DOCUMENT.parent / "fp8"
ONE = torch.ones(())

formats = pytest.mark.parametrize("target", [E4M3, E5M2], ids=str)


def loss_of(x: Tensor, scale: Tensor, target: torch.dtype) -> Loss:
    return quantize(x, scale, target).loss()


def numbers_of(target: torch.dtype) -> Tensor:
    """All finite numbers of the format that are not negative, in the order of their codes."""
    numbers = torch.arange(128, dtype=torch.uint8).view(target).float()
    return numbers[numbers.isfinite()]


def nearest(x: Tensor, numbers: Tensor) -> Tensor:
    """Rounds by comparing with every number: the nearest, of two the one with the even code."""
    away = (x.abs().unsqueeze(-1) - numbers).abs()
    tied = away == away.amin(-1, keepdim=True)
    even = torch.arange(len(numbers)) % 2 == 0
    code = torch.where(tied & even, 2, tied.int()).argmax(-1)
    return numbers[code].copysign(x)


@formats
def test_the_cast_gives_the_nearest_number_and_saturates(target: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    exponents = torch.randint(-20, 18, (4000,), generator=generator)
    x = torch.ldexp(torch.randn(4000, generator=generator), exponents)
    numbers = numbers_of(target)
    halves = (numbers[1:] + numbers[:-1]) / 2  # ties
    x = torch.cat([x, numbers, halves, -halves, torch.tensor([1e6, -1e6, math.inf])])
    seen = quantize(x, ONE, target).seen
    torch.testing.assert_close(seen, nearest(x.clamp(-1e6, 1e6), numbers), rtol=0, atol=0)


@formats
def test_what_only_rounds_to_the_largest_number_has_not_saturated(target: torch.dtype) -> None:
    before_last, last = numbers_of(target)[-2:].tolist()
    bound = last + (last - before_last) / 2
    assert overflow(target) == bound
    assert loss_of(torch.tensor([last, bound, -bound]), ONE, target).saturated == 0
    assert loss_of(torch.tensor([bound * 1.001, -math.inf]), ONE, target).saturated == 2


def test_losses_are_counted_right_on_a_made_tensor() -> None:
    # E4M3: 500 saturates, 450 only rounds; 2^-8 is left; 2^-11 is flushed, 0 is nothing.
    x = torch.tensor([500.0, -450.0, 2**-8, -(2**-11), 0.0, 1.0])
    loss = loss_of(x, ONE, E4M3)
    assert (loss.amax, loss.nonzero, loss.saturated, loss.flushed) == (500, 5, 1, 1)
    assert loss.squared_error == pytest.approx(52**2 + 2**2 + 2**-22)
    assert loss.squared_norm == pytest.approx(float(x.square().sum()))
    # With a scale the same happens to other numbers, and the error is that of the numbers.
    scaled = loss_of(x / 1024, ONE * 1024, E4M3)
    assert (scaled.scale, scaled.saturated, scaled.flushed) == (1024, 1, 1)
    assert scaled.squared_error == pytest.approx(loss.squared_error / 1024**2)
    seen = quantize(x / 1024, ONE * 1024, E4M3).seen
    assert torch.equal(seen * 1024, torch.tensor([448.0, -448.0, 2**-8, 0.0, 0.0, 1.0]))


def gradient_of(amax: float) -> Tensor:
    """A gradient [8, 8] whose elements are spread evenly from 0 to ``amax``."""
    return torch.linspace(0, amax, 64).view(8, 8)


def test_delayed_scaling_after_zeros_and_under_growth() -> None:
    """t = 0 leaves the scale at 1, with which t = 1 is lost; t = 2 has outgrown that of t = 1."""
    delayed = Delayed(E5M2)
    losses = []
    for amax in (0.0, 1e-6, 2e-6, 3.2e-6, 3.2e-6):
        x = gradient_of(amax)
        losses.append(loss_of(x, delayed(x), E5M2))
    zeros, first, doubled, grown, steady = losses
    assert zeros.nonzero == 0
    assert first.flushed == first.nonzero == 63  # 1e-6 is far below 2^-17
    # Twice the amax: what is above 61440 / 57344 of the old one saturates. 1.6 times likewise.
    assert doubled.saturated == sum(i / 63 * 2 > 61440 / 57344 for i in range(64)) > 0
    assert grown.saturated == sum(i / 63 * 1.6 > 61440 / 57344 for i in range(64)) > 0
    assert steady.saturated == 0
    assert float(delayed.scale) == pytest.approx(57344 / 3.2e-6)


@pytest.mark.parametrize("amax", [0.0, math.inf, math.nan])
def test_delayed_scaling_keeps_its_scale_where_nothing_can_be_learned(amax: float) -> None:
    delayed = Delayed(E4M3, margin=1)
    assert float(delayed.scale) == 1.0
    delayed(torch.full((2, 2), 7.0))
    assert float(delayed.scale) == pytest.approx(448 / 7 / 2)
    for _ in range(3):
        delayed(torch.full((2, 2), amax))
        assert float(delayed.scale) == pytest.approx(448 / 7 / 2)


def test_a_margin_of_one_leaves_room_for_a_doubling() -> None:
    delayed = Delayed(E5M2, margin=1)
    delayed(gradient_of(1e-6))
    x = gradient_of(2e-6)
    assert loss_of(x, delayed(x), E5M2).saturated == 0


def test_the_history_remembers_its_length_of_uses() -> None:
    delayed = Delayed(E4M3, history_len=3)
    scales = []
    for amax in (64.0, 1.0, 2.0, 4.0, 1.0):
        delayed(gradient_of(amax))
        scales.append(float(delayed.scale))
    assert scales == [7.0, 7.0, 7.0, 112.0, 112.0]


@formats
def test_current_scaling_never_saturates_however_the_gradient_grows(target: torch.dtype) -> None:
    for amax in (1e-30, 1e-6, 2e-6, 3e3, 1e30):
        x = gradient_of(amax)
        scale = current(x, target)
        assert loss_of(x, scale, target).saturated == 0
        assert float(quantize(x, scale, target).seen.amax()) == pytest.approx(amax, rel=1e-6)
    assert float(current(torch.zeros(4, 4), target)) == 1.0


@pytest.mark.parametrize("size", [32, 128])
def test_every_block_is_scaled_by_a_power_of_two_into_the_upper_half_of_the_format(
    size: int,
) -> None:
    generator = torch.Generator().manual_seed(1)
    shape = (2 * size, 3 * size)
    exponents = torch.randint(-30, 30, shape, generator=generator)
    x = torch.ldexp(torch.randn(shape, generator=generator), exponents)
    x[:size, :size] = 0
    x[0, size : 2 * size] = 0
    x[0, size] = 448 * 2.0**-9  # an amax that needs no rounding
    for height, width in ((1, size), (size, 1), (size, size)):
        scale = blocks(x, E4M3, height, width)
        assert torch.equal(scale.frexp().mantissa, torch.full_like(scale, 0.5))
        # [rows of blocks, height, columns of blocks, width]
        parts = [t.unflatten(1, (-1, width)).unflatten(0, (-1, height)) for t in (scale, x * scale)]
        assert torch.equal(parts[0].amax((1, 3)), parts[0].amin((1, 3)))
        amax = parts[1].abs().amax((1, 3))
        assert bool(((amax > 224) & (amax <= 448) | (amax == 0)).all())
        assert loss_of(x, scale, E4M3).saturated == 0
    assert float(blocks(x, E4M3, 1, size)[0, size]) == 2.0**9


def test_a_block_that_is_cut_off_at_the_edge_is_scaled_by_what_is_there() -> None:
    x = torch.tensor([[1.0] * 32 + [3.0, 2.0**-9]])
    along_rows, along_columns = blocks(x, E4M3, 1, 32), blocks(x, E4M3, 32, 1)
    assert along_rows.shape == along_columns.shape == x.shape
    assert along_rows[0, [0, 31, 32, 33]].tolist() == [256, 256, 128, 128]
    assert along_columns[0, -2:].tolist() == [128, 2.0**17]


def test_a_restart_is_lost_on_a_long_history_in_e4m3() -> None:
    """Alpha falls from 1 to almost nothing: the harm that advice warns of."""

    def flushed(scaling: Scaling, target: torch.dtype) -> float:
        scaling(gradient_of(1.0))
        x = gradient_of(1e-5)
        scaling(x)  # of the step itself, the first that a short history remembers
        loss = loss_of(x, scaling(x), target)
        return loss.flushed / loss.nonzero

    assert flushed(Delayed(E4M3, history_len=1024), E4M3) > 0.2
    for scaling, target in (
        (Delayed(E4M3), E4M3),
        (Delayed(E5M2, history_len=1024), E5M2),
        (lambda x: current(x, E4M3), E4M3),
    ):
        assert flushed(scaling, target) == 0


def test_the_defaults_and_the_names_of_recipes_are_megatrons() -> None:
    from megatron.core.enums import Fp8Recipe
    from megatron.core.transformer import TransformerConfig

    stock = {field.name: field.default for field in dataclasses.fields(TransformerConfig)}
    names = ("recipe", "amax_history_len", "margin")
    assert Recipe() == Recipe(**{name: stock[f"fp8_{name}"] for name in names})
    found = {recipe.recipe for recipe in RECIPES.values() if recipe is not None}
    assert found <= {known.value for known in Fp8Recipe}


def test_a_recipe_covers_the_tensors_and_layers_that_megatron_gives_it() -> None:
    hybrid, e4m3, ends = Recipe(), Recipe(format="e4m3"), Recipe("tensorwise", bf16_ends=True)
    tensors = ("input", "weight", "gradient")
    assert [hybrid.format_of(tensor) for tensor in tensors] == [E4M3, E4M3, E5M2]
    assert [e4m3.format_of(tensor) for tensor in tensors] == [E4M3, E4M3, E4M3]
    assert [ends.covers(layer, 4) for layer in (1, 2, 3, 4)] == [False, True, True, False]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--recipes bf16 fp4", "--recipes: invalid choice: 'fp4'"),
        ("--recipes delayed mxfp8", "--recipes delayed mxfp8: bf16 is missing"),
        ("--placements peri", "--placements: invalid choice: 'peri'"),
        ("--schedules cosine", "--schedules cosine"),
        ("--schedules file:/nowhere/alpha.csv", "No such file"),
        ("--schedules file:docs/fp8/restart.csv --layers 5", "--schedules file:docs/fp8/restart"),
        ("--steps 0", "--steps: 0 must be at least 1"),
        ("--hidden-size 100", "--hidden-size 100: must be a multiple of 64"),
        ("--seeds one", "--seeds: invalid positive value: 'one'"),
        ("--recorded-steps 1 x", "--recorded-steps: invalid int value: 'x'"),
        ("--name a/b", "--name a/b"),
        ("--name ''", "--name"),
        ("--output-dir README.md", "--output-dir README.md: File exists"),
        ("--output-dir README.md/study", "--output-dir README.md/study: Not a directory"),
    ],
)
def test_a_wrong_command_line_is_refused_before_any_work(
    argv: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr(sys, "argv", ["studies.fp8", *shlex.split(argv)])
    monkeypatch.delattr(study_program.device, "prepare")
    with pytest.raises(UserError, match=re.escape(words)):
        study_program.main()


def test_a_refusal_is_one_line_and_exit_code_2() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "studies.fp8", "--steps", "0"],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
    )
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.splitlines()[-1].startswith("error: argument --steps: 0 must be")


SMALL = """
    --layers 3 --hidden-size 64 --seq-length 32 --micro-batch-size 1
    --warmup-iters-per-layer 100000 --corpus-megabytes 1 --placements pre --schedules linear
    --recipes bf16 delayed tensorwise blockwise mxfp8 mxfp8-hybrid
"""


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first command of docs/fp8.md, in a small form: real text, real training, every recipe."""
    folder = tmp_path_factory.mktemp("study")
    python, *argv = shlex.split(f"{commands()[0]} {SMALL}")
    argv += ["--name", "small", "--output-dir", str(folder), "--data-dir", str(folder / "data")]
    result = subprocess.run(
        [sys.executable, *argv], capture_output=True, text=True, timeout=300, cwd=REPOSITORY
    )
    assert result.returncode == 0, result.stderr
    assert python == "$PYTHON"
    # What it prints has the form of the document's table.
    (head, *_) = re.findall(r"^\| recipe \| lost.*$", DOCUMENT.read_text(), re.MULTILINE)
    assert head in result.stdout.splitlines()
    return folder


def commands() -> list[str]:
    """The commands of the document, as they are typed."""
    (block,) = re.findall(r"^```bash\n(.*?)^```", DOCUMENT.read_text(), re.MULTILINE | re.DOTALL)
    joined = block.replace("\\\n", " ")
    return [" ".join(line.split()) for line in joined.splitlines() if line.strip()]


def figures_of(run: dict[str, Any]) -> dict[tuple[int, int, str], dict[str, Any]]:
    rows = [dict(zip(run["columns"], row, strict=True)) for row in run["gradients"]]
    return {(row["step"], row["layer"], row["linear"]): row for row in rows}


def runs_of(study: Path) -> dict[str, dict[str, Any]]:
    runs = json.loads((study / "small.json").read_text())["runs"]
    return {run["recipe"]: run for run in runs}


def test_the_study_trains_with_every_recipe_and_writes_what_it_found(study: Path) -> None:
    runs = runs_of(study)
    assert list(runs) == ["bf16", "delayed", "tensorwise", "blockwise", "mxfp8", "mxfp8-hybrid"]
    for run in runs.values():
        assert len(run["loss"]) == 12
        assert all(math.isfinite(loss) for loss in run["loss"])
        # Nothing of a branch gets into the stream yet: all start from the same loss.
        assert run["loss"][0] == runs["bf16"]["loss"][0]
        rows = figures_of(run)
        assert len(rows) == 8 * 3 * 4  # steps, layers, linears
        for (step, _, _), row in rows.items():
            assert row["micro_batches"] == 2
            # Alpha is exactly 0 at t = 0, and so is every gradient that enters a branch.
            assert step > 0 or (row["amax"] == 0 and row["error"] is None)
            assert step == 0 or row["amax"] > 0
    assert (study / "small.png").read_bytes().startswith(b"\x89PNG")


def test_delayed_scaling_loses_what_the_other_recipes_keep(study: Path) -> None:
    runs = runs_of(study)
    for (step, _, linear), row in figures_of(runs["delayed"]).items():
        last_of_its_branch = linear in ("proj", "fc2")
        if step == 1:
            # The scale is still 1: the last linear loses the first micro-batch. It hands nothing
            # on, so that the linear before it sees its first gradient, and loses it, a use later.
            assert row["scale"] == 1.0
            assert row["lost"] == (1 if last_of_its_branch else 2)
            assert row["first_flushed"] == (1.0 if last_of_its_branch else None)
        if step == 2:
            assert row["lost"] == 0
            if last_of_its_branch:  # alpha has doubled since the scale was made
                assert row["first_saturated"] > 0
                assert row["first_error"] > 0.06
    for name in ("tensorwise", "blockwise", "mxfp8", "mxfp8-hybrid"):
        # Two bits of mantissa in E5M2, three in E4M3.
        low, high = (0.01, 0.04) if name in ("blockwise", "mxfp8") else (0.04, 0.07)
        for (step, _, _), row in figures_of(runs[name]).items():
            assert row["saturated"] in (0, None)
            if step > 0:
                assert row["lost"] == 0
                assert low < row["error"] < high
                assert low < row["weight_gradient_error"] < high
    for (step, _, _), row in figures_of(runs["bf16"]).items():
        if step > 0:
            assert row["lost"] == row["error"] == 0


def test_the_figures_of_the_document_are_those_of_its_files() -> None:
    text = DOCUMENT.read_text()
    assert text.count("<!-- figures: ") >= 5
    assert report.render(text, FIGURES) == text
    # A figure of the prose is one of the tables'.
    tables = set(re.findall(r"[\d.]+ %", "".join(re.findall(r"^\|.*$", text, re.MULTILINE))))
    prose = set(re.findall(r"[\d.]+ %", re.sub(r"^\|.*$", "", text, flags=re.MULTILINE)))
    assert prose <= tables, prose - tables


def test_a_figure_that_was_changed_by_hand_is_put_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = DOCUMENT.read_text()
    (cell, *_) = re.findall(r"\| [\d.]+ % \|", text)
    copy = tmp_path / "fp8.md"
    copy.write_text(text.replace(cell, "| 12.3456 % |"))
    python, dash_m, module, document, folder = shlex.split(commands()[-1])
    assert (python, dash_m, module) == ("$PYTHON", "-m", "studies.fp8.report")
    assert REPOSITORY / document == DOCUMENT
    monkeypatch.setattr(sys, "argv", [module, str(copy), str(REPOSITORY / folder)])
    report.main()
    assert copy.read_text() == text


def test_the_commands_of_the_document_made_its_files() -> None:
    typed = [command.removeprefix("$PYTHON ") for command in commands()[:-1]]
    made = {
        path.stem: json.loads(path.read_text())["header"]["command"].removeprefix("python ")
        for path in FIGURES.glob("*.json")
    }
    assert sorted(typed) == sorted(made.values())
    assert all(f" --name {name} " in command for name, command in made.items())


def advice(*flags: str, schedule: str = "linear", restart: bool = False) -> list[str]:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fp8-format", dest="fp8")
    parser.add_argument("--fp8-recipe", default="delayed")
    parser.add_argument("--fp8-amax-history-len", type=int, default=1)
    parser.add_argument("--fp8-amax-compute-algo", default="most_recent")
    args = parser.parse_args([word for flag in flags for word in flag.split()])
    args.prores_restart = restart
    return fp8_advice(args, ProResConfig(schedule=schedule))


def test_advice_is_given_where_the_figures_show_harm() -> None:
    for recipe in ("blockwise", "mxfp8"):
        (line,) = advice("--fp8-format hybrid", f"--fp8-recipe {recipe}")
        assert f"--fp8-recipe {recipe}" in line
        assert "--fp8-format e4m3" in line
    history = "--fp8-amax-compute-algo max --fp8-amax-history-len"
    (line,) = advice("--fp8-format e4m3", f"{history} 1024", restart=True)
    assert "--prores-restart" in line
    assert "--fp8-amax-history-len 1024" in line
    assert "\n" not in line


def test_no_advice_where_the_figures_show_no_harm() -> None:
    history = "--fp8-amax-compute-algo max --fp8-amax-history-len"
    for quiet in (
        advice(),
        advice("--fp8-format hybrid"),
        advice("--fp8-format hybrid", "--fp8-recipe tensorwise"),
        advice("--fp8-format e4m3", "--fp8-recipe blockwise"),
        advice("--fp8-format e4m3", "--fp8-recipe mxfp8"),
        advice("--fp8-format e4m3", f"{history} 1024"),
        advice("--fp8-format e4m3", f"{history} 16", restart=True),
        advice("--fp8-format hybrid", f"{history} 1024", restart=True),
        advice("--fp8-format e4m3", "--fp8-recipe tensorwise", f"{history} 1024", restart=True),
        advice("--fp8-format e4m3", f"{history} 1024", restart=True, schedule="none"),
    ):
        assert quiet == []
