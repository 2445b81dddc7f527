"""Initial weights: the paper's, DeepNorm's, and Megatron's own.

Megatron draws every linear weight from normal(0, init_method_std) under its random-number tracker.
Other standard deviations are reached by rescaling what was drawn: the same draws on every layout
that draws the same, right for a shard of a matrix as for the whole, and no second pass of random
numbers (paper, section 4.1 and appendix; DeepNorm: Wang et al., arXiv 2203.00555; DS-Init: Zhang et
al., arXiv 1908.11365, in the form of open_lm).
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from megatron.core.parallel_state import get_tensor_model_parallel_rank
from megatron.core.ssm.mamba_layer import MambaLayer
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_prores.config.placement import PLACEMENTS
from megatron_prores.config.prores_config import ProResConfig
from megatron_prores.errors import Argument, ArgumentError
from megatron_prores.model.hybrid_stack import hybrid_depths
from megatron_prores.model.layer import MAMBA_BRANCHES, TRANSFORMER_BRANCHES
from megatron_prores.model.with_prores import INPUT_NORM_SLOTS
from megatron_prores.schedule.depth import plain_depths

TRUNCATED_AT = 3.0
"""Standard deviations at which a truncated normal ends, as in open_lm; the paper does not say. What
is left has 0.987 of the standard deviation. torch's own bounds are not in standard deviations: they
are -2 and 2, where normal(0, 0.02) never gets to."""

_LAST_LINEAR = re.compile(r"\b(linear_proj|out_proj|linear_fc2|fc2_latent_proj)\.weight\d*$")
"""Names of the weights that Megatron draws by ``output_layer_init_method``: the last linear layer
of a branch or of an expert, and the projection out of a latent space behind it."""


def embedding_std(args: argparse.Namespace) -> float:
    """Return the standard deviation of the embedding: the user's, or the paper's std * sqrt(h).

    An embedding that is the output head as well starts as the head does.
    """
    if args.embedding_init_method_std is not None:
        return float(args.embedding_init_method_std)
    tied = not args.untie_embeddings_and_output_weights
    return float(args.init_method_std) * (1.0 if tied else math.sqrt(args.hidden_size))


def configure(config: TransformerConfig, prores: ProResConfig) -> None:
    """Set what Megatron draws the weights from, in place, before the model is built.

    Upstream's default divides the standard deviation of the attention-output and MLP-down
    projections by sqrt(2L), as GPT-2 did; ``scaled`` keeps that. In a hybrid model upstream takes
    the length of the pattern for 2L.

    Args:
        config: The model's configuration.
        prores: Its ``initialization`` names the scheme.
    """
    if prores.truncated_init:
        std, embedding = config.init_method_std, config.embedding_init_method_std
        branches = config.num_layers * (1.0 if config.is_hybrid_model else 2.0)
        config.init_method = partial(_draw_truncated_normal, std=std)
        config.output_layer_init_method = partial(
            _draw_truncated_normal, std=std / math.sqrt(branches)
        )
        config.embedding_init_method = partial(_draw_truncated_normal, std=embedding)
    if prores.initialization != "scaled":
        config.output_layer_init_method = config.init_method


@torch.no_grad()
def _draw_truncated_normal(weight: Tensor, std: float) -> None:
    """Fill a weight, in place, by draws in float32: bfloat16 is too coarse near the bounds."""
    draws = torch.empty_like(weight, dtype=torch.float32)
    bound = TRUNCATED_AT * std
    weight.copy_(torch.nn.init.trunc_normal_(draws, std=std, a=-bound, b=bound))


@torch.no_grad()
def finish(chunks: list[Any], prores: ProResConfig) -> None:
    """Finish the initial weights of this rank's model chunks, in place, as they were drawn.

    ``lns`` starts the norm weights of layer l at 1 / sqrt(l), ``deepnorm`` scales what Megatron
    drew to DeepNorm's gains, ``ds`` scales the last linear layer of each branch of layer l by
    1 / sqrt(2l). Multi-token prediction layers stay as they were drawn.

    Args:
        chunks: Model chunks just built by Megatron, not wrapped yet.
        prores: Its norm placement and ``initialization`` say what is left to do.

    Raises:
        ArgumentError: The model has a branch that this is not defined for.
    """
    for chunk in chunks:
        hybrid = hybrid_depths(chunk)
        for layer in chunk.decoder.layers:
            depths = hybrid or plain_depths(layer.config.num_layers)
            depth = depths[layer.layer_number - 1]
            if PLACEMENTS[prores.norm_placement].scaled_norms:
                # Megatron's zero-centered norms multiply by 1 + weight.
                offset = 1.0 if layer.config.layernorm_zero_centered_gamma else 0.0
                for weight in _input_norm_weights(layer):
                    weight.fill_(1.0 / math.sqrt(depth) - offset)
            if prores.initialization == "deepnorm":
                _rescale_to_deepnorm(layer, layer.config, depths[-1])
            if prores.initialization == "ds":
                for name, weight in layer.named_parameters():
                    if _LAST_LINEAR.search(name):
                        weight.mul_(1.0 / math.sqrt(2.0 * depth))


def mark_shards(chunks: list[Any]) -> None:
    """Mark the offsets of ``--softmax-type learnable`` as shards, in place; upstream forgets it.

    A rank has those of its heads. Unmarked they pass for copies, of which Megatron counts the first
    rank's alone when it takes the norm of gradients, to clip them, and of parameters.

    Args:
        chunks: Model chunks just built by Megatron, not wrapped yet.
    """
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            if name.endswith(".softmax_offset"):
                parameter.tensor_model_parallel = True
                parameter.partition_dim = 0
                parameter.partition_stride = 1


def _input_norm_weights(layer: Any) -> Iterator[Tensor]:
    """Yield the weights of the norms before the branches, fused into a linear or not."""
    # Of Megatron's own layers as well: without a schedule LayerNorm scaling needs none of ours.
    for parts in MAMBA_BRANCHES if isinstance(layer, MambaLayer) else TRANSFORMER_BRANCHES:
        norm, branch = getattr(layer, parts.input_norm), getattr(layer, parts.module)
        if isinstance(branch, IdentityOp):
            continue  # a layer without it
        fused = (branch, *(getattr(branch, slot, None) for slot in INPUT_NORM_SLOTS))
        places = [(norm, "weight"), *((module, "layer_norm_weight") for module in fused)]
        found = (getattr(module, name, None) for module, name in places)
        weight = next((each for each in found if each is not None), None)
        if weight is None:
            raise ArgumentError(
                Argument("norm_placement", "lns"),
                f": the norm before {type(branch).__name__} was not found",
            )
        yield weight


def _rescale_to_deepnorm(layer: Any, config: TransformerConfig, num_layers: int) -> None:
    """Turn normal(0, init_method_std) draws into DeepNorm's Xavier-normal ones.

    Gain (8L)^(-1/4) for the value, attention-output and MLP projections, 1 for query and key; the
    fan-in and fan-out of a projection are those of its whole matrix, whatever a rank holds of it.
    """
    gain = (8.0 * num_layers) ** -0.25
    hidden, channels = config.hidden_size, config.kv_channels
    query = channels * config.num_attention_heads
    groups = config.num_query_groups or config.num_attention_heads
    key = channels * groups

    def factor(fan_in: int, fan_out: int, gain: float) -> float:
        return gain * math.sqrt(2.0 / (fan_in + fan_out)) / config.init_method_std

    attention = layer.self_attention
    if isinstance(attention, SelfAttention):
        # Rows of the fused projection [q + k + v, h]: per query group its queries, key and value. A
        # tensor-parallel rank holds an even share of the rows in this order; where there are fewer
        # groups than ranks, no whole group.
        of_group = [factor(hidden, query, 1.0)] * (query // groups)
        of_group += [factor(hidden, key, 1.0)] * channels + [factor(hidden, key, gain)] * channels
        qkv = attention.linear_qkv.weight
        shares = len(of_group) * groups // qkv.size(0)
        # Float32, whatever the weights are.
        factors = torch.tensor(of_group * groups, device=qkv.device).chunk(shares)
        qkv.mul_(factors[get_tensor_model_parallel_rank()].unsqueeze(-1))
        attention.linear_proj.weight.mul_(factor(query, hidden, gain))
    elif not isinstance(attention, IdentityOp):
        raise ArgumentError(
            Argument("branch_init", "deepnorm"),
            f": DeepNorm's gains are not defined for {type(attention).__name__}; use ",
            Argument("branch_init", "normal"),
        )
    # Dense: one of each. Experts: linear_fc1.weight of each expert, or weight0, weight1, ...
    for name, weight in layer.mlp.named_parameters():
        if "linear_fc1.weight" in name or "linear_fc2.weight" in name:
            weight.mul_(factor(hidden, _ffn_size(layer, name), gain))


def _ffn_size(layer: Any, name: str) -> int:
    """Return the inner width of the MLP that a parameter of ``layer.mlp`` belongs to."""
    config = layer.config
    if not layer.is_moe_layer:
        return int(config.ffn_hidden_size)
    if name.startswith("shared_experts."):
        return int(config.moe_shared_expert_intermediate_size)
    return int(config.moe_ffn_hidden_size)
