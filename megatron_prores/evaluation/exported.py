"""The export of a checkpoint that tools run on: made once, kept in a cache beside it."""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

from megatron_prores.checkpoint.reader import INDEX
from megatron_prores.convert.export import (
    Source,
    add_dtype_argument,
    add_source_arguments,
    export,
)
from megatron_prores.errors import UserError
from megatron_prores.system.files import atomic_write

CACHE = "hugging_face"
"""Directory beside the checkpoints that the exports are kept in."""

_STAMP = "exported_from.json"


def add_model_arguments(parser: argparse.ArgumentParser, dtype: str = "bf16") -> None:
    """Add the flags of every tool that runs a checkpoint's export."""
    add_source_arguments(parser)
    add_dtype_argument(parser, dtype)
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: a GPU, or else the CPU")
    parser.add_argument("--cache", type=Path, help="of exports; default: beside the checkpoint")


def exported(
    source: Source, dtype: str, tokenizer: str | None = None, cache: Path | None = None
) -> Path:
    """Return the directory of a checkpoint's export, and make it where it is not there yet.

    Args:
        source: The checkpoint.
        dtype: One of ``export.DTYPES``.
        tokenizer: As in ``export``.
        cache: Where exports are kept; None: beside the checkpoint.

    Raises:
        UserError: The checkpoint cannot be exported.
    """
    root = source.directory.parent / CACHE if cache is None else cache
    place = root / f"{source.directory.name}-{dtype}"
    # Another run may have saved into the same directory since: names prove nothing.
    stamp = {
        "index": hashlib.sha256((source.directory / INDEX).read_bytes()).hexdigest(),
        "alphas": list(source.alphas),
        "tokenizer": tokenizer,
    }
    if (place / _STAMP).is_file() and json.loads((place / _STAMP).read_text()) == stamp:
        return place
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{root}: cannot be made: {error.strerror}; give --cache DIR") from error
    export(source, place, dtype, tokenizer, overwrite=True)
    with atomic_write(place / _STAMP) as file:
        file.write(json.dumps(stamp))
    return place


def default_device(device: str | None) -> str:
    """Return the device to compute on: the one that was asked for, or a GPU where there is one.

    Raises:
        UserError: There is no GPU.
    """
    import torch

    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no CUDA GPU was found on this machine")
    return device


def load_model(directory: Path, device: str) -> tuple[Any, Any]:
    """Load an export: transformers' model, ready to evaluate, and its tokenizer.

    Raises:
        UserError: It was exported without a tokenizer.
    """
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    transformers.utils.logging.disable_progress_bar()
    if not (directory / "tokenizer_config.json").is_file():
        raise UserError(
            "this run has no tokenizer of text (--tokenizer-type NullTokenizer): it can neither "
            "read nor write any"
        )
    # The only code that can be in an export is modeling_prores.py of this package.
    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, dtype="auto")
    return model.to(device).eval(), AutoTokenizer.from_pretrained(directory)
