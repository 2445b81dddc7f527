"""The first command of README, shortened by its own settings, from a clean clone."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from megatron_prores.runs.logged import read_scalars
from tests.examples.clone import environment, make_clone, run

SHORT = {
    "PRORES_CORPUS_MB": "2",
    "PRORES_VOCAB": "600",
    "PRORES_LAYERS": "4",
    "PRORES_ITERS": "12",
    "PRORES_WARMUP_ITERS": "8",
}
QUICKSTART = ["bash", "examples/quickstart.sh"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A clone in which the quickstart ran, and what it printed."""
    clone = make_clone(tmp_path_factory.mktemp("clone"))
    result = run(QUICKSTART, clone, **SHORT)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return clone, result.stdout


def validation_loss(output: str) -> float:
    (loss,) = re.findall(r"^validation loss +([0-9.]+)", output, flags=re.MULTILINE)
    return float(loss)


def test_it_ends_with_where_everything_is(finished: tuple[Path, str]) -> None:
    clone, output = finished
    ending = output[output.index("== done") :]
    places = dict(re.findall(r"^(\S[\w&, ]*?)  +(/\S+)", ending, flags=re.MULTILINE))
    assert set(places) == {
        "checkpoint",
        "TensorBoard",
        "W&B, offline",
        "training log",
        "picture",
        "Hugging Face",
    }
    for place in places.values():
        assert Path(place).exists()
        assert Path(place).is_relative_to(clone)
    assert Path(places["picture"]).read_bytes().startswith(b"\x89PNG")
    assert (Path(places["Hugging Face"]) / "config.json").is_file()
    # After both prompts something was written.
    assert re.search(r"^def .+", output, flags=re.MULTILINE | re.DOTALL)
    assert "\nimport " in output
    # A model that knows nothing has log(600) = 6.4.
    assert 3.0 < validation_loss(output) < 5.8


def test_scalars_hold_the_losses_and_the_alpha_of_every_layer(finished: tuple[Path, str]) -> None:
    clone, _ = finished
    scalars = read_scalars(clone / "runs/quickstart/tensorboard")
    assert list(scalars["lm loss"].steps) == list(range(1, 13))
    assert scalars["lm loss validation"].steps[-1] == 12
    for layer in range(1, 5):
        alpha = scalars[f"prores/alpha/layer_{layer}"]
        assert list(alpha.steps) == list(range(13))
        expected = [min(t / (2 * layer), 1.0) for t in range(13)]
        assert list(alpha.values) == pytest.approx(expected, rel=1e-6)


def test_wandb_holds_the_alpha_of_every_layer(finished: tuple[Path, str]) -> None:
    clone, _ = finished
    (log,) = (clone / "runs/quickstart/wandb").glob("offline-run-*/*.wandb")
    content = log.read_bytes()
    assert all(f"prores/alpha/layer_{layer}".encode() in content for layer in range(1, 5))


def test_a_second_start_resumes(finished: tuple[Path, str]) -> None:
    clone, output = finished
    again = run(QUICKSTART, clone, **SHORT)
    assert again.returncode == 0, again.stderr[-3000:]
    assert "resuming at iteration 12 of 12" in again.stdout
    assert validation_loss(again.stdout) == validation_loss(output)

    other = run(QUICKSTART, clone, **{**SHORT, "PRORES_LAYERS": "6"})
    assert other.returncode == 2
    assert "other settings" in other.stderr


@pytest.mark.parametrize(
    ("arguments", "settings", "words"),
    [
        (["--restart"], {}, "--fresh"),
        ([], {"PRORES_ITERS": "many"}, "PRORES_ITERS=many"),
        ([], {"PRORES_LAYERS": "5"}, "PRORES_LAYERS=5"),
    ],
)
def test_wrong_settings_are_named_at_once(
    arguments: list[str], settings: dict[str, str], words: str, tmp_path: Path
) -> None:
    result = run([*QUICKSTART, *arguments], make_clone(tmp_path), timeout=120, **settings)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert words in result.stderr
    assert not (tmp_path / "runs").exists()


@contextmanager
def quickstart(log: Path, clone: Path, *words: str, **settings: str) -> Iterator[Callable]:
    """Starts it, gives what waits for its output, and ends it, as by Ctrl-C."""
    with log.open("w") as file:
        script = subprocess.Popen(
            [*QUICKSTART, *words], cwd=clone, env=environment(**settings), stdout=file, stderr=file
        )

    def wait_for(text: str) -> None:
        deadline = time.monotonic() + 240
        while text not in log.read_text():
            assert script.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.1)

    try:
        yield wait_for
    finally:
        script.terminate()
        code = script.wait(120)
    assert code == 75


def test_started_over_and_interrupted_it_saves_and_the_same_command_goes_on(
    finished: tuple[Path, str], tmp_path: Path
) -> None:
    clone, _ = finished
    settings = {**SHORT, "PRORES_ITERS": "600"}
    # Its progress shows every 20th iteration.
    with quickstart(tmp_path / "first", clone, "--fresh", **settings) as wait_for:
        wait_for("iteration       20/")
    log = (tmp_path / "first").read_text()
    assert "starting over" in log
    assert "loaded checkpoint" not in log
    assert "there already" in log
    (saved,) = re.findall(r"the same command goes on at iteration (\d+) of 600", log)
    assert 20 <= int(saved) < 600
    with quickstart(tmp_path / "second", clone, **settings) as wait_for:
        wait_for(f"iteration {(int(saved) // 20 + 1) * 20:8}/")
    assert f"resuming at iteration {saved} of 600" in (tmp_path / "second").read_text()
