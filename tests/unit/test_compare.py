"""Runs beside each other, against numbers by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.image import imread

from megatron_prores.errors import UserError
from megatron_prores.runs.compare import main
from megatron_prores.runs.logged import VALID_TAG, load_run
from megatron_prores.runs.picture import draw_runs
from tests.unit.event_files import write_start

RMS = {f"prores/residual_rms/layer_{layer}": {1: 1.0, 8: float(layer)} for layer in (1, 2, 10)}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain run; a better one with half the batch, longer sequences, and more logs; a failure."""
    root = tmp_path_factory.mktemp("runs")
    plain = {step: 4.0 - 0.25 * step for step in range(1, 9)}
    write_start(root / "plain", plain, more={VALID_TAG: {4: 3.25, 8: 2.25}}, settings={"a": 1})
    better = {step: 3.5 - 0.25 * step for step in range(1, 9)}
    write_start(
        root / "better/tensorboard", better, batch=5, seconds=18,
        settings={"seq_length": 8, "a": 1, "lr": "x" * 50},
        more={VALID_TAG: {4: 2.25, 8: 1.25}, **RMS},
    )  # fmt: skip
    write_start(root / "nan", {1: 4.0, 2: math.nan, 3: math.nan}, settings={"a": 1})
    return root


def compared(capsys: pytest.CaptureFixture[str], *argv: object) -> dict[str, list[str]]:
    """Runs the command; row of the table -> its cells."""
    main([*map(str, argv)])
    lines = capsys.readouterr().out.splitlines()
    names = lines[0].split()
    cells = {}
    for line in filter(None, lines):
        head, *values = line.rsplit(maxsplit=len(names))
        cells[head.strip()] = values
    return {"": names, **cells}


def test_the_table_has_the_numbers_of_each_run(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = compared(capsys, runs / "plain", runs / "better", f"bad={runs / 'nan'}", "--ema", 0)
    assert rows[""] == ["plain", "better", "bad"]
    expected = {
        "iterations": "8 8 3",
        "tokens": "320 320 120",
        "hours of training": "0.07 0.035 0.02",
        "tokens per second, median": "1.11111 2.22222 1.11111",
        "training loss, mean of the last": "2.8750 2.3750 4.0000",
        "steps: 1%, at least 10": "8 8 3",
        "validation loss, last": "2.2500 1.2500 -",
        "validation loss, best": "2.2500 1.2500 -",
        "validation perplexity, last": "9.49 3.49 -",
        "training loss minus the first's": "- -0.5000 +0.2500",
        "validation loss minus the first's": "- -1.0000 -",
        "largest gradient norm": "7.5 6.5 8",
        "iterations with inf or NaN": "0 0 2",
        "skipped iterations": "0 0 0",
        "seq_length": "4 8 4",
        "lr": f"- {'x' * 14}...{'x' * 14} -",
    }
    assert {name: " ".join(rows[name]) for name in expected} == expected
    assert rows["arguments"] == ["that", "differ"]
    assert not {"a", "save"} & set(rows)
    shown = compared(capsys, runs / "plain", runs / "better", "--all-flags")
    assert "save" in shown


def test_one_run_has_no_gap_and_no_difference(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([str(runs / "plain")])
    printed = capsys.readouterr().out
    assert "minus the first" not in printed
    assert printed.endswith("no arguments differ\n")
    titles = {axes.get_title() for axes in draw_runs([load_run(runs / "plain")]).axes}
    assert not any("minus" in title or "rms" in title for title in titles)


def test_the_files_hold_what_was_found(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    numbers, picture = tmp_path / "new/numbers.json", tmp_path / "new/runs.png"
    main([*map(str, (runs / "plain", runs / "nan", "--json", numbers, "--output", picture))])

    def refuse(constant: str) -> Any:
        raise AssertionError(f"{constant} is no JSON")

    content = json.loads(numbers.read_text(), parse_constant=refuse)
    assert content["runs"]["plain"]["tokens"] == 320
    assert content["runs"]["plain"]["train_gap"] is None
    assert content["runs"]["nan"]["nan_iterations"] == 2
    assert content["settings"] == {}
    height, width, _ = imread(picture).shape
    assert width > 1500
    assert height > 1000
    assert {path.name for path in picture.parent.iterdir()} == {"numbers.json", "runs.png"}


def test_the_picture_has_the_curves_of_each_run(runs: Path) -> None:
    plain, better = load_run(runs / "plain"), load_run(runs / "better")
    figure = draw_runs([plain, better], weight=0)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["plain", "better"]
    panels = {(axes.get_title(), axes.get_xlabel()): axes for axes in figure.axes}

    def curve(axes: Axes, color: str) -> list[tuple[float, float]]:
        (line,) = (
            each for each in axes.lines if each.get_color() == color and len(each.get_xdata())
        )
        return [(round(float(x), 6), round(float(y), 6)) for x, y in line.get_xydata()]

    loss = panels["training loss, moving average", "tokens"]
    assert curve(loss, "C0") == [(40 * step, 4.0 - 0.25 * step) for step in range(1, 9)]
    assert curve(loss, "C1")[-1] == (320, 1.5)
    assert curve(panels["training loss, moving average", "hours of training"], "C1")[-1] == (
        0.035,
        1.5,
    )
    assert curve(panels["validation loss", "tokens"], "C1") == [(160, 2.25), (320, 1.25)]
    lower = panels["training loss minus the first run's", "tokens"]
    assert {y for _, y in curve(lower, "C1")} == {-0.5}
    assert {y for _, y in curve(lower, "C0")} == {0.0}  # the first, a line
    validation = panels["validation loss minus the first run's", "tokens"]
    assert curve(validation, "C1") == [(160, -1.0), (320, -1.0)]
    assert curve(panels["gradient norm", "tokens"], "C0")[0] == (40, 7.5)
    rates = curve(panels["tokens per second", "tokens"], "C1")
    assert [round(y, 3) for _, y in rates] == [2.222, 2.222]
    # Of the run that has logged them; the last layer by its number.
    assert curve(panels["rms behind the last layer", "tokens"], "C1") == [(40, 1.0), (320, 10.0)]
    ends = curve(panels["rms behind each layer, at the end", "layer"], "C1")
    assert ends == [(1, 1.0), (2, 2.0), (10, 10.0)]


def test_a_dozen_runs_have_colors_of_their_own(runs: Path) -> None:
    run = load_run(runs / "plain")
    figure = draw_runs([run] * 12)
    assert len({to_rgba(line.get_color()) for line in figure.legends[0].get_lines()}) == 12


def test_a_directory_may_have_a_sign_in_its_name(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "lr=1").symlink_to(runs / "plain")
    rows = compared(capsys, tmp_path / "lr=1", f"b={runs / 'better'}")
    assert rows[""] == ["lr=1", "b"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("{r}/plain {r}/better {r}/better/tensorboard", r"better and .*tensorboard are one run"),
        ("a={r}/plain b={r}/plain", "a=.* and b=.* are one run"),
        ("x={r}/plain x={r}/better", "2 runs are called x: name them"),
        ("{r}/plain {r}/worse", "worse: no such directory"),
        ("{r}/plain --output {r}/runs.pdf", "--output .* must name a .png file"),
        ("{r}/plain --json {r}", "--json .* is a directory"),
        ("{r}/plain --ema 1.5", "--ema 1.5: "),
        ("", "RUN"),
    ],
)
def test_a_wrong_input_is_told_in_one_line(argv: str, words: str, runs: Path) -> None:
    with pytest.raises(UserError, match=words):
        main(argv.format(r=runs).split())
