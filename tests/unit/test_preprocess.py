from __future__ import annotations

import argparse
import gzip
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard

from megatron_prores.data import megatron_tokenizer, preprocess, tokenizer
from megatron_prores.data.encode import Encoder, encode_in_order
from megatron_prores.data.jsonl import read_chunks
from megatron_prores.data.staging import staging_directory
from megatron_prores.errors import UserError

TOOL = Path(__file__).resolve().parents[2] / "tools" / "preprocess_data.py"
EOD = 256


class ByteTokenizer:
    """Bytes as ids: what it makes of a text is known without it."""

    vocab_size = 257
    eod = EOD

    def tokenize(self, text: str) -> list[int]:
        if text == "kill the worker":
            os._exit(9)
        return list(text.encode())


def encoder(**settings: Any) -> Encoder:
    defaults: dict[str, Any] = {"keys": ["text"], "dtype": np.uint16, "eod": EOD}
    return Encoder(ByteTokenizer(), **{**defaults, **settings})


def jsonl(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def random_texts(count: int) -> list[str]:
    rng = random.Random(0)
    return [f"{n}: " + "wörd\n\t " * rng.randrange(1, 120) for n in range(count)]


def read_dataset(prefix: Path) -> list[list[int]]:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(str(prefix))
    assert dataset.document_indices.tolist() == list(range(len(dataset) + 1))
    return [dataset[index].tolist() for index in range(len(dataset))]


def run(inputs: list[Path], prefix: Path, workers: int = 1, **settings: Any) -> preprocess.Summary:
    return preprocess.preprocess([str(p) for p in inputs], prefix, encoder(**settings), workers)


def command(*args: object) -> list[str]:
    return [sys.executable, "-B", str(TOOL), *map(str, args)]


NULL_TOKENIZER = ["--tokenizer-type", "NullTokenizer", "--vocab-size", "100"]


def test_documents_read_back_with_megatron_are_the_input_in_order(tmp_path: Path) -> None:
    texts = random_texts(3000)
    parts = [texts[:1000], texts[1000:1001], texts[1001:]]
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + jsonl(parts[0]) + b"\n")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(jsonl(parts[1])))
    (tmp_path / "c.jsonl.zst").write_bytes(zstandard.compress(jsonl(parts[2])))
    inputs = [tmp_path / name for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl.zst")]
    for workers in (1, 3):
        summary = run(inputs, tmp_path / f"out{workers}" / "v1.5", workers)
        assert summary.documents == 3000
    names = ["v1.5_text_document.bin", "v1.5_text_document.idx"]
    for name in names:
        assert (tmp_path / "out1" / name).read_bytes() == (tmp_path / "out3" / name).read_bytes()
    assert sorted(path.name for path in (tmp_path / "out3").iterdir()) == names
    documents = read_dataset(tmp_path / "out3" / "v1.5_text_document")
    assert documents == [[*text.encode(), EOD] for text in texts]


def test_gpt_samples_hold_the_real_documents(tmp_path: Path) -> None:
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.utils import Split

    texts = [Path(module.__file__ or "").read_text() for module in (argparse, gzip, json)]
    texts = [text[start : start + 700] for text in texts for start in range(0, 7000, 700)]
    texts = [text for text in dict.fromkeys(texts) if text]
    (tmp_path / "t.model").write_bytes(tokenizer.train_model(texts, 450))
    (tmp_path / "in.jsonl").write_bytes(jsonl(texts))
    arguments = ["--tokenizer-type", "SentencePieceTokenizer"]
    arguments += ["--tokenizer-model", str(tmp_path / "t.model")]
    preprocess.main(
        ["--input", str(tmp_path / "*.jsonl"), "--output-prefix", str(tmp_path / "out"),
         "--append-eod", "--workers", "2", *arguments]
    )  # fmt: skip
    parser = argparse.ArgumentParser()
    megatron_tokenizer.add_tokenizer_arguments(parser)
    built: Any = megatron_tokenizer.build_megatron_tokenizer(parser.parse_args(arguments))
    config = GPTDatasetConfig(
        random_seed=1, sequence_length=2000, path_to_cache=str(tmp_path / "cache"),
        blend=([str(tmp_path / "out_text_document")], None), split="1", tokenizer=built,
        reset_position_ids=False, reset_attention_mask=False, eod_mask_loss=False,
        create_attention_mask=False, mmap_bin_files=True,
    )  # fmt: skip
    indexed = GPTDataset.build_low_level_dataset(str(tmp_path / "out_text_document"), config)
    documents = np.arange(len(indexed), dtype=np.int32)
    dataset = GPTDataset(indexed, str(tmp_path), documents, None, Split.train, config)
    found = set()
    for index in range(len(dataset)):
        tokens = dataset[index]["tokens"].numpy()
        ends = np.flatnonzero(tokens == built.eod)
        for start, end in zip(ends[:-1] + 1, ends[1:], strict=True):
            found.add(built.detokenize(tokens[start:end].tolist()))
    assert len(found) > 5
    assert found <= set(texts)


def test_each_key_becomes_its_own_dataset(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"a": "x", "b": "yz", "c": 3}\n{"a": "", "b": "w"}\n')
    summary = run([tmp_path / "in.jsonl"], tmp_path / "out", keys=["a", "b"], eod=None)
    assert read_dataset(tmp_path / "out_a_document") == [[ord("x")]]
    assert read_dataset(tmp_path / "out_b_document") == [[ord("y"), ord("z")], [ord("w")]]
    assert (summary.documents, summary.empty) == (2, 1)


BROKEN = {
    b'{"text": "x"': "not JSON",
    b'{"body": "x"}': "no key 'text' (keys of this line: 'body')",
    b'{"text": null}': "key 'text' is NoneType, not a string",
    b'["text"]': "not a JSON object",
    b'{"text": "caf\xe9"}': "not UTF-8",
    b'{"text": "\\ud800"}': "surrogate",
}


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("line", BROKEN)
def test_a_broken_line_is_named_and_ends_the_run_or_is_left_out(
    tmp_path: Path, line: bytes, workers: int, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "good.jsonl").write_bytes(jsonl(["first"] * 3))
    (tmp_path / "bad.jsonl").write_bytes(jsonl(["one"]) + b"\n" + line + b"\n" + jsonl(["two"]))
    inputs = [tmp_path / "good.jsonl", tmp_path / "bad.jsonl"]
    with pytest.raises(UserError) as caught:
        run(inputs, tmp_path / "out", workers)
    assert "bad.jsonl:3: " in str(caught.value)
    assert BROKEN[line] in str(caught.value)
    assert not list(tmp_path.glob("*out*"))
    summary = run(inputs, tmp_path / "out", workers, stop_at_problem=False)
    assert (summary.documents, summary.broken) == (5, 1)
    assert "bad.jsonl:3: " in capsys.readouterr().err
    texts = [bytes(ids[:-1]).decode() for ids in read_dataset(tmp_path / "out_text_document")]
    assert texts == ["first"] * 3 + ["one", "two"]


def test_token_ids_outside_the_vocabulary_are_refused(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(jsonl(["1 99", "1 100"]))
    args = ["--input", str(tmp_path / "in.jsonl"), "--output-prefix", str(tmp_path / "out")]
    with pytest.raises(UserError, match=r"in.jsonl:2: token id 100 .* vocabulary of 100"):
        preprocess.main([*args, *NULL_TOKENIZER, "--workers", "1"])
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize(("vocabulary", "size"), [("65499", 2), ("65500", 4)])
def test_token_ids_of_a_large_vocabulary_fit(tmp_path: Path, vocabulary: str, size: int) -> None:
    largest = int(vocabulary) - 1
    (tmp_path / "in.jsonl").write_bytes(jsonl([f"0 {largest}"]))
    preprocess.main(
        ["--input", str(tmp_path / "in.jsonl"), "--output-prefix", str(tmp_path / "out"),
         "--tokenizer-type", "NullTokenizer", "--vocab-size", vocabulary, "--workers", "1"]
    )  # fmt: skip
    assert (tmp_path / "out_text_document.bin").stat().st_size == 2 * size
    assert read_dataset(tmp_path / "out_text_document") == [[0, largest]]


@pytest.mark.timeout(60)
def test_a_worker_that_dies_ends_the_run(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(jsonl(["x" * 300_000] * 20 + ["kill the worker"] + ["y"]))
    with pytest.raises(UserError, match="worker process died"):
        run([tmp_path / "in.jsonl"], tmp_path / "out", workers=2)
    assert not list(tmp_path.glob("*out*"))


def test_the_input_is_read_only_a_few_chunks_ahead(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(jsonl(["x" * 1000] * 400))
    taken = 0

    def counted() -> Any:
        nonlocal taken
        for chunk in read_chunks([str(tmp_path / "in.jsonl")], chunk_bytes=2000):
            taken += 1
            yield chunk

    results = encode_in_order(encoder(), counted(), workers=2)
    next(results)
    assert taken <= 8
    results.close()


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
    with staging_directory(tmp_path / "out") as staging:
        assert [path.name for path in staging.iterdir()] == ["lock"]


def children(pid: int) -> set[int]:
    return set(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition: Any, seconds: float = 60) -> None:
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
    assert process.wait(timeout=30) != 0
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


def test_a_huge_compressed_line_and_a_cut_file_are_told_apart(tmp_path: Path) -> None:
    text = "x" * 3_000_000
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(jsonl([text])))
    (chunk,) = read_chunks([str(tmp_path / "a.jsonl.zst")])
    assert json.loads(chunk.lines[0])["text"] == text
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(jsonl([text]))[:-5])
    with pytest.raises(UserError, match="incomplete"):
        list(read_chunks([str(tmp_path / "a.jsonl.zst")]))


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--input", "missing*.jsonl"], "--input missing*.jsonl: no such file"),
        (["--input", "folder"], "--input folder is a folder"),
        (["--output-prefix", "out/"], "--output-prefix"),
        (["--output-prefix", "in.jsonl/out"], "cannot write in"),
        (["--json-keys", "a/b"], "--json-keys a/b"),
        (["--workers", "0"], "--workers 0"),
        (["--vocab-size", "0"], "--vocab-size"),
        (["--tokenizer-type", "SentencePieceTokenizer"], "needs --tokenizer-model"),
        (["--tokenizer-type", "Llama2Tokenizer", "--tokenizer-model", "no.model"], "no.model"),
        (["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", "in.jsonl"], "in.j"),
        (["--input", "empty.jsonl"], "no document with text under the key 'text'"),
        (["--input", "blank.jsonl"], "no document with text"),
    ],
)
def test_a_wrong_input_is_told_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: list[str], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "in.jsonl").write_bytes(jsonl(["1 2"]))
    (tmp_path / "empty.jsonl").write_bytes(b"")
    (tmp_path / "blank.jsonl").write_bytes(b"\n" + jsonl([""]))
    before = sorted(tmp_path.rglob("*"))
    base = ["--input", "in.jsonl", "--output-prefix", "out", *NULL_TOKENIZER, "--workers", "1"]
    with pytest.raises(UserError) as caught:
        preprocess.main([*base, *args])
    assert words in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--input", "missing.jsonl"], "--input missing.jsonl: no such file"),
        (["--input", "bad.jsonl", "--workers", "2"], "bad.jsonl:1: not JSON"),
    ],
)
def test_the_tool_ends_a_wrong_input_with_one_line(
    tmp_path: Path, args: list[str], words: str
) -> None:
    (tmp_path / "bad.jsonl").write_bytes(b"{\n")
    base = command("--input", "bad.jsonl", "--output-prefix", "out", *NULL_TOKENIZER)
    result = subprocess.run(
        [*base, *args], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert words in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["bad.jsonl"]


def test_standard_input_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stdin = io.TextIOWrapper(io.BytesIO(jsonl(["1 2", "3"])))
    monkeypatch.setattr(sys, "stdin", stdin)
    preprocess.main(
        ["--input", "-", "--output-prefix", str(tmp_path / "out"), *NULL_TOKENIZER,
         "--append-eod", "--workers", "1"]
    )  # fmt: skip
    assert read_dataset(tmp_path / "out_text_document") == [[1, 2, 99], [3, 99]]
