"""Norm placements: what a layer computes, and the same run on every layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_prores.config.placement import PLACEMENTS
from megatron_prores.convert import hybrid_to_gpt
from tests.distributed.conftest import MODEL, OPTIMIZER, WARMUP, Text, loading, saving
from tests.distributed.launch import Check, Job, check_name, run_checks, run_job, run_ranks
from tests.distributed.test_hybrid import as_hybrid
from tests.distributed.test_layouts import LAYOUTS, PP2, assert_same_curves, assert_same_run

SHOWN_LAYOUTS = (
    "TP2 with sequence parallelism",
    "PP2 with 2 virtual stages",
    "DP2 with the distributed optimizer",
)
OTHERS = [name for name in PLACEMENTS if name != "pre"]


@pytest.fixture(scope="module", params=OTHERS)
def placement_run(
    request: pytest.FixtureRequest, text: Text, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[str], Job]:
    """Flags of a run from a checkpoint with one placement, and that run on one rank."""
    root = tmp_path_factory.mktemp(request.param)
    flags = [*MODEL, *text.flags, *WARMUP, *OPTIMIZER, "--norm-placement", request.param]
    saved = run_job(root / "save", [*flags, *saving(root / "saved")])
    assert saved.succeeded, saved.output[-3000:]
    flags += loading(root / "saved")
    job = run_job(root / "one", flags)
    assert job.succeeded, job.output[-3000:]
    return flags, job


@pytest.mark.parametrize("layout", SHOWN_LAYOUTS)
def test_same_run_on_every_layout(
    layout: str, placement_run: tuple[list[str], Job], tmp_path: Path
) -> None:
    flags, one_rank = placement_run
    ranks, more = LAYOUTS[layout]
    assert_same_run(run_job(tmp_path, [*flags, *more.split()], ranks), one_rank)


HYBRID = {
    "sandwich": ("*-*-*-*-", "TP2 with sequence parallelism"),
    "post": ("*|-*-|*-*|-", "PP2 with 2 virtual stages"),
    "deepnorm": ("*-*|-*-*-", "PP2"),
    "lns": ("*-*-*-*-", "DP2 with the distributed optimizer"),
}
"""Norm placement -> the pattern and layout on which its run goes on as a hybrid model."""

BACK = "sandwich"
"""The placement whose hybrid run becomes a GPT model's again: it has the most norms of ours."""


def test_the_same_run_as_a_hybrid_model_and_back(
    placement_run: tuple[list[str], Job], tmp_path: Path
) -> None:
    flags, one_rank = placement_run
    placement = flags[flags.index("--norm-placement") + 1]
    pattern, layout = HYBRID[placement]
    ranks, more = LAYOUTS[layout]
    more = more.partition(" --num-layers-per-virtual")[0]  # the cuts of the pattern say it
    argv = [*as_hybrid(flags, pattern), *more.split()]
    if placement == BACK:
        argv += ["--save", str(tmp_path / "hybrid"), "--save-interval", "4"]
    assert_same_curves(run_job(tmp_path / "there", argv, ranks), one_rank)
    if placement == BACK:
        words = ["--load", str(tmp_path / "hybrid"), "--output", str(tmp_path / "gpt")]
        tool = run_ranks(tmp_path / "tool", hybrid_to_gpt.main, ([*words, "--ckpt-step", "4"],))
        assert "iter_0000004 as a GPT model of 4 layers" in tool.output
        # argparse takes the last --load.
        argv = [*flags, *loading(tmp_path / "gpt"), *PP2.split()]
        assert_same_curves(run_job(tmp_path / "back", argv, ranks=2), one_rank, first=5)


def test_placements_are_different_models(
    text: Text, tmp_path: Path, on_one_rank: Job, placement_run: tuple[list[str], Job]
) -> None:
    _, job = placement_run
    assert job.scalars("lm loss") != pytest.approx(on_one_rank.scalars("lm loss"), rel=1e-4)


def check_layer_is_its_formula(name: str) -> None:
    """Computes a layer step by step from its own modules, with perturbed norm weights."""
    from tests.distributed import layers

    layers.initialize()
    layer = layers.build_layer(prores=True, norm_placement=name)
    layers.grow(layer)
    with torch.no_grad():
        for index, (parameter_name, parameter) in enumerate(layer.named_parameters()):
            if "norm" in parameter_name:
                parameter.copy_(1.0 + 0.1 * torch.cos((index + 1.0) * torch.arange(layers.HIDDEN)))
    x = layers.hidden_states()
    placement = PLACEMENTS[name]
    d = (2 * 4) ** 0.25 if name == "deepnorm" else 1.0

    def attention(stream: torch.Tensor) -> torch.Tensor:
        return layer.self_attention(stream, attention_mask=layers.causal_mask())[0]

    def mlp(stream: torch.Tensor) -> torch.Tensor:
        return layer.mlp(stream)[0]

    def behind(norm: torch.nn.Module, value: torch.Tensor, here: bool) -> torch.Tensor:
        return norm(value) if here else value

    for a in (0.0, 0.3, 1.0):
        layer.set_alpha(a)
        y = x
        for before, branch, after in (
            (layer.input_layernorm, attention, layer.post_self_attn_layernorm),
            (layer.pre_mlp_layernorm, mlp, layer.post_mlp_layernorm),
        ):
            f = behind(after, branch(before(y)), placement.branch_output_norm)
            y = behind(after, d * y + a * f, placement.post_norm)
        torch.testing.assert_close(layers.run(layer, x), y, rtol=1e-5, atol=1e-5)
        if a == 0.0 and not placement.post_norm:
            assert torch.equal(layers.run(layer, x), x)
        if a == 0.0 and placement.post_norm:
            once = layer.post_self_attn_layernorm(d * x)
            assert torch.equal(layers.run(layer, x), layer.post_mlp_layernorm(d * once))
    names = {n.split(".")[0] for n, _ in layer.named_parameters() if "layernorm" in n}
    assert len(names) == 2 + 2 * placement.branch_output_norm


FORMULAS: list[Check] = [(check_layer_is_its_formula, (name,)) for name in PLACEMENTS]


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return run_checks(tmp_path_factory.mktemp("checks"), FORMULAS)


@pytest.mark.parametrize("name", map(check_name, FORMULAS))
def test_layer_is_its_formula(name: str, failures: dict[str, str]) -> None:
    assert name not in failures, failures[name]


@pytest.mark.parametrize("name", PLACEMENTS)
def test_no_class_of_ours_in_a_plain_model(name: str, text: Text, tmp_path: Path) -> None:
    argv = [*MODEL, *text.flags, "--prores-schedule", "none", "--norm-placement", name]
    job = run_job(tmp_path, [*argv, "--train-iters", "1"], prepare=print_own_classes)
    assert job.succeeded, job.output[-3000:]
    (line,) = [line for line in job.output.splitlines() if line.startswith("own classes:")]
    own = line.removeprefix("own classes:").split()
    assert ("ProResTransformerLayer" in own) == (not PLACEMENTS[name].is_stock)
    assert bool(own) == (not PLACEMENTS[name].is_stock)


def print_own_classes() -> None:
    """Prints which of the model's modules have a class of this project's."""
    from megatron_prores.model import initial_weights as init

    stock = init.finish

    def finish(chunks: list[torch.nn.Module], prores: object) -> None:
        stock(chunks, prores)
        classes = {type(module) for chunk in chunks for module in chunk.modules()}
        own = sorted(c.__name__ for c in classes if c.__module__.startswith("megatron_prores"))
        print("own classes:", " ".join(own))

    init.finish = finish
