"""How far each layer still turned between two checkpoints of a run: ``tools/layer_cosine.py``.

The paper's Figure 4: the cosine similarity of what a layer adds to the residual stream, early in
training and at its end, on the same text.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_prores.convert.export import open_checkpoint
from megatron_prores.errors import Parser, UserError
from megatron_prores.evaluation.exported import (
    add_model_arguments,
    default_device,
    exported,
    load_model,
)
from megatron_prores.runs.plot import check_picture, save_figure
from megatron_prores.system.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        description="Print, for each layer, the cosine between what it adds to the residual stream "
        "in one checkpoint (--ckpt-step) and in another of the same run (--other-step), token by "
        "token on the same text, and the mean over the tokens (paper, Figure 4)."
    )
    # The difference of two residual streams loses in bf16 what a layer adds to a large one.
    add_model_arguments(parser, dtype="fp32")
    parser.add_argument(
        "--other-step", type=int, metavar="N", required=True, help="the checkpoint to compare with"
    )
    parser.add_argument("--text", type=Path, metavar="FILE", required=True, help="in UTF-8")
    parser.add_argument(
        "--tokens", type=int, default=4096, metavar="N", help="read so many of it; default: 4096"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--output", type=Path, metavar="FILE", help="draw them, .png")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command ``tools/layer_cosine.py``.

    Args:
        argv: Arguments; those of the process by default.

    Raises:
        UserError: An argument, a checkpoint, or the text is not usable.
    """
    args = _parser().parse_args(argv)
    if args.tokens < 1:
        raise UserError(f"--tokens {args.tokens}: must be at least 1")
    if args.output is not None:
        check_picture(args.output)
    try:
        text = args.text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--text {args.text}: cannot be read: {error}") from error
    device = default_device(args.device)
    sources = [
        open_checkpoint(args.load, step, args.prores_schedule, flag)
        for step, flag in ((args.ckpt_step, "--ckpt-step"), (args.other_step, "--other-step"))
    ]
    outputs, batch = [], None
    for source in sources:
        directory = exported(source, args.dtype, args.tokenizer, args.cache)
        model, tokenizer = load_model(directory, device)
        if batch is None:
            batch = token_batch(model, tokenizer, text, args.tokens)
        outputs.append(residual_outputs(model, batch))
    assert batch is not None
    cosines = cosine_by_layer(*outputs)
    steps = tuple(source.iteration for source in sources)
    print(f"{'layer':>5}  cosine of what it adds, iterations {steps[0]} and {steps[1]}")
    for layer, cosine in enumerate(cosines, start=1):
        print(f"{layer:>5}  {cosine:.4f}")
    if args.json is not None:
        found = {"iterations": steps, "tokens": batch.numel(), "cosine": cosines}
        _write_json(args.json, found)
    if args.output is not None:
        save_figure(draw(cosines, steps), args.output)


def token_batch(model: Any, tokenizer: Any, text: str, tokens: int) -> Tensor:
    """Cut the beginning of a text into sequences as long as the model sees.

    Args:
        model: Of transformers.
        tokenizer: Of transformers.
        text: At least one token.
        tokens: How many to take; what fills no sequence is left out, if there is a whole one.

    Returns:
        Token ids [b, s], on the model's device.

    Raises:
        UserError: The text is empty.
    """
    import torch

    ids = tokenizer(text, add_special_tokens=False)["input_ids"][:tokens]
    if not ids:
        raise UserError("--text holds no tokens")
    length = min(model.config.max_position_embeddings, len(ids))
    whole = len(ids) // length * length
    return torch.tensor(ids[:whole], device=model.device).view(-1, length)


def residual_outputs(model: Any, batch: Tensor) -> list[Tensor]:
    """Compute what each layer adds to the residual stream: its output less its input.

    Args:
        model: Of transformers, with alpha in its weights.
        batch: Token ids [b, s]; its sequences run one by one.

    Returns:
        Per layer [b s, h], float32 on the CPU.
    """
    import torch

    layers = model.model.layers
    found: list[list[Tensor]] = [[] for _ in layers]

    def keep(index: int, given: tuple[Any, ...], output: Any) -> None:
        after = output[0] if isinstance(output, tuple) else output
        found[index].append((after.float() - given[0].float()).flatten(0, 1).cpu())

    hooks = [
        layer.register_forward_hook(
            lambda module, given, output, index=index: keep(index, given, output)
        )
        for index, layer in enumerate(layers)
    ]
    with torch.no_grad():
        for sequence in batch:
            model(sequence[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    return [torch.cat(parts) for parts in found]


def cosine_by_layer(first: Sequence[Tensor], second: Sequence[Tensor]) -> list[float]:
    """Compute the mean over the tokens of the cosine between two models' residual outputs.

    Args:
        first: Per layer [tokens, h].
        second: The same of another model.

    Returns:
        Per layer, from -1 to 1; a layer that adds nothing in one of them has 0.
    """
    from torch.nn.functional import cosine_similarity

    return [
        float(cosine_similarity(one, other, dim=-1).mean())
        for one, other in zip(first, second, strict=True)
    ]


def draw(cosines: Sequence[float], steps: tuple[int, ...]) -> Figure:
    """Draw the cosines over the layers."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.6), layout="constrained", facecolor="white")
    axes = figure.subplots()
    axes.plot(range(1, len(cosines) + 1), cosines, marker="o", markersize=4)
    axes.set_xlabel("layer")
    axes.set_ylabel(f"cosine, iterations {steps[0]} and {steps[1]}")
    axes.grid(color="0.9")
    return figure


def _write_json(path: Path, found: dict[str, Any]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            file.write(json.dumps(found) + "\n")
    except OSError as error:
        raise UserError(f"--json {path}: cannot write: {error.strerror}") from error
