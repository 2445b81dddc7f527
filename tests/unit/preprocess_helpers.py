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
