"""The checks between Megatron's validation of its flags and the first thing that it writes.

Of the model's shape, its tokenizer, its data, and the checkpoint that it must fit.
"""

from __future__ import annotations

import argparse
import copy
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from megatron_prores.command_line.conflicts import check_layers
from megatron_prores.command_line.precision import check_fp8_shapes
from megatron_prores.command_line.saved_run import SavedRun
from megatron_prores.command_line.values import check_shapes, flag_of
from megatron_prores.config.prores_config import ProResConfig
from megatron_prores.data.dataset_files import check_token_ids
from megatron_prores.data.megatron_tokenizer import import_tokenizers
from megatron_prores.errors import UserError
from megatron_prores.schedule.depth import is_gpt_pattern, main_layers, total_depth
from megatron_prores.system.environment import TargetEnvironment, check_address
from megatron_prores.upstream.registry import undone_afterwards, wrap

_MODEL = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "kv_channels",
    "group_query_attention",
    "num_query_groups",
    "swiglu",
    "normalization",
    "position_embedding_type",
    "max_position_embeddings",
    "untie_embeddings_and_output_weights",
    "add_bias_linear",
    "add_qkv_bias",
    "qk_layernorm",
    "multi_latent_attention",
    "num_experts",
    "moe_ffn_hidden_size",
    "mtp_num_layers",
)
"""Destinations of the flags that decide what parameters there are, and their shapes."""

_PATTERN = "hybrid_layer_pattern"

_FLAGS = {"add_bias_linear": "--disable-bias-linear"}
"""Where the flag is not the destination's name; both say the opposite."""


@contextmanager
def around_setup(
    prores: ProResConfig,
    datasets: list[tuple[str, str]],
    saved: SavedRun | None,
    words_of: Callable[[Exception], str],
    target: TargetEnvironment,
) -> Iterator[None]:
    """Check in between what upstream's ``parse_and_validate_args`` does in one call.

    Behind its validation, before it opens any writer: the model's shape, its tokenizer.

    Args:
        prores: The ProRes configuration of the command line.
        datasets: The data that the tokenizer must fit, as (flag, path without ending).
        saved: The checkpoint that the model must fit, or None.
        words_of: Says in one line what upstream objects to.
        target: The machine of the run.
    """
    from megatron.training import arguments, global_vars

    def set_global_variables(stock: Callable[[], Any], named: dict[str, Any]) -> Any:
        check_address(os.environ)
        check_layers(named["args"], prores)
        check_shapes(named["args"])
        check_fp8_shapes(named["args"])
        _try_configuration(named["args"], words_of)
        _check_model(named["args"], saved)
        _check_experts_optimizer(named["args"], saved)
        return stock()

    def build_tokenizer(stock: Callable[[], Any], named: dict[str, Any]) -> Any:
        args = named["args"]
        tokenizer = target.stand_in_tokenizer(args)
        if tokenizer is None:
            name = _tokenizer_name(args)
            import_tokenizers(args)
            try:
                tokenizer = stock()
            except Exception as error:  # each library raises its own kinds
                reason = str(error) or type(error).__name__
                raise UserError(f"{name} cannot be made: {reason}") from error
            here = [
                (flag, path) for flag, path in datasets if not target.is_elsewhere(f"{path}.idx")
            ]
            check_token_ids(here, max(tokenizer.vocab_size, _eod(tokenizer) + 1), name)
        _check_vocabulary(args, saved)
        return tokenizer

    with undone_afterwards():
        wrap(arguments, "set_global_variables", ("args",), set_global_variables)
        wrap(global_vars, "build_tokenizer", ("args",), build_tokenizer)
        yield


def _try_configuration(args: argparse.Namespace, words_of: Callable[[Exception], str]) -> None:
    """Let the model's configuration check itself, on a copy: it fills in fields."""
    from megatron.training.argument_utils import core_transformer_config_from_args

    try:
        core_transformer_config_from_args(copy.deepcopy(args))
    except (AssertionError, ValueError, OSError) as error:
        raise UserError(words_of(error)) from error


def _tokenizer_name(args: argparse.Namespace) -> str:
    words = [f"--tokenizer-type {args.tokenizer_type}"]
    for destination in ("tokenizer_model", "vocab_file", "vocab_size"):
        if (value := getattr(args, destination)) is not None:
            return f"{words[0]} {flag_of(destination)} {value}"
    return words[0]


def _eod(tokenizer: Any) -> int:
    try:
        eod = tokenizer.eod
    except (AttributeError, NotImplementedError):
        return -1
    return -1 if eod is None else int(eod)


def _check_model(args: argparse.Namespace, saved: SavedRun | None) -> None:
    """Refuse a checkpoint of another model, which upstream ends with a list of tensors."""
    # With another strictness, or upcycling, the user has said that the models differ.
    if saved is None or args.moe_use_upcycling or args.dist_ckpt_strictness not in _STRICT:
        return
    theirs, differences = vars(saved.args), []
    _check_pattern(saved.directory, getattr(saved.args, _PATTERN, None), getattr(args, _PATTERN))
    for destination in _MODEL:
        if destination not in theirs or not hasattr(args, destination):
            continue
        if destination == "max_position_embeddings" and (
            args.position_embedding_type != "learned_absolute"
        ):
            continue
        if destination == "num_query_groups" and not args.group_query_attention:
            continue
        there, here = theirs[destination], getattr(args, destination)
        if destination == "num_layers":
            there, here = total_depth(saved.args), total_depth(args)
        if there != here:
            opposite = destination in _FLAGS
            flag = _FLAGS.get(destination, flag_of(destination))
            differences.append(
                f"{flag} {_shown(there, opposite)} there, {_shown(here, opposite)} here"
            )
    if differences:
        raise UserError(
            f"{saved.directory} holds another model: {'; '.join(differences)}. Give the flags that "
            "it was trained with, or --use-checkpoint-args to take them from it"
        )


def _check_pattern(directory: str, there: str | None, here: str | None) -> None:
    """Refuse a hybrid model's checkpoint for another pattern; a GPT model's goes on as hybrid.

    Megatron translates while it loads, in that direction alone.
    """
    if there is None:
        if here is not None and (not is_gpt_pattern(here) or "/" in here):
            raise UserError(
                f"{directory} holds a GPT model, which goes on as --hybrid-layer-pattern *- or *E, "
                f"over and over, and not as {here}"
            )
        return
    if here is None:
        raise UserError(f"{directory} holds a hybrid model: give --hybrid-layer-pattern {there}")
    if main_layers(there) != main_layers(here):
        raise UserError(
            f"{directory} holds another model: --hybrid-layer-pattern {there} there, {here} here"
        )


_STRICT = ("assume_ok_unexpected", "log_unexpected", "raise_unexpected", "raise_all")


def _check_experts_optimizer(args: argparse.Namespace, saved: SavedRun | None) -> None:
    """Refuse optimizer state that Megatron keeps apart for experts on the one side only."""
    if saved is None or args.no_load_optim or args.finetune or args.skip_train:
        return
    there, here = _experts_have_own_optimizer(saved.args), _experts_have_own_optimizer(args)
    if there == here or getattr(saved.args, "no_save_optim", None):
        return
    kinds = {True: "experts have an optimizer of their own", False: "one optimizer has all weights"}
    raise UserError(
        f"{saved.directory}: {kinds[there]} there, {kinds[here]} here, and Megatron cannot "
        "translate. They have their own with --expert-model-parallel-size above 1, and with an "
        "--expert-tensor-parallel-size other than --tensor-model-parallel-size: keep to one kind, "
        "or give --no-load-optim"
    )


def _experts_have_own_optimizer(args: argparse.Namespace) -> bool:
    """Return whether experts' weights are reduced over other ranks than the rest of the model's."""
    tensor = args.tensor_model_parallel_size
    of_experts = getattr(args, "expert_tensor_parallel_size", None) or tensor
    return getattr(args, "num_experts", None) is not None and (
        args.expert_model_parallel_size > 1 or of_experts != tensor
    )


def _check_vocabulary(args: argparse.Namespace, saved: SavedRun | None) -> None:
    there = getattr(saved.args, "padded_vocab_size", None) if saved is not None else None
    if saved is not None and there is not None and there != args.padded_vocab_size:
        raise UserError(
            f"{saved.directory} holds a model with a vocabulary of {there} ids, with padding; "
            f"{_tokenizer_name(args)} makes {args.padded_vocab_size}: give the tokenizer, "
            "--make-vocab-size-divisible-by and tensor-parallel size that give the same"
        )


def _shown(value: Any, opposite: bool) -> str:
    if isinstance(value, bool):
        return "on" if value != opposite else "off"
    return "not given" if value is None else str(value)
