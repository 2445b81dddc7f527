"""Weights by their Llama names, in and out of a Megatron model, for every norm placement.

The table of names.py, read in both directions. Which layers a rank holds
is the layers' own business, so every pipeline and virtual-pipeline layout is served.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import unwrap_model
from torch import Tensor, nn

from megatron_prores.convert.names import LAYER_ENTRIES, MODEL_ENTRIES, Entry, branch_ends
from megatron_prores.errors import Argument, ArgumentError
from megatron_prores.model.hybrid_stack import hybrid_depths
from megatron_prores.schedule.depth import is_gpt_pattern


@torch.no_grad()
def to_llama(
    chunks: list[Any],
    norm_placement: str,
    vocab_size: int,
    read: Callable[[nn.Parameter], Tensor] = lambda parameter: parameter.data,
) -> dict[str, Tensor]:
    """Return the whole weights of the layers that this pipeline stage holds, by Llama names.

    Collective over the tensor-parallel group.

    Args:
        chunks: Model chunks of this rank, wrapped or not.
        norm_placement: One of ``placement.PLACEMENTS``.
        vocab_size: Rows of the embedding and the output head without Megatron's padding.
        read: What to take of a parameter, such as its gradient, of the same shape.

    Returns:
        Llama name -> tensor on the CPU, the same on every tensor-parallel rank.
    """
    weights: dict[str, Tensor] = {}
    for entry, prefix, parameter, config in _parameters(chunks, norm_placement):
        parts = _split_rows(read(parameter).detach(), entry, config)
        for name, part in zip(entry.llama, parts, strict=True):
            whole = _gather(part, entry.shard_dim)
            if entry in MODEL_ENTRIES and entry.shard_dim == 0:
                whole = whole[:vocab_size]
            # A copy: on the CPU device this would else be a view of the model's own weight.
            weights[prefix + name] = whole.to(device="cpu", copy=True)
    return weights


@torch.no_grad()
def from_llama(chunks: list[Any], norm_placement: str, weights: Mapping[str, Tensor]) -> None:
    """Set the parameters of this rank from whole weights by Llama names, in place.

    Args:
        chunks: Model chunks of this rank, wrapped or not.
        norm_placement: One of ``placement.PLACEMENTS``.
        weights: Llama name -> whole tensor, of all layers; those of other stages are not read.

    Raises:
        ValueError: A weight is missing, or has another shape than the model's.
    """
    for entry, prefix, parameter, config in _parameters(chunks, norm_placement):
        missing = [prefix + name for name in entry.llama if prefix + name not in weights]
        if missing:
            raise ValueError(f"no weight {missing[0]} for norm placement {norm_placement}")
        parts = [weights[prefix + name] for name in entry.llama]
        if entry in MODEL_ENTRIES and entry.shard_dim == 0:
            parts = [_pad_rows(parts[0], parameter.shape[0] * _tp_size())]
        shard = _join_rows([_shard(part, entry.shard_dim) for part in parts], entry, config)
        if shard.shape != parameter.shape:
            raise ValueError(
                f"{prefix}{' + '.join(entry.llama)} gives {tuple(shard.shape)} on this rank, the "
                f"model has {tuple(parameter.shape)}"
            )
        parameter.copy_(shard)


def fold_alphas(
    weights: Mapping[str, Tensor], norm_placement: str, alphas: Sequence[float]
) -> dict[str, Tensor]:
    """Fold each layer's alpha into its weights: the same model, without ProRes.

    A branch ends in a linear without bias, or, in a sandwich, in a norm without bias: scaling that
    last weight scales the branch. A model exported before its warmup is over must be folded, or it
    would run with branches that are larger than those it was trained with.

    Args:
        weights: Llama name -> whole tensor.
        norm_placement: One of ``placement.PLACEMENTS``.
        alphas: alpha of layer 1..L at the iteration of the weights, as ``ProResConfig.alphas``
            returns it.

    Returns:
        Llama name -> tensor; new ones where they differ.

    Raises:
        ArgumentError: The placement is unknown, or the weights are not those of L layers with it.
    """
    last = branch_ends(norm_placement)
    factors = {
        f"model.layers.{index}.{name}": float(alpha)
        for index, alpha in enumerate(alphas)
        for name in last
    }
    there = {name for name in weights if name.startswith("model.layers.") and name.endswith(last)}
    if wrong := sorted(there ^ factors.keys()):
        problem = "is for no layer of" if wrong[0] in there else "is missing, for"
        raise ArgumentError(
            Argument("weights"),
            f": {wrong[0]} {problem} the {len(alphas)} layers that have an alpha",
        )
    return {
        name: weight * factors[name] if name in factors else weight
        for name, weight in weights.items()
    }


def _parameters(
    chunks: list[Any], norm_placement: str
) -> Iterator[tuple[Entry, str, nn.Parameter, TransformerConfig]]:
    """Yield (entry, prefix of the Llama names, parameter, configuration) for this rank.

    Raises:
        ValueError: The model has a parameter without a Llama name, or lacks one that has one.
    """
    for chunk in unwrap_model(chunks):
        _check_is_llama(chunk)
        named = dict(chunk.named_parameters())
        found: list[tuple[Entry, str, nn.Parameter, TransformerConfig]] = []
        for entry in MODEL_ENTRIES:
            # A stage in the middle has neither; a tied head is no parameter of its own.
            for known in entry.megatron:
                if known in named:
                    found.append((entry, "", named.pop(known), chunk.config))
        depths = hybrid_depths(chunk)
        for index, layer in enumerate(chunk.decoder.layers):
            number = layer.layer_number
            prefix = f"model.layers.{(depths[number - 1] if depths else number) - 1}."
            for entry in LAYER_ENTRIES[norm_placement]:
                if depths and entry.of_attention != bool(number % 2):
                    continue  # of the other layer of the pair
                names = [f"decoder.layers.{index}.{name}" for name in entry.megatron]
                name = next((name for name in names if name in named), None)
                if name is None:
                    raise ValueError(f"no Llama names for this model: it has no {names[0]}")
                found.append((entry, prefix, named.pop(name), chunk.config))
        if named:
            raise ValueError(
                f"no Llama names for {len(named)} of this model's parameters: "
                f"{', '.join(list(named)[:5])}{', ...' if len(named) > 5 else ''}"
            )
        yield from found


def _check_is_llama(chunk: Any) -> None:
    """Refuse what would be split into other weights than it is made of.

    Raises:
        ValueError: Names the part.
    """
    config, pattern = chunk.config, getattr(chunk, "hybrid_layer_pattern", None)
    if pattern is not None and not is_gpt_pattern(pattern):
        raise ValueError(f"no Llama names for a hybrid model of the pattern {pattern}")
    if not config.gated_linear_unit:
        raise ValueError("no Llama names for this model: its MLP has no gate")
    if config.attention_output_gate:
        raise ValueError("no Llama names for this model: its attention has a gate")


def _groups(config: TransformerConfig) -> int:
    return config.num_query_groups or config.num_attention_heads


def _split_rows(weight: Tensor, entry: Entry, config: TransformerConfig) -> list[Tensor]:
    """Take a parameter apart into its Llama weights, each still this rank's shard."""
    if entry.rows == "halves":
        return list(weight.chunk(2))
    if entry.rows == "qkv":
        # [groups, queries of a group + key + value, h]; each part in whole heads.
        channels = config.kv_channels
        queries = config.num_attention_heads // _groups(config) * channels
        grouped = weight.view(-1, queries + 2 * channels, weight.shape[-1])
        return [
            part.reshape(-1, weight.shape[-1])
            for part in grouped.split([queries, channels, channels], dim=1)
        ]
    return [weight]


def _join_rows(parts: list[Tensor], entry: Entry, config: TransformerConfig) -> Tensor:
    """Undo :func:`_split_rows`."""
    if entry.rows == "qkv":
        groups = _groups(config) // _tp_size()
        return torch.cat([part.view(groups, -1, part.shape[-1]) for part in parts], dim=1).view(
            -1, parts[0].shape[-1]
        )
    return torch.cat(parts)


def _tp_size() -> int:
    return parallel_state.get_tensor_model_parallel_world_size()


def _shard(weight: Tensor, dim: int | None) -> Tensor:
    if dim is None:
        return weight
    rank = parallel_state.get_tensor_model_parallel_rank()
    return weight.chunk(_tp_size(), dim=dim)[rank]


def _gather(shard: Tensor, dim: int | None) -> Tensor:
    if dim is None or _tp_size() == 1:
        return shard
    shard = shard.contiguous()
    shards = [torch.empty_like(shard) for _ in range(_tp_size())]
    torch.distributed.all_gather(
        shards, shard, group=parallel_state.get_tensor_model_parallel_group()
    )
    return torch.cat(shards, dim=dim)


def _pad_rows(weight: Tensor, rows: int) -> Tensor:
    """Add the rows of zeros with which Megatron fills a vocabulary up."""
    return torch.cat([weight, weight.new_zeros(max(rows - weight.shape[0], 0), weight.shape[1])])
