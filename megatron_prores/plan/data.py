"""What training draws from its datasets, and Megatron's caches of them, made before the job."""

from __future__ import annotations

import argparse
from typing import Any

from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.blended_megatron_dataset_config import parse_and_normalize_split
from megatron.core.datasets.gpt_dataset import GPTDataset
from megatron.training.training import get_train_valid_test_num_samples, update_train_iters
from megatron.training.utils import get_blend_and_blend_per_split

from megatron_prores.data.dataset_files import data_prefixes
from megatron_prores.data.indexed import read_index
from megatron_prores.errors import UserError
from megatron_prores.runs.plot import size_of
from megatron_prores.system.environment import TargetEnvironment
from megatron_prores.training.gpt import dataset_config

Drawn = list[dict[str, Any]]


def drawn(args: argparse.Namespace, tokens: int, machine: TargetEnvironment) -> Drawn:
    """Return what training draws from each of its datasets.

    Args:
        args: Validated by Megatron.
        tokens: Of the whole training.
        machine: Of the run; datasets that are there alone have no numbers.

    Returns:
        By dataset: ``path``, ``share`` of the training's tokens, ``tokens`` that it has for
        training, and how many ``epochs`` of them are drawn.
    """
    if args.mock_data or (blend := _training_blend(args)) is None:
        return []
    paths, weights, part = blend
    have = [
        None
        if machine.is_elsewhere(f"{path}.idx")
        else round(part * read_index(f"{path}.idx").tokens)
        for path in paths
    ]
    if weights is None and len(paths) == 1:
        weights = [1.0]
    if weights is None:  # Megatron draws from each as much as it has.
        weights = [each for each in have if each is not None]
    shares: list[float | None] = [None] * len(paths)
    if len(weights) == len(paths):
        shares = [each / sum(weights) for each in weights]
    return [
        {
            "path": path,
            "share": share,
            "tokens": there,
            "epochs": None if not there or share is None else share * tokens / there,
        }
        for path, share, there in zip(paths, shares, have, strict=True)
    ]


def _training_blend(
    args: argparse.Namespace,
) -> tuple[list[str], list[float] | None, float] | None:
    """Return the paths that training draws from, their weights, and its part of each."""
    blend, per_split = get_blend_and_blend_per_split(args)
    if per_split is not None:
        blend, part = per_split[0], 1.0
    else:
        part = 1.0 if args.split is None else parse_and_normalize_split(args.split)[0]
    return None if blend is None else (*blend, part)


def data_warnings(args: argparse.Namespace, data: Drawn, tokens: int) -> list[str]:
    """Warn of datasets that end before the training does.

    Megatron repeats a single dataset, and those of a blend with weights; without weights it reads
    several ones once.
    """
    if len(data) < 2 or any(each["tokens"] is None for each in data):
        return []
    blend = _training_blend(args)
    have = sum(each["tokens"] for each in data)
    if blend is None or blend[1] is not None or have >= tokens:
        return []
    return [
        f"the data ends before the training: Megatron reads several datasets without weights once, "
        f"{size_of(have)} tokens, and {size_of(tokens)} are asked for: give a weight before each"
    ]


def prepare_cache(args: argparse.Namespace, tokenizer: Any, machine: TargetEnvironment) -> str:
    """Build Megatron's indices of the run's datasets, as its rank 0 would do.

    Args:
        args: Validated by Megatron.
        tokenizer: The run's; it is a part of the caches' names.
        machine: Of the run.

    Returns:
        Where they are, in words.

    Raises:
        UserError: The data or the tokenizer is not here, or there is nothing to build.
    """
    if args.mock_data:
        raise UserError("--prepare-cache: with --mock-data there is nothing to build")
    for flag, prefix in data_prefixes(args):
        if machine.is_elsewhere(f"{prefix}.idx"):
            raise UserError(f"--prepare-cache: {flag} {prefix} is not here")
    if not hasattr(tokenizer, "unique_identifiers"):
        raise UserError("--prepare-cache: the tokenizer is not here")
    update_train_iters(args)
    args.dataloader_fast_cache_load = args.dataloader_defer_npy_index_mmap = False
    samples = get_train_valid_test_num_samples()
    builder = BlendedMegatronDatasetBuilder(GPTDataset, samples, lambda: True, dataset_config(args))
    try:
        builder.build()
    except OSError as error:
        raise UserError(f"--prepare-cache: cannot write: {error}") from error
    return args.data_cache_path or "the folder cache beside each dataset"
