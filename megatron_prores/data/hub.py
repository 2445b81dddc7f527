"""Text and tokenizers from the Hugging Face Hub. Texts are streamed, not kept on the disk."""

from __future__ import annotations

import argparse
import itertools
import json
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_prores.environment import THIS_MACHINE
from megatron_prores.errors import Parser, UserError
from megatron_prores.files import atomic_write

OPEN_TOKENIZER = "TinyLlama/TinyLlama_v1.1"
"""Has the pieces of Llama 2's tokenizer, and needs no permission."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command ``tools/hub.py``.

    Args:
        argv: Arguments; those of the process by default.

    Raises:
        UserError: A package is missing, or the Hub does not give what is asked for.
    """
    args = _parser().parse_args(argv)
    if not THIS_MACHINE.is_installed("datasets"):
        raise UserError("the package datasets is not installed: pip install 'datasets>=4'")
    if args.command == "text":
        # The reader of a pipe may have enough.
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        for text in itertools.islice(_texts(args), args.documents):
            sys.stdout.write(json.dumps({"text": text}) + "\n")
        sys.stdout.flush()
    else:
        fetch_tokenizer(args.repository, Path(args.output))


def fetch_tokenizer(repository: str, output: Path) -> None:
    """Bring the SentencePiece model of a repository on the Hub.

    Args:
        repository: As in "meta-llama/Llama-2-7b-hf"; gated ones need HF_TOKEN.
        output: The file to write.

    Raises:
        UserError: The repository is gated, cannot be reached, or has no such file.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import GatedRepoError
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # it retries for a while, and says so each time
    try:
        found = hf_hub_download(repository, "tokenizer.model")
    except GatedRepoError as error:
        raise UserError(
            f"{repository} is gated: accept its license on the Hub and set HF_TOKEN, or take "
            f"{OPEN_TOKENIZER}, which has the same pieces"
        ) from error
    except Exception as error:  # Each layer below raises its own kinds.
        raise UserError(
            f"{repository}: no tokenizer.model from the Hub: {_reason(error)}"
        ) from error
    with atomic_write(output, "wb") as file:
        file.write(Path(found).read_bytes())


def _texts(args: argparse.Namespace) -> Iterator[str]:
    from datasets import load_dataset
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()
    try:
        rows: Any = load_dataset(
            args.dataset, args.name, data_files=args.data_files, split=args.split, streaming=True
        )
        for row in rows:
            yield row["text"]
    except KeyError as error:
        raise UserError(f"--dataset {args.dataset}: its rows have no column {error}") from error
    except Exception as error:  # Each layer below raises its own kinds.
        raise UserError(f"--dataset {args.dataset} cannot be read: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _parser() -> argparse.ArgumentParser:
    parser = Parser(description="Bring text or a tokenizer from the Hugging Face Hub.")
    commands = parser.add_subparsers(dest="command", required=True)
    text = commands.add_parser("text", help="print the texts of a data set as JSON lines")
    text.add_argument("--dataset", required=True, help="on the Hub; json: local files")
    text.add_argument("--name", help="of a part of the data set")
    text.add_argument("--split", default="train", help="default: train")
    text.add_argument("--data-files", help="pattern of the files to read, else all of the split")
    text.add_argument("--documents", type=int, help="print no more than the first of them")
    tokenizer = commands.add_parser("tokenizer", help="copy a SentencePiece model")
    tokenizer.add_argument("repository")
    tokenizer.add_argument("output")
    return parser
