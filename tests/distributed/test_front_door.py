"""ProRes from its public names, in other people's programs: the losses of the main program."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.distributed.conftest import MODEL
from tests.distributed.launch import Job, run_job, run_ranks

HERE = Path(__file__).parent
STOPPED, LAST = 5, 10
WARMUP = 48

# No weight decay: the main program spares the embedding from it, and a stranger need not know.
DATA = [
    *"--mock-data --tokenizer-type NullTokenizer --vocab-size 127 --num-workers 0".split(),
    *"--attention-backend unfused --weight-decay 0 --eval-interval 4 --eval-iters 1".split(),
]
MAIN = [
    *(*MODEL, *DATA),
    *"--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2".split(),
    *("--prores-warmup-iters", str(WARMUP), "--train-iters", str(LAST)),
]

# What Megatron draws for those flags: 10 batches to train, 3 to validate (after iterations 4, 8 and
# the last), 1 to test.
SAMPLES = ("--samples", "80", "24", "8")


@pytest.fixture(scope="module")
def main_program(tmp_path_factory: pytest.TempPathFactory) -> Job:
    job = run_job(tmp_path_factory.mktemp("main"), MAIN, ranks=4)
    assert job.succeeded, job.output[-3000:]
    assert len(job.scalars("lm loss")) == LAST
    return job


def same_losses(job: Job, main_program: Job, trained: range, evaluated: tuple[int, ...]) -> None:
    for tag, steps in (("lm loss", trained), ("lm loss validation", evaluated)):
        expected = {step: loss for step, loss in main_program.scalars(tag).items() if step in steps}
        assert expected.keys() == set(steps)
        # The same numbers in float32, summed up in another order over micro-batches and tokens.
        assert job.scalars(tag) == pytest.approx(expected, rel=1e-6), tag


def write_from_a_fork() -> None:
    """Spares each rank the new Python that Megatron starts for its first save."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    filesystem_async.get_write_results_queue("fork")


def run_core(directory: Path, last: int, warmup: int = WARMUP, *more: str) -> Job:
    argv = ["--warmup-iters", str(warmup), "--last-iteration", str(last), *SAMPLES, *more]
    program = HERE / "stranger_core.py"
    return run_job(directory, argv, ranks=4, program=program, prepare=write_from_a_fork)


def test_a_program_on_megatron_core_alone(main_program: Job, tmp_path: Path) -> None:
    saved = str(tmp_path / "saved")
    first = run_core(tmp_path / "first", STOPPED, WARMUP, "--save", saved)
    assert first.succeeded, first.output[-3000:]
    same_losses(first, main_program, range(1, STOPPED + 1), (4,))
    second = run_core(tmp_path / "second", LAST, WARMUP, "--load", saved)
    assert second.succeeded, second.output[-3000:]
    same_losses(second, main_program, range(STOPPED + 1, LAST + 1), (8,))
    other = run_core(tmp_path / "other", LAST, 24, "--load", saved)
    assert not other.succeeded
    assert "other ProRes settings: warmup_iters 48 there, 24 here" in other.output


# What a stranger's own command line has to say on the CPU device.
ON_THE_CPU = """
    --transformer-impl local --distributed-backend gloo --disable-jit-fuser --no-persist-layer-norm
    --no-gradient-accumulation-fusion --no-masked-softmax-fusion --no-bias-swiglu-fusion
    --no-bias-gelu-fusion --no-rope-fusion
""".split()


def compile_nothing() -> None:
    """Stands for a checkout of Megatron: its wheel has no Makefile to compile its helper with."""
    from megatron_prores.upstream.datasets import use_prebuilt_dataset_helpers

    use_prebuilt_dataset_helpers()


def test_a_program_on_megatrons_training_loop(tmp_path: Path) -> None:
    common = [
        *(flag for flag in MODEL if flag not in ("--device", "cpu")),
        *DATA,
        *"--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2".split(),
        *("--train-iters", str(LAST)),
    ]
    ours = ["--device", "cpu", "--norm-placement", "sandwich", "--prores-warmup-iters", str(WARMUP)]
    main_program = run_job(tmp_path / "main", [*common, *ours], ranks=2)
    assert main_program.succeeded, main_program.output[-3000:]
    # The paper's embedding: 0.02 times the root of the hidden size.
    theirs = [*ON_THE_CPU, "--embedding-init-method-std", "0.16"]
    job = run_job(
        tmp_path / "theirs",
        [*common, *theirs],
        ranks=2,
        program=HERE / "stranger_pretrain.py",
        prepare=compile_nothing,
    )
    assert job.succeeded, job.output[-3000:]
    assert len(job.scalars("lm loss")) == LAST
    same_losses(job, main_program, range(1, LAST + 1), (4, 8, LAST))


def check_nothing_is_changed() -> None:
    """Uses every name; then all functions, classes and variables are what they were."""
    import os
    import sys

    import torch
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.spec_utils import build_module

    import megatron_prores as prores
    from megatron_prores.upstream import registry
    from tests.distributed import layers

    def functions() -> dict[str, int]:
        """Lists what could be replaced: in modules, and in their classes."""
        places = {
            name: vars(module)
            for name, module in list(sys.modules.items())
            if name.partition(".")[0] in ("megatron", "torch") and module is not None
        }
        for name, content in list(places.items()):
            for key, value in list(content.items()):
                if isinstance(value, type) and value.__module__ == name:
                    places[f"{name}.{key}"] = vars(value)
        return {
            f"{place}.{key}": id(value)
            for place, content in places.items()
            for key, value in list(content.items())
            if callable(value) or isinstance(value, staticmethod | classmethod | property)
        }

    layers.initialize()
    for name in prores.__all__:
        getattr(prores, name)
    config = layers.transformer_config()
    stock = get_gpt_layer_local_spec(normalization="RMSNorm")
    layers.run(build_module(stock, config=config, layer_number=1), layers.hidden_states())
    before, environment = functions(), dict(os.environ)
    replaced = registry.listed()

    settings = prores.ProResConfig(schedule="linear", warmup_iters=8, norm_placement="lns")
    spec = prores.with_prores(stock, "lns")
    chunk = torch.nn.Module()
    chunk.decoder = torch.nn.Module()
    chunk.decoder.layers = torch.nn.ModuleList(
        build_module(spec, config=config, layer_number=number) for number in range(1, 5)
    )
    prores.initialize_weights([chunk], settings)
    assert chunk.decoder.layers[3].input_layernorm.weight[0] == 0.5
    warmup = prores.ResidualWarmup(settings, 4, [chunk])
    warmup.set_step(2)
    assert "never" not in prores.audit(warmup, 2)
    with pytest.raises(prores.AuditError, match=r"alpha of layer 1 is 1, not 0"):
        prores.audit(warmup, 0)
    layers.run(chunk.decoder.layers[3], layers.hidden_states())
    prores.check_settings(settings.settings(4), settings.settings(4))

    after = functions()
    assert {name for name in before if after.get(name) != before[name]} == set()
    assert dict(os.environ) == environment
    assert registry.listed() == replaced
    # Builders in it compare by identity.
    assert repr(get_gpt_layer_local_spec(normalization="RMSNorm")) == repr(stock)


def check_any_spec() -> None:
    """The layers are exchanged in whatever Megatron's functions return, which stays as it was."""
    import dataclasses
    import json

    from megatron.core.models.gpt import gpt_layer_specs as upstream
    from megatron.core.models.gpt.heterogeneous.heterogeneous_layer_specs import (
        get_gpt_heterogeneous_layer_spec,
    )
    from megatron.core.transformer.heterogeneous.heterogeneous_config import (
        HeterogeneousTransformerConfig,
    )
    from megatron.core.transformer.identity_op import IdentityOp
    from megatron.core.transformer.mlp import MLP
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.torch_norm import WrappedTorchNorm
    from megatron.core.transformer.transformer_block import TransformerBlock

    import megatron_prores as prores
    from megatron_prores.model.layer import ProResTransformerLayer
    from tests.distributed import layers

    layers.initialize()
    moe = layers.transformer_config(num_moe_experts=2, moe_ffn_hidden_size=32, moe_layer_freq=2)
    absent = {"no_op": True, "num_query_groups": None}
    block = {"attention": absent, "mlp": {"ffn_hidden_size": 64}}
    config = layers.transformer_config()
    mixed = HeterogeneousTransformerConfig(
        **{
            name: getattr(config, name)
            for name in ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads")
        },
        normalization="RMSNorm",
        heterogeneous_layers_config_encoded_json=json.dumps({"block_configs": [block] * 4}),
    )
    dense = upstream.get_gpt_layer_local_spec(normalization="RMSNorm")
    moe_block = upstream.get_gpt_decoder_block_spec(moe, False, normalization="RMSNorm")
    specs = {
        "dense": dense,
        "by its path": dataclasses.replace(
            dense, module=("megatron.core.transformer.transformer_layer", "TransformerLayer")
        ),
        "experts": moe_block,
        "block": ModuleSpec(module=TransformerBlock, submodules=moe_block),
        "heterogeneous": get_gpt_heterogeneous_layer_spec(mixed),
    }
    for name, spec in specs.items():
        before = repr(spec)
        for placement in prores.PLACEMENTS:
            placed = prores.with_prores(spec, placement)
            assert type(placed) is type(spec)
            inner = placed.submodules if name == "block" else placed
            for layer in getattr(inner, "layer_specs", [inner]):
                parts = layer.submodules
                assert layer.module is ProResTransformerLayer, name
                has_norm = prores.PLACEMENTS[placement].norm_input
                assert (parts.pre_mlp_layernorm is WrappedTorchNorm) == has_norm, name
                behind = IdentityOp if prores.PLACEMENTS[placement].is_stock else WrappedTorchNorm
                assert parts.post_mlp_layernorm is behind, name
                # Without attention there is nothing to norm.
                without = name == "heterogeneous"
                assert parts.post_self_attn_layernorm is (IdentityOp if without else behind), name
        assert repr(spec) == before, name

    wrong = {
        r"^norm_placement='foo': no such placement": (dense, "foo"),
        r"^spec: must be a ModuleSpec or TransformerBlockSubmodules .* not dict": ({}, "pre"),
        r"^spec: .* layer class MLP,": (dataclasses.replace(dense, module=MLP), "pre"),
        r"^spec: .* layer class ProResTransformerLayer": (prores.with_prores(dense), "pre"),
        r"^spec: a layer without any norm": (
            dataclasses.replace(
                dense,
                submodules=dataclasses.replace(
                    dense.submodules, input_layernorm=IdentityOp, pre_mlp_layernorm=IdentityOp
                ),
            ),
            "post",
        ),
    }
    for words, (spec, placement) in wrong.items():
        with pytest.raises(ValueError, match=words):
            prores.with_prores(spec, placement)


@pytest.mark.parametrize("check", [check_nothing_is_changed, check_any_spec])
def test_on_one_rank(check: Callable[[], None], tmp_path: Path) -> None:
    job = run_ranks(tmp_path, check)
    assert job.succeeded, job.output[-3000:]
