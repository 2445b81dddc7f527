"""Let a checkpoint write text: ``tools/generate.py``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from megatron_prores.convert.export import open_checkpoint
from megatron_prores.errors import Parser, UserError
from megatron_prores.evaluation.exported import (
    add_model_arguments,
    default_device,
    exported,
    load_model,
)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        description="Let a checkpoint go on with a text. It is exported to Hugging Face's format "
        "first, into a cache beside it; transformers generates."
    )
    add_model_arguments(parser)
    parser.add_argument(
        "--prompt", action="append", help="may be given several times; else lines of standard input"
    )
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="default: 64")
    parser.add_argument("--greedy", action="store_true", help="always take the likeliest token")
    parser.add_argument("--temperature", type=float, default=1.0, help="default: 1.0")
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="default: 0, all tokens")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="default: 1.0")
    parser.add_argument("--seed", type=int, default=1234, help="default: 1234")
    return parser


def _check(args: argparse.Namespace) -> None:
    for flag, value, good, needed in (
        ("--max-new-tokens", args.max_new_tokens, args.max_new_tokens >= 1, "at least 1"),
        ("--temperature", args.temperature, args.temperature > 0, "above 0; or give --greedy"),
        ("--top-k", args.top_k, args.top_k >= 0, "at least 0"),
        ("--top-p", args.top_p, 0 < args.top_p <= 1, "above 0, at most 1"),
    ):
        if not good:
            raise UserError(f"{flag} {value}: must be {needed}")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command ``tools/generate.py``.

    Args:
        argv: Arguments; those of the process by default.

    Raises:
        UserError: An argument or the checkpoint is not usable.
    """
    args = _parser().parse_args(argv)
    _check(args)
    device = default_device(args.device)
    source = open_checkpoint(args.load, args.ckpt_step, args.prores_schedule)
    model, tokenizer = load_model(exported(source, args.dtype, args.tokenizer, args.cache), device)
    for prompt in args.prompt or _lines():
        generate(model, tokenizer, prompt, args)


def _lines() -> Iterator[str]:
    for line in sys.stdin:
        yield line.rstrip("\n")


def generate(model: Any, tokenizer: Any, prompt: str, args: argparse.Namespace) -> None:
    """Print a prompt and its continuation, token by token as they come.

    Args:
        model: Of transformers.
        tokenizer: Of transformers.
        prompt: Its text; the empty one begins a document.
        args: The sampling flags.

    Raises:
        UserError: The prompt is as long as the model can see.
    """
    import torch
    from transformers import TextStreamer, set_seed

    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    if not ids:
        # A document begins behind the end of the one before it.
        start = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else 0
        ids = [start]
    room = model.config.max_position_embeddings - len(ids)
    if room < 1:
        raise UserError(
            f"--prompt of {len(ids)} tokens: the model sees {model.config.max_position_embeddings}"
        )
    set_seed(args.seed)
    sampling: dict[str, Any] = {"do_sample": False}
    if not args.greedy:
        sampling = {"do_sample": True, "temperature": args.temperature}
        sampling |= {"top_k": args.top_k, "top_p": args.top_p}
    inputs = torch.tensor([ids], device=model.device)
    model.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=min(args.max_new_tokens, room),
        pad_token_id=tokenizer.eos_token_id,
        streamer=TextStreamer(tokenizer, skip_special_tokens=True),
        **sampling,
    )
