from __future__ import annotations

import argparse
import gzip
import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard

from megatron_prores.data import megatron_tokenizer, preprocess, tokenizer
from megatron_prores.data.encode import encode_in_order
from megatron_prores.data.inputs import Input
from megatron_prores.data.readers import read_chunks
from megatron_prores.errors import UserError
from tests.unit.preprocess_helpers import (
    EOD,
    NULL_TOKENIZER,
    encoder,
    jsonl,
    random_texts,
    read_dataset,
    run,
)


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


def test_the_input_is_read_only_a_few_chunks_ahead(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(jsonl(["x" * 1000] * 400))
    taken = 0

    def counted() -> Any:
        nonlocal taken
        for chunk in read_chunks([Input(str(tmp_path / "in.jsonl"))], ["text"], chunk_bytes=2000):
            taken += 1
            yield chunk

    results = encode_in_order(encoder(), counted(), workers=2)
    next(results)
    assert taken <= 8
    results.close()


def test_a_huge_compressed_line_and_a_cut_file_are_told_apart(tmp_path: Path) -> None:
    text = "x" * 3_000_000
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(jsonl([text])))
    (chunk,) = read_chunks([Input(str(tmp_path / "a.jsonl.zst"))], ["text"])
    assert json.loads(chunk.text)["text"] == text
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(jsonl([text]))[:-5])
    (chunk,) = read_chunks([Input(str(tmp_path / "a.jsonl.zst"))], ["text"])
    assert "incomplete" in str(chunk.problem)


def test_standard_input_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stdin = io.TextIOWrapper(io.BytesIO(jsonl(["1 2", "3"])))
    monkeypatch.setattr(sys, "stdin", stdin)
    preprocess.main(
        ["--input", "-", "--output-prefix", str(tmp_path / "out"), *NULL_TOKENIZER,
         "--append-eod", "--workers", "1"]
    )  # fmt: skip
    assert read_dataset(tmp_path / "out_text_document") == [[1, 2, 99], [3, 99]]
