import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread
from torch.utils.tensorboard import SummaryWriter

from megatron_prores.errors import UserError
from megatron_prores.runs import plot

TOOL = Path(__file__).resolve().parents[2] / "tools" / "plot_run.py"

LAYERS = 3


def write_events(folder: Path, steps: range, loss: float, alphas: bool, wall_time: float) -> None:
    writer = SummaryWriter(str(folder), filename_suffix=f".{wall_time:.0f}")
    for step in steps:
        writer.add_scalar(plot.TRAIN_TAG, loss, step, walltime=wall_time + step)
        if step % 20 == 0:
            writer.add_scalar(plot.VALID_TAG, loss + 0.5, step, walltime=wall_time + step)
        for layer in range(1, LAYERS + 1) if alphas else ():
            alpha = min(step / (20 * layer), 1.0)
            writer.add_scalar(f"prores/alpha/layer_{layer}", alpha, step, walltime=wall_time)
    writer.close()


def test_both_panels_show_what_was_logged(tmp_path: Path) -> None:
    write_events(tmp_path, range(10, 101, 10), 3.0, alphas=True, wall_time=1000)
    figure = plot.draw_run(plot.read_scalars(tmp_path), "a run")
    upper, lower, _bar = figure.axes
    lines = {line.get_label(): line for line in upper.lines}
    assert list(lines["training"].get_xdata()) == list(range(10, 101, 10))
    assert list(lines["validation"].get_ydata()) == [3.5] * 5
    heat = np.asarray(lower.collections[0].get_array()).reshape(LAYERS, 10)
    expected = [[min(step / (20 * n), 1) for step in range(10, 101, 10)] for n in (1, 2, 3)]
    np.testing.assert_allclose(heat, expected, rtol=1e-6)
    assert lower.collections[0].get_clim() == (0, 1)
    assert upper.get_shared_x_axes().joined(upper, lower)
    # Layer 1 at the bottom.
    assert lower.get_ylim()[0] < lower.get_ylim()[1]
    assert [label.get_text() for label in lower.get_yticklabels()] == ["1", "2", "3"]


def test_a_resumed_run_counts_where_it_repeats_iterations(tmp_path: Path) -> None:
    # The later file has the name that sorts first: the order of writing must decide.
    write_events(tmp_path / "old", range(10, 81, 10), 5.0, alphas=False, wall_time=1000)
    write_events(tmp_path / "new", range(60, 101, 10), 4.0, alphas=False, wall_time=2000)
    for name, folder in (("b", "old"), ("a", "new")):
        (source,) = (tmp_path / folder).iterdir()
        source.rename(tmp_path / f"{name}.tfevents")
    train = plot.read_scalars(tmp_path)[plot.TRAIN_TAG]
    assert train.steps.tolist() == list(range(10, 101, 10))
    assert train.values.tolist() == [5.0] * 5 + [4.0] * 5


def test_every_record_is_kept_however_long_the_run(tmp_path: Path) -> None:
    write_events(tmp_path, range(1, 12_001), 3.0, alphas=False, wall_time=1000)
    assert len(plot.read_scalars(tmp_path)[plot.TRAIN_TAG].steps) == 12_000


def test_a_run_without_alphas_has_one_panel(tmp_path: Path) -> None:
    write_events(tmp_path, range(10, 51, 10), 3.0, alphas=False, wall_time=1000)
    assert len(plot.draw_run(plot.read_scalars(tmp_path)).axes) == 1


def test_a_long_noisy_loss_is_smoothed_without_bias_or_loss_of_nan() -> None:
    steps = np.arange(1000)
    values = 5.0 - 0.004 * steps + 0.1 * (-1.0) ** steps
    values[500] = np.nan
    smooth = plot._smooth(plot.Series(steps, values), 20)
    assert len(smooth.steps) == 999 - 19
    np.testing.assert_allclose(smooth.values, 5.0 - 0.004 * smooth.steps, atol=0.011)
    # And it is what the picture shows.
    upper = plot.draw_run({plot.TRAIN_TAG: plot.Series(steps, values)}).axes[0]
    (line,) = (line for line in upper.lines if line.get_label() == "training (smoothed)")
    np.testing.assert_array_equal(line.get_ydata(), smooth.values)
    # A run whose loss was never finite has a picture too.
    plot.draw_run({plot.TRAIN_TAG: plot.Series(steps, np.full(1000, np.nan))})


def test_the_tool_writes_a_picture_and_nothing_else(tmp_path: Path) -> None:
    write_events(tmp_path / "logs", range(10, 101, 10), 3.0, alphas=True, wall_time=1000)
    result = subprocess.run(
        [sys.executable, "-B", str(TOOL), "--tensorboard-dir", "logs", "--output", "new/run.png"],
        cwd=tmp_path, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["run.png"]
    height, width, _ = imread(tmp_path / "new" / "run.png").shape
    assert width > 1000
    assert height > 600


@pytest.mark.parametrize(
    ("folder", "output", "words"),
    [
        ("missing", "x.png", "--tensorboard-dir missing: no such folder"),
        ("empty", "x.png", "no TensorBoard event files"),
        ("no_scalars", "x.png", "no scalars"),
        ("no_loss", "x.png", "no loss"),
        ("no_loss", "x.pdf", "--output x.pdf"),
    ],
)
def test_a_wrong_input_is_told_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str, output: str, words: str
) -> None:
    (tmp_path / "empty").mkdir()
    SummaryWriter(str(tmp_path / "no_scalars")).close()
    with SummaryWriter(str(tmp_path / "no_loss")) as writer:
        writer.add_scalar("learning-rate", 0.1, 1)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=words):
        plot.main(["--tensorboard-dir", folder, "--output", output])
    assert not (tmp_path / output).exists()


def test_the_tool_ends_a_wrong_input_without_a_traceback(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-B", str(TOOL), "--tensorboard-dir", "missing", "--output", "x.png"],
        cwd=tmp_path, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert result.returncode == 2
    assert result.stderr == "error: --tensorboard-dir missing: no such folder\n"
