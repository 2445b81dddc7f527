"""What the tests of preprocessing share."""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np

from megatron_prores.data import preprocess
from megatron_prores.data.encode import Encoder
from megatron_prores.data.inputs import Input
from megatron_prores.data.output import Summary
from megatron_prores.data.text_tokenizer import TextTokenizer

TOOL = Path(__file__).resolve().parents[2] / "tools" / "preprocess_data.py"
EOD = 256


def byte_ids(text: str) -> bytes:
    """Makes bytes the ids: they are known without a tokenizer."""
    if text == "kill the worker":
        os._exit(9)
    return np.frombuffer(text.encode(), np.uint8).astype(np.uint16).tobytes()


def encoder(**settings: Any) -> Encoder:
    defaults: dict[str, Any] = {"keys": ["text"], "eod": EOD}
    return Encoder(TextTokenizer(byte_ids, 257, EOD), **{**defaults, **settings})


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


def run(inputs: list[Path], prefix: Path, workers: int = 1, **settings: Any) -> Summary:
    named = [Input(str(path), path.stat().st_size) for path in inputs]
    return preprocess.preprocess(named, prefix, encoder(**settings), workers)


def command(*args: object) -> list[str]:
    return [sys.executable, "-B", str(TOOL), *map(str, args)]


NULL_TOKENIZER = ["--tokenizer-type", "NullTokenizer", "--vocab-size", "100"]
