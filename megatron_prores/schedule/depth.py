"""Which layers are one layer of the schedule: l of L for every layer that Megatron builds.

A ``GPTModel`` has L layers, each an attention and an MLP. A ``HybridModel`` makes each of the two a
layer of its own, in a pattern such as ``*-*-``; there one of the L is a block of the pattern.
"""

from __future__ import annotations

import re
from typing import Any

from megatron_prores.errors import Argument, ArgumentError

_MIXING = "*+DGM"
"""Attention, latent attention, sparse attention, gated delta net, Mamba: they mix positions."""

_FEED_FORWARD = "-E"
"""MLP, experts."""

_BLOCK = re.compile(rf"[{_FEED_FORWARD}]*[{_MIXING}]+[{_FEED_FORWARD}]+")

type Depths = tuple[int, ...]
"""l of the layers that Megatron numbers 1, 2, ..., from 1 to L without a gap."""


def pattern_depths(pattern: str) -> Depths:
    """Return l of every layer of a hybrid pattern.

    A block is a mixing layer and the feed-forward layer behind it. Neighbours of the same kind
    belong to one block (``M*-`` and ``*--`` are one each), feed-forward layers before the first
    block to that one, mixing layers behind the last to the last. A pattern without any such pair
    (``MM*M``) has a block per layer.

    Args:
        pattern: As ``--hybrid-layer-pattern`` takes it; ``|`` cuts no block, and prediction layers
            (behind ``/``) are not among the L.

    Raises:
        ArgumentError: The pattern has no layer, or one of an unknown kind.
    """
    layers = main_layers(pattern)
    unknown = [layer for layer in layers if layer not in _MIXING + _FEED_FORWARD]
    if unknown or not layers:
        problem = f"{unknown[0]!r} is no kind of layer" if unknown else "it has no layer"
        kinds = ", ".join((*_MIXING, *_FEED_FORWARD))
        raise ArgumentError(
            Argument("hybrid_layer_pattern", pattern), f": {problem}; the kinds are {kinds}"
        )
    blocks = _BLOCK.findall(layers)
    if not blocks:
        return plain_depths(len(layers))
    depths = [depth for depth, block in enumerate(blocks, start=1) for _ in block]
    return (*depths, *[len(blocks)] * (len(layers) - len(depths)))


def main_layers(pattern: str) -> str:
    """Return the layers of a pattern without its cuts and its prediction layers."""
    return pattern.partition("/")[0].replace("|", "")


def is_gpt_pattern(pattern: str) -> bool:
    """Return whether a hybrid model is a GPT model: attention and MLP in turn, or experts."""
    return re.fullmatch(r"(\*-)+|(\*E)+", main_layers(pattern)) is not None


def plain_depths(num_layers: int) -> Depths:
    """Return l of every layer of a model whose layers are the L."""
    return tuple(range(1, num_layers + 1))


def depths_of(args: Any) -> Depths:
    """Return l of every layer of the model that Megatron's arguments describe.

    Args:
        args: Parsed, validated, or of a checkpoint.
    """
    pattern = getattr(args, "hybrid_layer_pattern", None)
    return plain_depths(args.num_layers) if pattern is None else pattern_depths(pattern)


def total_depth(args: Any) -> int | None:
    """Return L of the model that Megatron's arguments describe; None where they do not say.

    It is what the schedule, DeepNorm's gains and a checkpoint's settings count. Megatron's own
    ``num_layers`` is the length of the pattern.
    """
    if getattr(args, "hybrid_layer_pattern", None) is None:
        return args.num_layers
    return depths_of(args)[-1]
