"""The FP8 study: casts, scales, its runs in a small form, and the figures of docs/fp8.md."""

from __future__ import annotations

import argparse
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
from megatron_prores.config import ProResConfig
from studies.fp8 import report
from studies.fp8.document import render
from studies.fp8.formats import E4M3, E5M2, Fp8Format, loss_of, quantize
from studies.fp8.options import read_options
from studies.fp8.recipes import RECIPES, Recipe
from studies.fp8.scaling import Blocks, Current, Delayed

REPOSITORY = Path(__file__).resolve().parents[2]
TOOL = REPOSITORY / "tools" / "fp8_study.py"
DOCUMENT = REPOSITORY / "docs" / "fp8.md"
ONE = torch.ones(())


def numbers_of(target: Fp8Format) -> Tensor:
    """All finite numbers of the format that are not negative, in the order of their codes."""
    numbers = torch.arange(128, dtype=torch.uint8).view(target.dtype).float()
    return numbers[numbers.isfinite()]


def nearest(x: Tensor, numbers: Tensor) -> Tensor:
    """Rounds by comparing with every number: the nearest, of two the one with the even code."""
    away = (x.abs().unsqueeze(-1) - numbers).abs()
    tied = away == away.amin(-1, keepdim=True)
    even = torch.arange(len(numbers)) % 2 == 0
    code = torch.where(tied & even, 2, tied.int()).argmax(-1)
    return numbers[code].copysign(x)


@pytest.mark.parametrize("target", [E4M3, E5M2], ids=lambda target: target.name)
def test_the_cast_gives_the_nearest_number_and_saturates(target: Fp8Format) -> None:
    generator = torch.Generator().manual_seed(0)
    exponents = torch.randint(-20, 18, (4000,), generator=generator)
    x = torch.ldexp(torch.randn(4000, generator=generator), exponents)
    numbers = numbers_of(target)
    halves = (numbers[1:] + numbers[:-1]) / 2  # ties
    x = torch.cat([x, numbers, halves, -halves, torch.tensor([1e6, -1e6, math.inf])])
    torch.testing.assert_close(target.cast(x), nearest(x.clamp(-1e6, 1e6), numbers), rtol=0, atol=0)
    inside = x[x.abs() <= target.largest]
    assert torch.equal(target.cast(inside), inside.to(target.dtype).float())


def test_the_bounds_of_the_formats() -> None:
    assert (E4M3.largest, E4M3.overflow, E4M3.smallest_normal) == (448, 464, 2**-6)
    assert (E5M2.largest, E5M2.overflow, E5M2.smallest_normal) == (57344, 61440, 2**-14)


def test_losses_are_counted_right_on_a_made_tensor() -> None:
    # E4M3: 500 saturates, 450 only rounds; 2^-8 is subnormal; 2^-11 is flushed, 0 is nothing.
    x = torch.tensor([500.0, -450.0, 2**-8, -(2**-11), 0.0, 1.0])
    loss = loss_of(x, ONE, E4M3)
    assert (loss.elements, loss.nonzero) == (6, 5)
    assert (loss.saturated, loss.subnormal, loss.flushed) == (1, 1, 1)
    assert loss.squared_error == pytest.approx(52**2 + 2**2 + 2**-22)
    assert loss.squared_norm == pytest.approx(float(x.square().sum()))
    # With a scale the same happens to other numbers, and the error is that of the numbers.
    scaled = loss_of(x / 1024, ONE * 1024, E4M3)
    assert (scaled.saturated, scaled.subnormal, scaled.flushed) == (1, 1, 1)
    assert scaled.squared_error == pytest.approx(loss.squared_error / 1024**2)
    seen = quantize(x / 1024, ONE * 1024, E4M3)
    assert torch.equal(seen * 1024, torch.tensor([448.0, -448.0, 2**-8, 0.0, 0.0, 1.0]))


def gradient_of(amax: float) -> Tensor:
    """A gradient [8, 8] whose elements are spread evenly from 0 to ``amax``."""
    return torch.linspace(0, amax, 64).view(8, 8)


def test_delayed_scaling_after_zeros_and_under_growth() -> None:
    """t = 0 leaves the scale at 1, with which t = 1 is lost; t = 2 has outgrown that of t = 1."""
    delayed = Delayed(E5M2, history_len=1, algo="most_recent", margin=0)
    losses = []
    for amax in (0.0, 1e-6, 2e-6, 3.2e-6, 3.2e-6):
        x = gradient_of(amax)
        losses.append(loss_of(x, delayed.scales(x)[0], E5M2))
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
    delayed = Delayed(E4M3, history_len=1, algo="most_recent", margin=1)
    assert float(delayed.scale) == 1.0
    delayed.scales(torch.full((2, 2), 7.0))
    assert float(delayed.scale) == pytest.approx(448 / 7 / 2)
    for _ in range(3):
        delayed.scales(torch.full((2, 2), amax))
        assert float(delayed.scale) == pytest.approx(448 / 7 / 2)


def test_a_margin_of_one_leaves_room_for_a_doubling() -> None:
    delayed = Delayed(E5M2, history_len=1, algo="most_recent", margin=1)
    delayed.scales(gradient_of(1e-6))
    x = gradient_of(2e-6)
    assert loss_of(x, delayed.scales(x)[0], E5M2).saturated == 0


def test_the_history_remembers_its_length_of_uses() -> None:
    delayed = Delayed(E4M3, history_len=3, algo="max", margin=0)
    scales = []
    for amax in (64.0, 1.0, 2.0, 4.0, 1.0):
        delayed.scales(gradient_of(amax))
        scales.append(float(delayed.scale))
    assert scales == [7.0, 7.0, 7.0, 112.0, 112.0]


@pytest.mark.parametrize("target", [E4M3, E5M2], ids=lambda target: target.name)
def test_current_scaling_never_saturates_however_the_gradient_grows(target: Fp8Format) -> None:
    current = Current(target)
    for amax in (1e-30, 1e-6, 2e-6, 3e3, 1e30):
        x = gradient_of(amax)
        scale, same = current.scales(x)
        assert same is scale
        assert loss_of(x, scale, target).saturated == 0
        assert float(quantize(x, scale, target).amax()) == pytest.approx(amax, rel=1e-6)
    scale, _ = current.scales(torch.zeros(4, 4))
    assert float(scale) == 1.0


@pytest.mark.parametrize(("size", "rounds_up"), [(128, False), (32, True)])
def test_every_block_is_scaled_by_a_power_of_two_into_the_upper_half_of_the_format(
    size: int, rounds_up: bool
) -> None:
    generator = torch.Generator().manual_seed(1)
    spread = torch.ldexp(
        torch.ones(2 * size, 3 * size),
        torch.randint(-30, 30, (2 * size, 3 * size), generator=generator),
    )
    x = torch.randn(2 * size, 3 * size, generator=generator) * spread
    x[:size, :size] = 0
    x[0, size : 2 * size] = 0
    x[0, size] = 448 * 2.0**-9  # an amax that needs no rounding
    along_rows, along_columns = Blocks(E4M3, size, square=False, rounds_up=rounds_up).scales(x)
    for tensor, scale in ((x, along_rows), (x.mT, along_columns.mT)):
        assert torch.equal(scale.frexp().mantissa, torch.full_like(scale, 0.5))
        blocks = (tensor * scale).unflatten(1, (-1, size)).abs()
        same = scale.unflatten(1, (-1, size))
        assert torch.equal(same.amax(-1), same.amin(-1))
        amax = blocks.amax(-1)
        assert bool(((amax > 224) & (amax <= 448) | (amax == 0)).all())
        assert loss_of(tensor, scale, E4M3).saturated == 0
    assert float(along_rows[0, size]) == 2.0**9
    square, same = Blocks(E4M3, size, square=True, rounds_up=rounds_up).scales(x)
    assert same is square
    assert len(square.unique()) <= 6
    for i in range(2):
        for j in range(3):
            block = (x * square)[i * size : (i + 1) * size, j * size : (j + 1) * size].abs().amax()
            assert 224 < block <= 448 or (i, j) == (0, 0)


def test_a_block_that_is_cut_off_at_the_edge_is_scaled_by_what_is_there() -> None:
    x = torch.tensor([[1.0] * 32 + [3.0, 2.0**-9]])
    along_rows, along_columns = Blocks(E4M3, 32, square=False, rounds_up=True).scales(x)
    assert along_rows.shape == along_columns.shape == x.shape
    assert along_rows[0, [0, 31, 32, 33]].tolist() == [256, 256, 128, 128]
    assert along_columns[0, -2:].tolist() == [128, 2.0**17]


def test_recipes_are_those_of_the_flags() -> None:
    default = RECIPES["delayed"]
    assert default is not None
    assert default.flags() == shlex.split(
        "--fp8-format hybrid --fp8-recipe delayed --fp8-amax-history-len 1 "
        "--fp8-amax-compute-algo most_recent --fp8-margin 0"
    )
    assert [default.format_of(tensor) for tensor in ("input", "weight", "gradient")] == [
        E4M3, E4M3, E5M2,
    ]  # fmt: skip
    ends = RECIPES["tensorwise-bf16-ends"]
    assert ends is not None
    assert ends.flags()[-1] == "--first-last-layers-bf16"
    assert [ends.covers(layer, 4) for layer in (1, 2, 3, 4)] == [False, True, True, False]


def test_megatron_knows_the_defaults_and_values_of_every_recipe() -> None:
    """The flags are read by Megatron's own parser, in a process where it is imported."""
    code = """
import argparse, json
from megatron_prores.command_line import device
device.prepare("cpu")
from megatron.training.arguments import add_megatron_arguments
from studies.fp8.recipes import RECIPES
parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
for recipe in filter(None, RECIPES.values()):
    parser.parse_args(recipe.flags())
defaults = vars(parser.parse_args([]))
names = ("recipe", "amax_history_len", "amax_compute_algo", "margin")
print(json.dumps([defaults["fp8_" + name] for name in names]))
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY
    )
    assert result.returncode == 0, result.stderr
    stock = Recipe()
    assert json.loads(result.stdout.splitlines()[-1]) == [
        stock.recipe, stock.history_len, stock.algo, stock.margin,
    ]  # fmt: skip


SMALL = """
    --device cpu --layers 3 --hidden-size 64 --seq-length 32 --micro-batch-size 1 --steps 4
    --warmup-iters-per-layer 100000 --corpus-megabytes 1
    --recipes bf16,delayed,tensorwise,blockwise,mxfp8 --placements pre --schedules linear
""".split()


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first command of docs/fp8.md, in a small form: real text, real training, every recipe."""
    command = commands()[0]
    folder = tmp_path_factory.mktemp("study")
    paths = ["--name", "small", "--output-dir", str(folder), "--data-dir", str(folder / "data")]
    result = subprocess.run(
        [sys.executable, str(TOOL), *shlex.split(command)[2:], *SMALL, *paths],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert "### pre, linear" in result.stdout
    return folder


def commands() -> list[str]:
    """The commands of the document, as they are typed."""
    (block,) = re.findall(r"^```bash\n(.*?)^```", DOCUMENT.read_text(), re.MULTILINE | re.DOTALL)
    joined = block.replace("\\\n", " ")
    return [" ".join(line.split()) for line in joined.splitlines() if line.strip()]


def rows_of(run: dict[str, Any]) -> dict[tuple[int, int, str], dict[str, Any]]:
    rows = [dict(zip(run["columns"], row, strict=True)) for row in run["gradients"]]
    return {(row["step"], row["layer"], row["linear"]): row for row in rows}


def test_the_study_trains_with_every_recipe_and_writes_what_it_found(study: Path) -> None:
    document = report.read_json(study / "small.json")
    runs = {run["recipe"]: run for run in document["runs"]}
    assert list(runs) == ["bf16", "delayed", "tensorwise", "blockwise", "mxfp8"]
    for run in runs.values():
        assert len(run["loss"]) == len(run["gradient_norm"]) == 4
        assert all(math.isfinite(number) for number in (*run["loss"], *run["gradient_norm"]))
        # Nothing of a branch gets into the stream yet: all start from the same loss.
        assert run["loss"][0] == runs["bf16"]["loss"][0]
        rows = rows_of(run)
        assert len(rows) == 4 * 3 * 4  # steps, layers, linears
        for (step, _, _), row in rows.items():
            assert row["micro_batches"] == 2
            # Alpha is exactly 0 at t = 0, and so is every gradient that enters a branch.
            assert step > 0 or (row["amax"] == 0 and row["error"] is None)
            assert step == 0 or row["amax"] > 0
    assert (study / "small.md").read_text().startswith("- command: python tools/fp8_study.py")
    assert (study / "small.png").read_bytes().startswith(b"\x89PNG")


def test_delayed_scaling_loses_what_the_other_recipes_keep(study: Path) -> None:
    runs = {run["recipe"]: run for run in report.read_json(study / "small.json")["runs"]}
    for (step, _, linear), row in rows_of(runs["delayed"]).items():
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
    for name in ("tensorwise", "blockwise", "mxfp8"):
        bound = 0.07 if name == "tensorwise" else 0.04  # two and three bits of mantissa
        for (step, _, _), row in rows_of(runs[name]).items():
            assert row["saturated"] in (0, None)
            if step > 0:
                assert row["lost"] == 0
                assert 0.01 < row["error"] < bound
                assert 0.01 < row["weight_gradient_error"] < bound
    for (step, _, _), row in rows_of(runs["bf16"]).items():
        if step > 0:
            assert row["lost"] == row["error"] == 0


def test_the_figures_of_the_document_are_those_of_its_files() -> None:
    text = DOCUMENT.read_text()
    folder = DOCUMENT.parent / "fp8"
    assert text.count("<!-- figures: ") >= 5
    assert render(text, folder) == text
    # A figure of the prose is one of the tables'.
    tables = set(re.findall(r"[\d.]+ %", "".join(re.findall(r"^\|.*$", text, re.MULTILINE))))
    prose = set(re.findall(r"[\d.]+ %", re.sub(r"^\|.*$", "", text, flags=re.MULTILINE)))
    assert prose <= tables, prose - tables


def test_a_figure_that_was_changed_by_hand_is_found() -> None:
    text = DOCUMENT.read_text()
    (cell, *_) = re.findall(r"\| [\d.]+ % \|", text)
    assert render(text.replace(cell, "| 12.3456 % |"), DOCUMENT.parent / "fp8") == text


def test_the_commands_of_the_document_made_its_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)  # one names a file of the repository
    made = {}
    for command in commands():
        python, tool, *argv = shlex.split(command)
        assert (python, tool) == ("$PYTHON", "tools/fp8_study.py")
        options = read_options(argv)
        made[options.name] = f"python tools/fp8_study.py {shlex.join(argv)}"
    files = {path.stem: path for path in (DOCUMENT.parent / "fp8").glob("*.json")}
    assert made.keys() == files.keys()
    for name, path in files.items():
        assert report.read_json(path)["header"]["command"] == made[name]


def advice(*flags: str, schedule: str = "linear", restart: bool = False) -> list[str]:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fp8-format", dest="fp8")
    parser.add_argument("--fp8-recipe", default="delayed")
    parser.add_argument("--fp8-amax-history-len", type=int, default=1)
    parser.add_argument("--fp8-amax-compute-algo", default="most_recent")
    parser.add_argument("--fp8-margin", type=int, default=0)
    parser.add_argument("--first-last-layers-bf16", action="store_true")
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
        *(advice(*recipe.flags()) for recipe in RECIPES.values() if recipe and good(recipe)),
        advice("--fp8-format e4m3", f"{history} 1024"),
        advice("--fp8-format e4m3", f"{history} 16", restart=True),
        advice("--fp8-format hybrid", f"{history} 1024", restart=True),
        advice("--fp8-format e4m3", "--fp8-recipe tensorwise", f"{history} 1024", restart=True),
        advice("--fp8-format e4m3", f"{history} 1024", restart=True, schedule="none"),
    ):
        assert quiet == []


def good(recipe: Recipe) -> bool:
    return not (recipe.recipe in ("blockwise", "mxfp8") and recipe.format == "hybrid")


def test_recipes_without_a_memory_lose_nothing_at_any_step_of_the_figures() -> None:
    figures = report.groups(report.read_json(DOCUMENT.parent / "fp8" / "early.json"))
    assert len(figures) == 4
    for (_, schedule), recipes in figures.items():
        for name, runs in recipes.items():
            if not name.startswith("delayed"):
                for step in report.steps_of(runs):
                    assert max(report.figures(runs, "saturated", step), default=0) == 0
                    is_closed = schedule == "linear" and step == 0
                    assert report.lost_part(runs, step) == (1 if is_closed else 0)


def test_the_harm_that_advice_warns_of_is_in_the_figures() -> None:
    folder = DOCUMENT.parent / "fp8"
    early = report.groups(report.read_json(folder / "early.json"))
    for recipes in early.values():
        for step in (2, 3):
            for name in ("blockwise", "mxfp8"):
                hybrid, same = (
                    report.figures(recipes[recipe], "error", step)
                    for recipe in (f"{name}-hybrid", name)
                )
                assert min(hybrid) > 1.8 * max(same)
    (restart,) = report.groups(report.read_json(folder / "restart.json")).values()
    flushed = {
        name: sum(report.figures(runs, "flushed", 21)) / len(report.figures(runs, "flushed", 21))
        for name, runs in restart.items()
    }
    assert flushed["delayed-max1024-e4m3"] > 0.2
    assert max(flushed[name] for name in ("tensorwise", "delayed-max1024", "delayed")) < 0.001
