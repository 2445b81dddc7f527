from __future__ import annotations

import gzip
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import zstandard

from megatron_prores.data import preprocess
from megatron_prores.data.inputs import BrokenLineError, Input, texts_of
from megatron_prores.data.staging import staging_directory
from megatron_prores.errors import UserError
from tests.unit.preprocess_helpers import (
    NULL_TOKENIZER,
    TOOL,
    command,
    encoder,
    jsonl,
    read_dataset,
    run,
)

BROKEN = {
    b'{"text": "x"': "not JSON",
    b'{"body": "x"}': "no key 'text' (keys of this line: 'body')",
    b'{"text": null}': "key 'text' is NoneType, not a string",
    b'["text"]': "not a JSON object",
    b'{"text": "caf\xe9"}': "not UTF-8",
    b'{"text": "\\ud800"}': "surrogate",
    b'{"text": "\0"}': "not JSON: Invalid control character at",
    b'{"text": ' + b"[" * 100_000: "JSON nested too deep",
    b'{"text": "x", "n": ' + b"9" * 5000 + b"}": "a number with too many digits",
    jsonl(["y" * 5000])[:-1]: "key 'text' has 5000 bytes, above --max-document-bytes 2000",
}


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("line", BROKEN, ids=[words[:20] for words in BROKEN.values()])
def test_a_broken_line_is_named_and_ends_the_run_or_is_left_out(
    tmp_path: Path, line: bytes, workers: int, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "good.jsonl").write_bytes(jsonl(["first"] * 3))
    (tmp_path / "bad.jsonl").write_bytes(jsonl(["one"]) + b"\n" + line + b"\n" + jsonl(["two"]))
    inputs = [tmp_path / "good.jsonl", tmp_path / "bad.jsonl"]
    # Whatever the tokenizer, each of which has an error of its own.
    if "--max-document-bytes" not in BROKEN[line]:
        with pytest.raises(BrokenLineError, match=re.escape(BROKEN[line])):
            texts_of(line, ["text"])
    with pytest.raises(UserError) as caught:
        run(inputs, tmp_path / "out", workers, max_bytes=2000)
    assert "bad.jsonl:3: " in str(caught.value)
    assert BROKEN[line] in str(caught.value)
    assert not list(tmp_path.glob("*out*"))
    summary = run(inputs, tmp_path / "out", workers, stop_at_problem=False, max_bytes=2000)
    assert (summary.documents, summary.broken) == (5, 1)
    assert "bad.jsonl:3: " in capsys.readouterr().err
    texts = [bytes(ids[:-1]).decode() for ids in read_dataset(tmp_path / "out_text_document")]
    assert texts == ["first"] * 3 + ["one", "two"]


GOOD = jsonl([f"text {n}" for n in range(900)])


def parquet_file(path: Path, **columns: Any) -> bytes:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(columns), path, row_group_size=400)
    return path.read_bytes()


@pytest.mark.parametrize(
    ("name", "cut", "words", "documents"),
    [
        ("a.jsonl.gz", slice(-9), "damaged or incomplete compressed file", 900),
        ("a.jsonl.gz", slice(20), "damaged or incomplete compressed file", 0),
        ("a.jsonl.zst", slice(-9), "damaged or incomplete compressed file", 0),
        ("a.json.zst", slice(3, None), "damaged or incomplete compressed file", 0),
        ("a.parquet", slice(-9), "damaged or incomplete parquet file (ArrowInvalid", 0),
        ("a.parquet", slice(4), "damaged or incomplete parquet file (ArrowInvalid", 0),
    ],
)
def test_a_damaged_file_is_named_and_what_it_holds_before_counts(
    tmp_path: Path, name: str, cut: slice, words: str, documents: int
) -> None:
    path = tmp_path / name
    whole = {
        ".gz": lambda: gzip.compress(GOOD),
        ".zst": lambda: zstandard.compress(GOOD),
        ".parquet": lambda: parquet_file(path, text=["x"] * 900),
    }[path.suffix]()
    path.write_bytes(whole)
    good = tmp_path / "good.jsonl"
    good.write_bytes(GOOD)
    assert run([path], tmp_path / "whole").documents == 900
    path.write_bytes(whole[cut])
    with pytest.raises(UserError) as caught:
        run([path, good], tmp_path / "out", 2)
    assert f"{path}:" in str(caught.value)
    assert words in str(caught.value)
    summary = run([path, good], tmp_path / "out", 2, stop_at_problem=False)
    assert summary.documents == documents + 900
    assert summary.left_out == {"unreadable file": 1}


def test_columns_of_parquet_files(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    parquet_file(path, text=["x", None, "y", ""], bytes=[b"x", b"\xff", b"y", b"z"], n=[1, 2, 3, 4])
    for key, left_out in (
        ("text", {"not a string": 1, "empty": 1}),
        ("bytes", {"not UTF-8": 1}),
    ):
        summary = run([path], tmp_path / key, keys=[key], stop_at_problem=False)
        assert summary.left_out == left_out
        with pytest.raises(UserError, match=r"a\.parquet:2: key"):
            run([path], tmp_path / "none", keys=[key])
    for key, words in (
        ("body", "no column 'body' \\(columns: text"),
        ("n", "is int64, not a string"),
    ):
        with pytest.raises(UserError, match=words):
            run([path], tmp_path / "none", keys=[key])


def test_a_file_that_disappears_is_named(tmp_path: Path) -> None:
    gone = Input(str(tmp_path / "gone.jsonl"), 9)
    with pytest.raises(UserError, match=r"gone\.jsonl:1: cannot be read: No such file"):
        preprocess.preprocess([gone], tmp_path / "out", encoder(), 1)


@pytest.mark.timeout(240)
def test_a_worker_that_dies_ends_the_run(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(jsonl(["x" * 300_000] * 20 + ["kill the worker"] + ["y"]))
    with pytest.raises(UserError, match="worker process died"):
        run([tmp_path / "in.jsonl"], tmp_path / "out", workers=2)
    assert not list(tmp_path.glob("*out*"))


def test_two_runs_do_not_write_one_output_at_once(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(jsonl(["x"]))
    holder = "import sys, pathlib; from megatron_prores.data.staging import staging_directory\n"
    holder += (
        "with staging_directory(pathlib.Path(sys.argv[1])): print('held', flush=True); input()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", holder, str(tmp_path / "out")],
        cwd=TOOL.parents[1], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout
    assert process.stdout.readline() == b"held\n"
    with pytest.raises(UserError, match="another run"):
        run([tmp_path / "in.jsonl"], tmp_path / "out")
    process.communicate(b"\n")
    run([tmp_path / "in.jsonl"], tmp_path / "out")


def test_what_a_dead_run_left_is_cleared_at_the_next_start(tmp_path: Path) -> None:
    stale = tmp_path / ".out.staging"
    (stale / "folder").mkdir(parents=True)
    (stale / "out_text_document.bin").write_bytes(b"half")
    (tmp_path / ".other.staging").mkdir()
    with staging_directory(tmp_path / "out") as staging:
        assert staging == stale
        assert [path.name for path in staging.iterdir()] == ["lock"]
    # Another output's folder is not ours to clear.
    assert [path.name for path in tmp_path.iterdir()] == [".other.staging"]


def children(pid: int) -> set[int]:
    return set(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition: Any, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("killer", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_run_leaves_nothing_and_a_rerun_succeeds(
    tmp_path: Path, killer: signal.Signals
) -> None:
    lines = jsonl([" ".join(["7"] * 500)] * 1000)
    prefix = tmp_path / "new" / "out"
    arguments = command("--input", "-", "--output-prefix", prefix, "--workers", 2, *NULL_TOKENIZER)
    process = subprocess.Popen(
        arguments, stdin=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path
    )
    assert process.stdin
    for _ in range(5):  # The end of the input never comes: the run is in its middle when killed.
        process.stdin.write(lines)
    process.stdin.flush()
    staged = prefix.parent / ".out.staging" / "out_text_document.bin"
    wait_until(lambda: staged.exists() and staged.stat().st_size > 100_000)
    workers = children(process.pid)
    assert len(workers) == 2
    process.send_signal(killer)
    assert process.wait(timeout=240) != 0
    assert process.stderr
    if killer is signal.SIGTERM:
        assert process.stderr.read() == b"error: interrupted\n"
        assert not list(prefix.parent.iterdir())
    process.stderr.close()
    process.stdin.close()
    wait_until(lambda: not any(map(alive, workers)), 10)
    assert not list(prefix.parent.glob("out*"))

    (tmp_path / "in.jsonl").write_bytes(jsonl(["1 2 3"]))
    run([tmp_path / "in.jsonl"], prefix)
    assert sorted(path.name for path in prefix.parent.iterdir()) == [
        "out_text_document.bin",
        "out_text_document.idx",
    ]


def test_an_existing_dataset_needs_overwrite_and_survives_a_failing_run(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(jsonl(["1 2"]))
    (tmp_path / "bad.jsonl").write_bytes(jsonl(["3"]) + b"{\n")
    prefix = tmp_path / "out"
    args = ["--output-prefix", str(prefix), *NULL_TOKENIZER, "--workers", "1", "--input"]
    preprocess.main([*args, str(tmp_path / "in.jsonl")])
    with pytest.raises(UserError, match="--overwrite"):
        preprocess.main([*args, str(tmp_path / "in.jsonl")])
    with pytest.raises(UserError, match=r"bad\.jsonl:2"):
        preprocess.main([*args, str(tmp_path / "bad.jsonl"), "--overwrite"])
    assert read_dataset(tmp_path / "out_text_document") == [[1, 2]]
    (tmp_path / "in.jsonl").write_bytes(jsonl(["4 5 6"]))
    preprocess.main([*args, str(tmp_path / "in.jsonl"), "--overwrite"])
    assert read_dataset(tmp_path / "out_text_document") == [[4, 5, 6]]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--input", "missing*.jsonl"], "--input missing*.jsonl: no such file"),
        (["--output-prefix", "out/"], "--output-prefix"),
        (["--vocab-size", "0"], "--vocab-size"),
        (["--tokenizer-type", "SentencePieceTokenizer"], "needs --tokenizer-model"),
        (["--tokenizer-type", "Llama2Tokenizer", "--tokenizer-model", "no.model"], "no.model"),
        (["--input", "blank.jsonl"], "no document with text"),
    ],
)
def test_a_wrong_input_is_told_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: list[str], words: str
) -> None:
    """What is not among the rows of tests/wrong_invocations.py."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.jsonl").write_bytes(jsonl(["1 2"]))
    (tmp_path / "blank.jsonl").write_bytes(b"\n" + jsonl([""]))
    before = sorted(tmp_path.rglob("*"))
    base = ["--input", "in.jsonl", "--output-prefix", "out", *NULL_TOKENIZER, "--workers", "1"]
    with pytest.raises(UserError) as caught:
        preprocess.main([*base, *args])
    assert words in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_the_tool_and_its_workers_end_a_wrong_input_with_one_line(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_bytes(b"{\n")
    base = command("--input", "bad.jsonl", "--output-prefix", "out", *NULL_TOKENIZER)
    result = subprocess.run(
        [*base, "--workers", "2"], cwd=tmp_path, capture_output=True, text=True, timeout=240
    )
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert "bad.jsonl:1: not JSON" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["bad.jsonl"]
