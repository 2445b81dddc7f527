from __future__ import annotations

import pytest

from megatron_prores.command_line.arguments import read_prores_flags
from megatron_prores.config.prores_config import ProResConfig
from megatron_prores.errors import UserError


def test_default_is_the_papers_linear_warmup_of_a_thousand_iterations_per_layer() -> None:
    config, device = read_prores_flags([])
    assert config == ProResConfig(schedule="linear")
    assert config.total_warmup(24) == 24000
    assert device == "cuda"


@pytest.mark.parametrize(
    ("argv", "total"),
    [
        (["--prores-warmup-iters", "500"], 500),
        (["--prores-warmup-iters-per-layer", "500"], 6000),
        (["--prores-warmup-iters=7", "--num-layers", "12", "--prores-unknown"], 7),
    ],
)
def test_warmup_is_given_whole_or_per_layer(argv: list[str], total: int) -> None:
    assert read_prores_flags(argv)[0].total_warmup(12) == total


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--prores-schedule", "cosine"], "--prores-schedule cosine"),
        (["--prores-warmup-iters", "-5"], "--prores-warmup-iters -5"),
        (["--prores-warmup-iters", "0"], "--prores-schedule none"),
        (["--prores-warmup-iters", "many"], "invalid int value: 'many'"),
        (["--prores-warmup-iters-per-layer", "-1"], "--prores-warmup-iters-per-layer -1"),
        (["--prores-warmup-iters", "5", "--prores-warmup-iters-per-layer", "1"], "give one"),
        (["--device", "tpu"], "--device tpu"),
    ],
)
def test_wrong_flags_are_named(argv: list[str], words: str) -> None:
    with pytest.raises(UserError) as error:
        read_prores_flags(argv)
    assert words in error.value.message()
    assert "\n" not in error.value.message()
