"""Export a checkpoint to Hugging Face's format: weights, configuration, tokenizer, model card."""

from __future__ import annotations

import argparse
import json
import os
import shutil
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_prores.checkpoint.manifest import DamagedError
from megatron_prores.checkpoint.newest import newest
from megatron_prores.checkpoint.reader import (
    StoredCheckpoint,
    is_distributed,
    is_iteration,
    iterations,
)
from megatron_prores.checkpoint.settings import differences
from megatron_prores.checkpoint.summary import Warmup, warmup_of
from megatron_prores.checkpoint.verify import surface_damage
from megatron_prores.config.flags import FLAGS, config_of, told_in_flags
from megatron_prores.config.prores_config import OFF
from megatron_prores.convert import tokenizer as tokenizers
from megatron_prores.convert.architecture import Architecture, architecture_of
from megatron_prores.convert.stored_weights import Weight, weights_of
from megatron_prores.data.staging import staging_directory
from megatron_prores.errors import Parser, UserError
from megatron_prores.schedule.depth import depths_of

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}

SHARD_BYTES = 10**9
"""Of a file of weights. It is put together in memory, so that it bounds what an export takes."""


@dataclass(frozen=True)
class Source:
    """The checkpoint of one iteration, and what it says of its run."""

    directory: Path
    stored: StoredCheckpoint
    args: Namespace
    iteration: int
    warmup: Warmup
    alphas: tuple[float, ...]
    """alpha of layer 1..L at ``iteration``."""

    @property
    def tokens(self) -> int:
        """Tokens seen."""
        samples = int(getattr(self.args, "consumed_train_samples", 0))
        return samples * int(self.args.seq_length)


def find_checkpoint(
    root: Path, step: int | None = None, step_flag: str = "--ckpt-step"
) -> StoredCheckpoint:
    """Find a checkpoint of the distributed format, with its arguments; reads none of its weights.

    Args:
        root: What ``--save`` named, or the directory of one iteration in it.
        step: An iteration; None: the newest.
        step_flag: That named ``step``, for the messages.

    Raises:
        UserError: There is none, or it is damaged.
    """
    directory = _find(root, step, step_flag)
    if damage := surface_damage(directory):
        raise UserError(
            f"--load {root}: {directory.name} is damaged: {damage[0]}; see tools/checkpoint.py "
            "verify"
        )
    if not is_distributed(directory):
        raise UserError(
            f"--load {root}: {directory.name} is in Megatron's old format of a file per rank: load "
            "it with the layout that saved it, and save it with --ckpt-format torch_dist"
        )
    stored = StoredCheckpoint(directory)
    try:
        args = stored.args
        int(stored.common.get("iteration", 0))
    except (DamagedError, TypeError, ValueError) as error:
        raise UserError(f"--load {root}: {directory.name} cannot be read: {error}") from error
    if not hasattr(args, "num_layers"):
        raise UserError(f"--load {root}: {directory.name} does not hold the arguments of its run")
    return stored


def open_checkpoint(
    root: Path, step: int | None = None, schedule: str | None = None, step_flag: str = "--ckpt-step"
) -> Source:
    """Open the checkpoint to export; reads its arguments and none of its weights.

    Args:
        root: What ``--save`` named, or the directory of one iteration in it.
        step: An iteration; None: the newest.
        schedule: The run's own schedule, ``file:PATH`` or ``module:function``, where the checkpoint
            cannot say what its alphas are.
        step_flag: That named ``step``, for the messages.

    Raises:
        UserError: There is none, it is damaged, or its alphas are not known.
    """
    stored = find_checkpoint(root, step, step_flag)
    args, directory = stored.args, stored.directory
    iteration = int(stored.common.get("iteration", 0))
    warmup = warmup_of(args, iteration)
    alphas = _alphas(args, iteration, warmup, schedule, directory)
    return Source(directory, stored, args, iteration, warmup, alphas)


def _alphas(
    args: Namespace, iteration: int, warmup: Warmup, schedule: str | None, directory: Path
) -> tuple[float, ...]:
    """Return alpha of layer 1..L at the checkpoint's iteration."""
    num_layers = depths_of(args)[-1]
    if getattr(args, "prores_schedule", OFF) == OFF:
        return (1.0,) * num_layers
    if schedule is not None:
        with told_in_flags():
            ours = config_of(Namespace(**{**vars(args), "prores_schedule": schedule}))
            wanted = ours.settings(num_layers)
            step = int(args.consumed_train_samples) if ours.unit == "samples" else iteration
            alphas = tuple(ours.alphas(step, num_layers).tolist())
        # What a file or a function computes is compared by the digest of its file, not by its name.
        if differ := differences(args.prores_settings, wanted):
            raise UserError(
                f"--prores-schedule {schedule}: {directory} was trained with another one "
                f"({', '.join(FLAGS.get(name, name) for name in differ)} differ)"
            )
        return alphas
    if warmup.alphas is None:
        raise UserError(
            f"{directory}: {warmup.note}; without alpha its branches cannot be scaled as they were "
            "trained: give the run's own --prores-schedule"
        )
    return tuple(warmup.alphas)


def _find(root: Path, step: int | None, step_flag: str) -> Path:
    if not root.is_dir():
        raise UserError(f"--load {root}: no such directory")
    if is_iteration(root.absolute()):
        return root.absolute()
    found = iterations(root)
    if step is not None:
        if step not in found:
            raise UserError(f"{step_flag} {step}: {root} has no checkpoint of that iteration")
        return found[step].absolute()
    try:
        choice = newest(root)
    except DamagedError as error:
        raise UserError(f"--load {root}: {error}; give {step_flag}") from error
    if choice is None:
        raise UserError(f"--load {root}: there is no checkpoint, or no tracker file, in it")
    return choice.directory.absolute()


def export(
    source: Source,
    output: Path,
    dtype: str = "bf16",
    tokenizer: str | None = None,
    overwrite: bool = False,
    own_class: bool = False,
) -> Architecture:
    """Write a directory that transformers' ``from_pretrained`` loads: all of it or none.

    Args:
        source: The checkpoint.
        output: The directory; made.
        dtype: One of :data:`DTYPES`.
        tokenizer: Path of the tokenizer, where it is not where the run had it; "none": export
            without one.
        overwrite: Whether an output that exists is replaced.
        own_class: Write our own class also where transformers has one.

    Returns:
        What the checkpoint has become.

    Raises:
        UserError: The model, its tokenizer or the output cannot be used.
    """
    if output.exists() and not overwrite:
        raise UserError(f"--output {output}: exists; give another one, or --overwrite")
    if output.exists() and not (output / "config.json").is_file():
        raise UserError(f"--output {output}: is no exported model: it is not overwritten")
    words = tokenizers.find(source.args, tokenizer)
    architecture = architecture_of(source.args, words.vocab_size, words.special_ids, own_class)
    try:
        weights = weights_of(
            source.stored, source.args, architecture, source.alphas, words.vocab_size
        )
        with staging_directory(output.absolute()) as staging:
            made = staging / "model"
            made.mkdir()
            # First what is small and may be refused.
            words.save(made)
            _write_config(made, architecture, source, dtype)
            _write_weights(made, weights, DTYPES[dtype])
            (made / "README.md").write_text(model_card(source, architecture, dtype))
            _replace(made, output)
    except DamagedError as error:
        raise UserError(f"{source.directory}: damaged: {error}") from error
    except OSError as error:
        raise UserError(f"--output {output}: cannot write: {error.strerror or error}") from error
    return architecture


def _replace(made: Path, output: Path) -> None:
    for path in made.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    if output.exists():
        before = made.with_name("before")
        os.replace(output, before)
        os.replace(made, output)
        shutil.rmtree(before)
    else:
        os.replace(made, output)


def _write_config(directory: Path, architecture: Architecture, source: Source, dtype: str) -> None:
    config: dict[str, Any] = {
        **architecture.config,
        "dtype": str(DTYPES[dtype]).removeprefix("torch."),
        "prores": {
            "settings": source.warmup.settings,
            "iteration": source.iteration,
            "tokens": source.tokens,
            "alphas": list(source.alphas),
        },
    }
    generation = {
        name: value
        for name in ("bos_token_id", "eos_token_id", "pad_token_id")
        if (value := architecture.config[name]) is not None
    }
    for name, content in (("config.json", config), ("generation_config.json", generation)):
        (directory / name).write_text(json.dumps(content, indent=2) + "\n")
    if architecture.is_own:
        shutil.copy(Path(__file__).with_name("modeling_prores.py"), directory)


def _write_weights(directory: Path, weights: list[Weight], dtype: torch.dtype) -> None:
    """Write sharded safetensors and their index; a shard at a time is in memory."""
    from safetensors.torch import save_file

    shards = list(_shards(weights, dtype.itemsize))
    index: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = "model.safetensors"
        if len(shards) > 1:
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {}
        for weight in shard:
            tensor = weight.read()
            if tuple(tensor.shape) != weight.shape:
                raise UserError(
                    f"{weight.name}: the checkpoint has {tuple(tensor.shape)}, its arguments say "
                    f"{weight.shape}: it cannot be exported"
                )
            tensors[weight.name] = tensor.to(dtype).contiguous()
            index[weight.name] = name
        save_file(tensors, directory / name, metadata={"format": "pt"})
    if len(shards) > 1:
        size = sum(_numel(weight) for weight in weights) * dtype.itemsize
        content = {"metadata": {"total_size": size}, "weight_map": index}
        (directory / "model.safetensors.index.json").write_text(json.dumps(content, indent=2))


def _shards(weights: list[Weight], itemsize: int) -> Iterator[list[Weight]]:
    shard: list[Weight] = []
    size = 0
    for weight in weights:
        more = _numel(weight) * itemsize
        if shard and size + more > SHARD_BYTES:
            yield shard
            shard, size = [], 0
        shard.append(weight)
        size += more
    yield shard


def _numel(weight: Weight) -> int:
    return torch.Size(weight.shape).numel()


def model_card(source: Source, architecture: Architecture, dtype: str) -> str:
    """Write what the model is, in Markdown with the front matter of the Hugging Face Hub."""
    settings = source.warmup.settings or {"--prores-schedule": OFF}
    rows = "\n".join(f"| `{flag}` | {value} |" for flag, value in settings.items())
    args = source.args
    shape = f"{args.num_layers}, {args.hidden_size}, {args.num_attention_heads}"
    still = [alpha for alpha in source.alphas if alpha < 1.0]
    stood = "every layer was open (alpha 1): the weights are those of the checkpoint"
    if still:
        stood = (
            f"{len(still)} of {len(source.alphas)} layers had an alpha below 1 (the smallest "
            f"{min(still):.4g}), which is multiplied into the last weight of their branches"
        )
    loading = (
        'AutoModelForCausalLM.from_pretrained("DIRECTORY", trust_remote_code=True)'
        if architecture.is_own
        else 'AutoModelForCausalLM.from_pretrained("DIRECTORY")'
    )
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [prores, megatron]
---

# A language model pretrained with Megatron-ProRes

Progressive Residual Warmup (ProRes, arXiv 2603.05369) scales each layer's residual branches by an
alpha that grows from 0 to 1 during training, deeper layers later.

| | |
|---|---|
| class | `{architecture.name}`{" (in `modeling_prores.py`)" if architecture.is_own else ""} |
| layers, hidden size, heads | {shape} |
| dtype | {dtype} |
| iteration | {source.iteration} |
| tokens seen | {source.tokens} |
{rows}

At this iteration {stood}.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = {loading}
tokenizer = AutoTokenizer.from_pretrained("DIRECTORY")
```
"""


def add_source_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say which checkpoint is meant, shared by all tools over an export."""
    parser.add_argument(
        "--load", type=Path, required=True, help="what --save of the run named, or one iteration"
    )
    parser.add_argument("--ckpt-step", type=int, metavar="N", help="by default the newest")
    parser.add_argument(
        "--prores-schedule",
        metavar="NAME",
        help="the run's own schedule, file:PATH or module:function, where the checkpoint cannot "
        "say what its alphas are",
    )
    parser.add_argument(
        "--tokenizer", metavar="PATH", help="where the run's tokenizer is now; none: without one"
    )


def add_dtype_argument(parser: argparse.ArgumentParser, default: str = "bf16") -> None:
    """Add the flag of the weights' dtype in an export."""
    parser.add_argument(
        "--dtype", choices=tuple(DTYPES), default=default, help=f"default: {default}"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command ``tools/export_hf.py``.

    Args:
        argv: Arguments; those of the process by default.

    Raises:
        UserError: An argument or the checkpoint is not usable.
    """
    parser = Parser(
        description="Export a checkpoint to Hugging Face's format, with alpha in its weights."
    )
    add_source_arguments(parser)
    parser.add_argument("--output", type=Path, required=True, help="directory of the model; made")
    add_dtype_argument(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace a model that is there")
    parser.add_argument(
        "--own-class",
        action="store_true",
        help="write modeling_prores.py also where transformers has a class",
    )
    parser.add_argument(
        "--push", metavar="REPO", help="upload it to this repository of the Hugging Face Hub"
    )
    args = parser.parse_args(argv)
    source = open_checkpoint(args.load, args.ckpt_step, args.prores_schedule)
    architecture = export(
        source, args.output, args.dtype, args.tokenizer, args.overwrite, args.own_class
    )
    print(
        f"{args.output}: {architecture.name}, iteration {source.iteration}, {source.tokens} tokens "
        f"seen, {sum(alpha == 1.0 for alpha in source.alphas)} of {len(source.alphas)} layers open"
    )
    if args.push is not None:
        _push(args.output, args.push)


def _push(directory: Path, repository: str) -> None:
    from huggingface_hub import HfApi

    hub = HfApi()
    try:
        hub.create_repo(repository, exist_ok=True)
        hub.upload_folder(repo_id=repository, folder_path=directory)
    except Exception as error:  # of the network, of the Hub, of the name
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"--push {repository}: {reason}; the model is in {directory}, nothing of it is lost"
        ) from error
    print(f"{repository}: uploaded")
