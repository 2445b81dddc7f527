"""The paper's training recipe is the default, whatever the schedule; Megatron's own is at hand."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron_prores.config.placement import PLACEMENTS
from tests.distributed import golden_ranks
from tests.distributed.conftest import MODEL, Text
from tests.distributed.launch import Check, check_name, run_checks, run_job, run_ranks
from tests.distributed.test_shards import MOCK
from tests.distributed.test_stock import STOCK, scalars

MEGATRONS_RECIPE = """
    --branch-init scaled --embedding-init-method-std 0.02 --embedding-weight-decay
""".split()


def print_weight_decay() -> None:
    """Prints for each parameter the factor on its weight decay."""
    from megatron.training import training

    stock = training.get_megatron_optimizer

    def get_megatron_optimizer(config: Any, chunks: list[Any], **kwargs: Any) -> Any:
        optimizer = stock(config, chunks, **kwargs)
        names = {id(p): name for chunk in chunks for name, p in chunk.named_parameters()}
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                print("decay", names[id(parameter)], group["wd_mult"])
        return optimizer

    training.get_megatron_optimizer = get_megatron_optimizer


@pytest.mark.parametrize(
    ("flags", "spared"),
    [
        ([], {"norm", "bias", "word_embeddings"}),
        (["--prores-schedule", "none"], {"norm", "bias", "word_embeddings"}),
        (["--embedding-weight-decay"], {"norm", "bias"}),
    ],
    ids=["ProRes", "no ProRes", "asked for"],
)
def test_weight_decay_spares_embeddings_norms_and_biases(
    flags: list[str], spared: set[str], text: Text, tmp_path: Path
) -> None:
    model = [flag for flag in MODEL if flag != "--disable-bias-linear"]
    job = run_job(
        tmp_path, [*model, *text.flags, *flags, "--train-iters", "1"], prepare=print_weight_decay
    )
    assert job.succeeded, job.output[-3000:]
    lines = [line.split() for line in job.output.splitlines() if line.startswith("decay ")]
    factors = {name: float(factor) for _, name, factor in lines}
    assert any(factor == 1.0 for factor in factors.values())
    for name, factor in factors.items():
        assert factor == (0.0 if any(kind in name for kind in spared) else 1.0), name
    assert {kind for kind in spared if any(kind in name for name in factors)} == spared


def test_megatrons_recipe_is_stock_megatron_from_the_start(text: Text, tmp_path: Path) -> None:
    argv = [*MODEL, *text.flags, "--train-iters", "4", "--prores-schedule", "none"]
    stock = run_job(tmp_path / "stock", argv, program=STOCK)
    same = run_job(tmp_path / "same", [*argv, *MEGATRONS_RECIPE])
    assert scalars(same) == scalars(stock)
    other = run_job(tmp_path / "other", argv)
    assert scalars(other) != scalars(stock)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_every_schedule_starts_from_the_same_weights(
    placement: str, text: Text, tmp_path: Path
) -> None:
    argv = [*MODEL, *text.flags, "--train-iters", "1", "--norm-placement", placement]
    weights = []
    for schedule in ("none", "linear"):
        directory = tmp_path / schedule
        job = run_ranks(
            directory,
            golden_ranks.write_initial_statistics,
            ([*argv, "--prores-schedule", schedule], 512, str(directory)),
        )
        assert job.succeeded, job.output[-3000:]
        with np.load(directory / "weights.npz") as arrays:
            weights.append(dict(arrays))
    none, linear = weights
    assert none.keys() == linear.keys()
    assert all(np.array_equal(none[name], linear[name]) for name in none)


LAYOUTS = {
    "one rank": (1, ""),
    "tensor, pipeline and virtual stages": (
        4,
        "--tensor-model-parallel-size 2 --sequence-parallel --pipeline-model-parallel-size 2 "
        "--num-layers-per-virtual-pipeline-stage 1 --bf16",
    ),
    "experts": (
        2,
        "--num-experts 2 --expert-model-parallel-size 2 --moe-token-dispatcher-type allgather "
        "--moe-layer-freq ([0]+[1]*3) --moe-shared-expert-intermediate-size 48 --mtp-num-layers 1",
    ),
}
LAST_LINEAR = ("linear_proj.weight", "linear_fc2.weight")


def compare_initial_weights(argv: list[str]) -> None:
    """Builds the model with each scheme, from the same seed, and compares it with the first."""
    import torch
    from megatron.core.utils import unwrap_model
    from megatron.training.initialize import _set_random_seed

    args, prores = golden_ranks.start(argv)

    def weights(**settings: Any) -> dict[str, tuple[int, Any]]:
        """Name -> number of the layer in the decoder, or 0, and the weight."""
        _set_random_seed(args.seed)
        chunks = golden_ranks.build_chunks(args, dataclasses.replace(prores, **settings))
        found = {}
        for number, chunk in enumerate(unwrap_model(chunks)):
            layers = {id(p): x.layer_number for x in chunk.decoder.layers for p in x.parameters()}
            for name, weight in chunk.named_parameters():
                found[f"{number} {name}"] = layers.get(id(weight), 0), weight.detach().float()
        return found

    truncated, normal = weights(), weights(truncated_init=False)
    ds = weights(truncated_init=False, branch_init="ds")
    rounding = 2**-8 if args.bf16 else 1e-6
    seen = set()
    for name, (layer, weight) in normal.items():
        factor = 1.0
        if layer and name.endswith(LAST_LINEAR):
            factor = (2 * layer) ** -0.5
            seen.add(layer)
        torch.testing.assert_close(ds[name][1], factor * weight, rtol=rounding, atol=0)
    assert seen == {layer for layer, _ in normal.values() if layer}

    sigma = args.init_method_std
    scaled = weights(branch_init="scaled")
    for name, (layer, weight) in truncated.items():
        if weight.numel() < 64 * 32:
            continue  # too few to tell a standard deviation by
        for drawn, deviation in (
            (weight, args.embedding_init_method_std if "word_emb" in name else sigma),
            (scaled[name][1], sigma / math.sqrt(8) if name.endswith(LAST_LINEAR) else None),
        ):
            if deviation is not None:
                assert drawn.abs().max() <= 3 * deviation * (1 + rounding), name
                # The normal distribution between -3 and 3; that of 64 x 32 draws is off by 1.6%.
                assert drawn.std().item() == pytest.approx(0.98658 * deviation, rel=0.08), name
        if layer and name.endswith("linear_fc1.weight"):
            assert normal[name][1].abs().max() > 3 * sigma  # as 0.27% of a plain normal are


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ds_init_and_truncated_weights_on_every_layout(layout: str, tmp_path: Path) -> None:
    ranks, flags = LAYOUTS[layout]
    argv = [*MODEL, *MOCK, *flags.split(), "--train-iters", "1", "--init-method-truncated-normal"]
    job = run_ranks(tmp_path, compare_initial_weights, (argv,), ranks)
    assert job.succeeded, job.output[-3000:]


def check_shared_experts_have_their_own_gain() -> None:
    """DeepNorm's gains are Xavier's: they depend on the width of the expert."""
    import torch

    from megatron_prores.config.prores_config import ProResConfig
    from megatron_prores.model.initial_weights import finish
    from tests.distributed import layers

    layers.initialize()
    widths = {"experts": 32, "shared_experts": 48}
    layer = layers.build_layer(
        prores=True,
        experts=2,
        norm_placement="deepnorm",
        moe_shared_expert_intermediate_size=widths["shared_experts"],
    )
    before = {name: weight.clone() for name, weight in layer.mlp.named_parameters()}
    finish(
        [SimpleNamespace(decoder=SimpleNamespace(layers=[layer]))],
        ProResConfig(norm_placement="deepnorm"),
    )
    rescaled = 0
    for name, weight in layer.mlp.named_parameters():
        if "linear_fc" not in name:
            assert torch.equal(weight, before[name])
            continue
        width = widths[name.split(".")[0]]
        deviation = (8 * 4) ** -0.25 * math.sqrt(2 / (layers.HIDDEN + width))
        torch.testing.assert_close(weight / before[name], torch.full_like(weight, deviation / 0.02))
        rescaled += 1
    assert rescaled == 2 * 2 + 2


def check_zero_centered_norms_start_below_zero() -> None:
    """With --apply-layernorm-1p a norm multiplies by 1 + weight."""
    import torch

    from megatron_prores.config.prores_config import ProResConfig
    from megatron_prores.model.initial_weights import finish
    from tests.distributed import layers

    layers.initialize()
    for zero_centered in (False, True):
        layer = layers.build_layer(prores=True, norm_placement="lns", layer_number=4)
        # The local norms cannot do it themselves.
        layer.config.layernorm_zero_centered_gamma = zero_centered
        chunk = SimpleNamespace(decoder=SimpleNamespace(layers=[layer]))
        finish([chunk], ProResConfig(norm_placement="lns"))
        for norm in (layer.input_layernorm, layer.pre_mlp_layernorm):
            expected = torch.full_like(norm.weight, 0.5 - zero_centered)
            assert torch.equal(norm.weight, expected)


CHECKS: list[Check] = [
    (check_shared_experts_have_their_own_gain, ()),
    (check_zero_centered_norms_start_below_zero, ()),
]


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return run_checks(tmp_path_factory.mktemp("checks"), CHECKS)


@pytest.mark.parametrize("name", map(check_name, CHECKS))
def test_initial_weights(name: str, failures: dict[str, str]) -> None:
    assert name not in failures, failures[name]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ("without --disable-bias-linear", "self_attention.linear_proj.bias"),
        ("without --swiglu", "its MLP has no gate"),
        ("--qk-layernorm", "self_attention.q_layernorm.weight"),
        ("--position-embedding-type learned_absolute", "embedding.position_embeddings.weight"),
        ("--mtp-num-layers 1", "mtp.layers.0"),
    ],
)
def test_llama_names_lose_no_weight(
    change: str, complaint: str, text: Text, tmp_path: Path
) -> None:
    """A parameter that has no Llama name is an error, and not left out."""
    argv = [*MODEL, *text.flags, "--train-iters", "1"]
    if change.startswith("without "):
        argv.remove(change.removeprefix("without "))
    else:
        argv += change.split()
    job = run_ranks(tmp_path, golden_ranks.write_initial_statistics, (argv, 512, str(tmp_path)))
    assert not job.succeeded
    assert "ValueError: no Llama names" in job.output
    assert complaint in job.output
