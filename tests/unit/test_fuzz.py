"""Schedules, schedule files and preprocessing, with inputs that nobody thought of.

Hypothesis makes the inputs, the same in every run.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from megatron_prores.errors import UserError
from megatron_prores.schedule.custom import FileSchedule
from megatron_prores.schedule.formulas import SCHEDULES, alphas, opening_steps
from megatron_prores.schedule.table import parse_table
from tests.unit.preprocess_helpers import EOD, NULL_TOKENIZER, command, read_dataset, run

SUFFIXES = (".bin", ".idx")


def fuzz(examples: int) -> Callable[[Any], Any]:
    """Makes the inputs the same everywhere, and leaves a slow machine its time."""
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    return settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=checks,
    )


layers = st.one_of(st.sampled_from([1, 2, 10_000]), st.integers(1, 200))
warmups = st.one_of(st.sampled_from([1, 2, 10**9]), st.integers(1, 10**9))
moving = st.sampled_from([name for name in SCHEDULES if not name.startswith("fix_")])


def start(schedule: str, num_layers: int) -> np.ndarray:
    """alpha at step 0, by the paper's formulas; the last bits are the formula's own."""
    layer = np.arange(1, num_layers + 1)
    floors = {
        "stagewise_L": np.full(num_layers, 1 / num_layers),
        "stagewise_sqrt_L": np.full(num_layers, 1 / np.sqrt(num_layers)),
        "stagewise_sqrt_l": 1 / np.sqrt(layer),
    }
    return floors.get(schedule, np.zeros(num_layers))


@fuzz(300)
@given(st.sampled_from(SCHEDULES), layers, warmups, st.data())
@np.errstate(all="raise", under="ignore")
def test_alpha_is_within_bounds_and_never_falls(
    schedule: str, num_layers: int, warmup: int, data: st.DataObject
) -> None:
    near = st.one_of(st.integers(0, 3), st.integers(warmup - 1, warmup + 1))
    some = st.lists(st.one_of(near, st.integers(0, 2 * warmup)), min_size=2, max_size=5)
    steps = sorted(data.draw(some))
    table = np.array([alphas(schedule, step, num_layers, warmup) for step in steps])
    assert table.dtype == np.float64
    assert table.shape == (len(steps), num_layers)
    assert ((table >= 0) & (table <= 1)).all()  # NaN is neither
    assert (np.diff(table, axis=0) >= 0).all()


@fuzz(300)
@given(moving, layers, warmups, st.integers(0, 2**53))
@np.errstate(all="raise", under="ignore")
def test_alpha_is_exact_at_the_start_and_from_the_end_of_the_warmup_on(
    schedule: str, num_layers: int, warmup: int, beyond: int
) -> None:
    assert (alphas(schedule, 0, num_layers, warmup) == start(schedule, num_layers)).all()
    for step in (warmup, warmup + 1, warmup + beyond):
        assert (alphas(schedule, step, num_layers, warmup) == 1.0).all()


@fuzz(40)
@given(moving, st.one_of(st.just(1), st.integers(1, 40)), warmups)
def test_a_layer_is_open_from_its_opening_step_on_and_not_before(
    schedule: str, num_layers: int, warmup: int
) -> None:
    for layer, step in enumerate(opening_steps(schedule, num_layers, warmup)):
        assert step is not None
        assert 0 <= step <= warmup
        assert alphas(schedule, step, num_layers, warmup)[layer] == 1.0
        assert step == 0 or alphas(schedule, step - 1, num_layers, warmup)[layer] < 1.0


@st.composite
def tables(draw: st.DrawFn) -> tuple[list[int], list[list[float]]]:
    columns = draw(st.integers(1, 6))
    row = st.lists(st.floats(0, 1), min_size=columns, max_size=columns)
    steps = draw(st.lists(st.integers(0, 2**53), min_size=1, max_size=6, unique=True).map(sorted))
    return steps, [draw(row) for _ in steps]


def as_bytes(steps: list[int], table: list[list[float]], ending: str) -> bytes:
    if ending == ".json":
        return json.dumps({"steps": steps, "alpha": table}).encode()
    header = ["step", *range(1, len(table[0]) + 1)]
    rows = [header, *([step, *row] for step, row in zip(steps, table, strict=True))]
    return "".join(",".join(map(str, row)) + "\n" for row in rows).encode()


@fuzz(200)
@given(tables(), st.sampled_from([".csv", ".json"]), st.integers(0, 2**54))
def test_a_table_is_exact_at_its_rows_and_linear_between_them(
    table: tuple[list[int], list[list[float]]], ending: str, step: int
) -> None:
    steps, rows = table
    schedule = FileSchedule("file:x", *parse_table(as_bytes(steps, rows, ending), ending), "")
    columns = len(rows[0])
    for at, row in zip(steps, rows, strict=True):
        assert schedule.alphas(at, columns, 1).tolist() == row
    between = schedule.alphas(step, columns, 1)
    expected = [np.interp(step, steps, column) for column in zip(*rows, strict=True)]
    np.testing.assert_allclose(between, expected, rtol=0, atol=1e-12)
    assert ((between >= 0) & (between <= 1)).all()


table_bytes = st.one_of(
    st.binary(max_size=80),
    st.text("step,123.-+eE_naif\n\r\"' ", max_size=80).map(str.encode),
    st.text('{}[]:,"0123456789.eE-stepalhINfinityNaN \n', max_size=80).map(str.encode),
    st.builds(
        lambda table, ending, at, byte: (
            (data := as_bytes(*table, ending))[: at % len(data)] + byte + data[at % len(data) + 1 :]
        ),
        tables(),
        st.sampled_from([".csv", ".json"]),
        st.integers(0, 10**6),
        st.binary(max_size=2),
    ),
)


@fuzz(500)
@given(table_bytes, st.sampled_from([".csv", ".json"]))
@example(b'{"steps": [' + b"9" * 5000 + b'], "alpha": [[1]]}', ".json")
@example(b'{"steps": [0], "alpha": [[' + b"9" * 400 + b"]]}", ".json")
@example(b"[" * 100_000, ".json")
@example(b"step,1\n1e999,0\n", ".csv")
@example(b"step,1\n0,nan\n", ".csv")
def test_any_bytes_are_a_valid_table_or_are_refused(data: bytes, ending: str) -> None:
    try:
        steps, table = parse_table(data, ending)
    except ValueError:
        return
    assert table.shape[0] == len(steps) >= 1
    assert ((table >= 0) & (table <= 1)).all()
    assert (np.diff(steps) > 0).all()
    assert steps[0] >= 0


texts = st.text(max_size=20)
documents = texts.map(lambda text: json.dumps({"text": text}, ensure_ascii=False))
json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abt"), inner),
    max_leaves=5,
)


@st.composite
def almost_documents(draw: st.DrawFn) -> bytes:
    """A document's line with a byte exchanged, or cut off."""
    line = draw(documents).encode("utf-8", "surrogatepass")
    at = draw(st.integers(0, len(line)))
    return line[:at] + draw(st.binary(max_size=2)) + line[at + draw(st.integers(0, 9)) :]


lines = st.one_of(
    documents.map(lambda line: line.encode("utf-8", "surrogatepass")),
    almost_documents(),
    json_values.map(lambda value: json.dumps({"text": value}).encode()),
    json_values.map(lambda value: json.dumps(value).encode()),
    st.binary(max_size=30),
)
inputs = st.one_of(st.binary(max_size=300), st.lists(lines, max_size=8).map(b"\n".join))


def valid_texts(data: bytes) -> tuple[list[str], int]:
    """What a reader of JSON lines finds, by itself: the texts, and how many lines are broken."""
    found, broken = [], 0
    for line in data.removeprefix(b"\xef\xbb\xbf").split(b"\n"):
        try:
            if not (content := line.decode().strip()):
                continue
            text = json.loads(content)["text"]
            found.append(text.encode().decode())
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            broken += 1
    return found, broken


def outputs(directory: Path) -> list[Path]:
    return sorted(path for path in directory.iterdir() if path.name != "in.jsonl")


@fuzz(400)
@given(inputs)
@example(b"[" * 100_000)
@example(b'{"text": "a"}\n{"text": "\\ud800"}\n{"text": "b"}')
@example(b'\xef\xbb\xbf{"text": "a"}\r\n\x00\n{"text": "\x7f"}')
@example(b'{"text": ' + b"9" * 5000 + b"}")
def test_any_bytes_are_preprocessed_to_the_documents_of_the_valid_lines(data: bytes) -> None:
    expected, broken = valid_texts(data)
    written = [[*text.encode(), EOD] for text in expected if text]
    for stop in (True, False):
        with tempfile.TemporaryDirectory() as name:
            directory = Path(name)
            (directory / "in.jsonl").write_bytes(data)
            try:
                summary = run([directory / "in.jsonl"], directory / "out", stop_at_problem=stop)
            except UserError:
                assert (stop and broken) or not written
                assert outputs(directory) == []
                continue
            assert not (stop and broken)
            assert (summary.documents, summary.broken) == (len(expected), broken)
            assert read_dataset(directory / "out_text_document") == written


@pytest.mark.parametrize("policy", ["fail", "skip"])
def test_the_tool_itself_survives_random_bytes(policy: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    noise = [bytes(rng.integers(0, 256, 60, dtype=np.uint8)) for _ in range(50)]
    good = [b'{"text": "%d 7"}' % number for number in range(50)]
    mixed = [line for pair in zip(noise, good, strict=True) for line in pair]
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(mixed) + b"\n")
    argv = ["--input", "in.jsonl", "--output-prefix", "out", "--on-error", policy, *NULL_TOKENIZER]
    result = subprocess.run(
        command(*argv, "--workers", 2), cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert "Traceback" not in result.stderr
    if policy == "fail":
        assert result.returncode == 2
        assert result.stderr.startswith("error: in.jsonl:1: ")
        assert outputs(tmp_path) == []
    else:
        assert result.returncode == 0, result.stderr
        assert read_dataset(tmp_path / "out_text_document") == [[n, 7] for n in range(50)]
        assert [path.suffix for path in outputs(tmp_path)] == [*SUFFIXES]
