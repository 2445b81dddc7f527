"""Tokenizers from the Hugging Face Hub."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from megatron_prores.data.inputs import one_line
from megatron_prores.errors import Parser, UserError
from megatron_prores.system.environment import THIS_MACHINE
from megatron_prores.system.files import atomic_write

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
    if not THIS_MACHINE.is_installed("huggingface_hub"):
        raise UserError("the package huggingface_hub is not installed: pip install huggingface_hub")
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
            f"{repository}: no tokenizer.model from the Hub: {one_line(error)}"
        ) from error
    with atomic_write(output, "wb") as file:
        file.write(Path(found).read_bytes())


def _parser() -> argparse.ArgumentParser:
    parser = Parser(description="Bring a tokenizer from the Hugging Face Hub.")
    commands = parser.add_subparsers(dest="command", required=True)
    tokenizer = commands.add_parser("tokenizer", help="copy a SentencePiece model")
    tokenizer.add_argument("repository")
    tokenizer.add_argument("output")
    return parser
