"""Many inputs to shards: broken off, shared, started again, refused."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from megatron_prores.data import preprocess
from megatron_prores.data.shards import Shards
from megatron_prores.errors import UserError
from tests.unit.preprocess_helpers import NULL_TOKENIZER, command, jsonl, read_dataset

FILES, LEAST_FILES = 200, 24
"""Of the test that kills: with --kills 20 the former, else the latter."""


def write_files(directory: Path, count: int) -> list[Path]:
    """Makes files of 60 documents, but the sixth without text and the eighth of several chunks."""
    directory.mkdir()
    rng = random.Random(0)
    for number in range(count):
        words = [" ".join(str(rng.randrange(99)) for _ in range(50)) for _ in range(60)]
        texts = {5: [""], 7: words * 60}.get(number, words)
        (directory / f"{number:03}.jsonl").write_bytes(jsonl(texts))
    return sorted(directory.iterdir())


def arguments(source: Path, output: Path, *more: object) -> list[str]:
    given = ["--input", source, "--output-dir", output, "--append-eod", *NULL_TOKENIZER, *more]
    return [str(word) for word in given]


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def counts(output: Path) -> list[int]:
    """Gives the documents of every input."""
    shards = Shards.read(output)
    return [sum(part.documents for part in shards.parts(n)) for n in range(len(shards.inputs))]


def test_a_run_that_is_killed_again_and_again_writes_what_an_undisturbed_one_does(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    kills = request.config.getoption("--kills")
    count = FILES if kills >= 20 else LEAST_FILES
    write_files(tmp_path / "in", count)
    more = ["--workers", 2, "--tokens-per-shard", 5000]
    subprocess.run(
        command(*arguments(tmp_path / "in", tmp_path / "whole", *more)), check=True, timeout=300
    )
    rng = random.Random(1)
    output, killed = tmp_path / "out", 0
    seen: set[str] = set()
    while killed < kills:
        process = subprocess.Popen(
            command(*arguments(tmp_path / "in", output, *more)),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        assert process.stderr
        # At a number of finished shards, not of seconds; and a moment later, in the middle of one.
        goal = len(seen) + rng.randrange(max(1, count // (kills + 1)))
        while process.poll() is None and len(list(output.glob("*-*.json"))) < goal:
            time.sleep(0.002)
        try:
            process.wait(rng.random() / 50)
        except subprocess.TimeoutExpired:
            process.kill()
        killed += process.wait(300) == -signal.SIGKILL
        assert process.returncode in (0, -signal.SIGKILL), process.stderr.read()
        process.stderr.close()
        markers = {path.stem for path in output.glob("*-*.json")}
        assert seen <= markers
        for name in markers - seen:  # A marker is the last to come: what it names is whole.
            digests = json.loads((output / f"{name}.json").read_text())["digests"]["text"]
            for ending, expected in digests.items():
                path = output / f"{name}_text_document{ending}"
                assert (
                    not path.exists() or hashlib.sha256(path.read_bytes()).hexdigest() == expected
                )
        seen = markers
        if process.returncode == 0:  # It was faster than the kill: from the start.
            shutil.rmtree(output)
            seen = set()
    subprocess.run(command(*arguments(tmp_path / "in", output, *more)), check=True, timeout=300)
    assert contents(output) == contents(tmp_path / "whole")
    assert sum(counts(output)) == 60 * (count - 2) + 1 + 3600
    assert [len(Shards.read(output).parts(n)) for n in (6, 7)] == [1, 3]


def test_two_processes_that_share_a_directory_write_what_one_does(tmp_path: Path) -> None:
    write_files(tmp_path / "in", 9)
    preprocess.main(arguments(tmp_path / "in", tmp_path / "one", "--workers", 1))
    shares = [
        subprocess.Popen(
            command(*arguments(tmp_path / "in", tmp_path / "two", "--workers", 2, "--shard", share))
        )
        for share in ("1/2", "2/2")
    ]
    assert [process.wait(300) for process in shares] == [0, 0]
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_only_what_is_missing_is_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = write_files(tmp_path / "in", 4)
    given = arguments(tmp_path / "in", tmp_path / "out", "--workers", 1)
    preprocess.main([*given, "--shard", "2/2"])
    assert "out: 2 of 4 inputs, 120 documents" in capsys.readouterr().out
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*_document*")}
    preprocess.main(given)
    assert "out: 4 of 4 inputs, 240 documents" in capsys.readouterr().out
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*_document*")}
    assert before.items() <= after.items()
    # More inputs may follow those of before.
    (tmp_path / "in" / "more.jsonl").write_bytes(jsonl(["1 2"]))
    preprocess.main(given)
    assert "out: 5 of 5 inputs, 241 documents" in capsys.readouterr().out
    assert read_dataset(tmp_path / "out" / "00004-0000_text_document") == [[1, 2, 99]]
    # The last ones cannot be left out again, nor changed.
    (tmp_path / "in" / "more.jsonl").unlink()
    with pytest.raises(UserError, match="from 5 inputs, not 4; give all of them"):
        preprocess.main(given)
    files[0].write_bytes(jsonl(["1"]))
    with pytest.raises(UserError, match=r"000\.jsonl \(\d+ bytes\), where .* is now"):
        preprocess.main(given)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--vocab-size", "101"], "with a vocabulary of 100, not 101"),
        (["--tokens-per-shard", "99"], "with --tokens-per-shard None, not 99"),
        (["--null-tokenizer-eod-id", "7"], "with end-of-document id 99, not 7"),
        (["--json-keys", "body"], "with --json-keys ['text'], not ['body']"),
    ],
)
def test_shards_of_another_making_are_refused(
    tmp_path: Path, change: list[str], words: str
) -> None:
    write_files(tmp_path / "in", 2)
    given = arguments(tmp_path / "in", tmp_path / "out", "--workers", 1)
    preprocess.main(given)
    before = contents(tmp_path / "out")
    with pytest.raises(UserError, match="choose another directory") as caught:
        preprocess.main([*given, *change])
    assert words in str(caught.value)
    assert contents(tmp_path / "out") == before


def test_a_marker_of_another_directory_is_refused(tmp_path: Path) -> None:
    files = write_files(tmp_path / "in", 3)
    for name, source in (("a", tmp_path / "in"), ("b", files[2])):
        preprocess.main(arguments(source, tmp_path / name, "--workers", 1))
    for path in (tmp_path / "b").glob("00000-*"):
        shutil.copy(path, tmp_path / "a")
    with pytest.raises(UserError, match=r"00000-0000\.json: this shard was made of another input"):
        preprocess.main(arguments(tmp_path / "in", tmp_path / "a", "--workers", 1))


def test_a_disk_that_is_full_ends_in_one_line_and_the_rest_is_made_later(tmp_path: Path) -> None:
    write_files(tmp_path / "in", 2)
    (tmp_path / "in" / "last.jsonl").write_bytes(jsonl([" ".join(["7"] * 20_000)]))
    given = command(*arguments(tmp_path / "in", tmp_path / "out", "--workers", 2))
    # No file above 30 kB can be written: as on a full disk, a write fails in its middle.
    result = subprocess.run(
        ["bash", "-c", 'ulimit -f 30; exec "$@"', "-", *given],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line == f"error: --output-dir {tmp_path / 'out'}: cannot write: File too large"
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert not [name for name in names if name.startswith((".", "00002"))]
    subprocess.run(given, check=True, timeout=300)
    assert counts(tmp_path / "out") == [60, 60, 1]


def test_a_fault_in_an_input_keeps_the_shards_before_it(tmp_path: Path) -> None:
    files = write_files(tmp_path / "in", 3)
    files[1].write_bytes(files[1].read_bytes() + b"{\n")
    given = arguments(tmp_path / "in", tmp_path / "out", "--workers", 2)
    with pytest.raises(UserError, match=r"001\.jsonl:61: not JSON"):
        preprocess.main(given)
    assert Shards.read(tmp_path / "out").parts(1) == []
    preprocess.main([*given, "--on-error", "skip"])
    (part,) = Shards.read(tmp_path / "out").parts(1)
    assert (part.documents, part.left_out) == (60, {"not JSON": 1})


def test_enough_tokens_end_the_run_at_the_end_of_an_input(tmp_path: Path) -> None:
    write_files(tmp_path / "in", 9)
    given = arguments(tmp_path / "in", tmp_path / "out", "--stop-after-tokens", 4000)
    preprocess.main([*given, "--workers", "1"])
    assert counts(tmp_path / "out") == [60, 60] + 7 * [0]
