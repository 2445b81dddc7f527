"""l of L for every layer of a hybrid pattern."""

from __future__ import annotations

import random
from argparse import Namespace
from itertools import pairwise

import pytest

from megatron_prores.errors import ArgumentError
from megatron_prores.schedule.depth import depths_of, pattern_depths, plain_depths, total_depth

MIXING, FEED_FORWARD = "*+DGM", "-E"

PATTERNS = {
    "*-": (1, 1),
    "*-*-*-": (1, 1, 2, 2, 3, 3),
    "ME*EGE": (1, 1, 2, 2, 3, 3),
    # Neighbours of the same kind are one block.
    "MM*-M-": (1, 1, 1, 1, 2, 2),
    "*--ME": (1, 1, 1, 2, 2),
    # What stands before the first block and behind the last belongs to it.
    "-*-*-": (1, 1, 1, 2, 2),
    "*-*-MM": (1, 1, 2, 2, 2, 2),
    # No pair at all: each layer for itself.
    "MM*M": (1, 2, 3, 4),
    "--": (1, 2),
    "-*": (1, 2),
    # Cuts of the pipeline, also within a block, and prediction layers.
    "*-|*-": (1, 1, 2, 2),
    "*|-*|-": (1, 1, 2, 2),
    "|*-||*-|": (1, 1, 2, 2),
    "*-*-/*-/*-": (1, 1, 2, 2),
    "D-+E/M": (1, 1, 2, 2),
}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_block_is_a_mixing_layer_and_the_feed_forward_behind_it(pattern: str) -> None:
    assert pattern_depths(pattern) == PATTERNS[pattern]


@pytest.mark.parametrize("num_layers", [1, 2, 3, 12, 120])
@pytest.mark.parametrize("pair", [m + f for m in MIXING for f in FEED_FORWARD])
def test_pairs_are_the_layers_of_a_gpt_model(pair: str, num_layers: int) -> None:
    depths = pattern_depths(pair * num_layers)
    assert depths[::2] == depths[1::2] == plain_depths(num_layers)


def test_any_pattern() -> None:
    draw = random.Random(16)
    for _ in range(300):
        layers = "".join(draw.choices(MIXING + FEED_FORWARD, k=draw.randint(1, 20)))
        depths = pattern_depths(layers)
        # One l for each layer, from 1 to L without a gap.
        assert len(depths) == len(layers)
        assert depths[0] == 1
        assert all(after - before in (0, 1) for before, after in pairwise(depths))
        pairs = sum(a in MIXING and b in FEED_FORWARD for a, b in pairwise(layers))
        assert depths[-1] == (pairs or len(layers))
        # A block begins at a mixing layer behind a feed-forward layer, and nowhere else.
        for (before, after), pair in zip(pairwise(depths), pairwise(layers), strict=True):
            begins = pair[0] in FEED_FORWARD and pair[1] in MIXING
            assert not pairs or after == before or begins
        # Neither cuts of the pipeline nor prediction layers change it.
        cut = "".join(draw.choice(("", "|")) + layer for layer in layers)
        assert pattern_depths(f"{cut}/*-") == depths


@pytest.mark.parametrize("pattern", ["", "|", "/*-", "*-x", "*- *-", "m-"])
def test_a_pattern_that_is_none(pattern: str) -> None:
    with pytest.raises(ArgumentError, match="hybrid_layer_pattern"):
        pattern_depths(pattern)


def test_l_of_a_model_is_not_the_length_of_its_pattern() -> None:
    hybrid = Namespace(num_layers=8, hybrid_layer_pattern="*-|*-|*-|*-")
    assert total_depth(hybrid) == 4
    assert depths_of(hybrid) == (1, 1, 2, 2, 3, 3, 4, 4)
    # Before Megatron has validated them, and in a checkpoint that is older than the flag.
    assert total_depth(Namespace(num_layers=None, hybrid_layer_pattern="*-")) == 1
    assert total_depth(Namespace(num_layers=3)) == 3
    assert depths_of(Namespace(num_layers=2)) == (
        1,
        2,
    )
    assert total_depth(Namespace(num_layers=None, hybrid_layer_pattern=None)) is None
