"""Equal to the authors' model: logits, losses, gradients, training runs and initial weights.

All sizes are read from the data (see tests/golden/README.md), which may be another directory's.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from megatron_prores.config.placement import PLACEMENTS
from tests import golden
from tests.distributed import fused_backend, golden_ranks
from tests.distributed.launch import Job, run_job, run_ranks

META = golden.load_json("meta.json")
TRAIN = golden.load_json("train.json")
INIT = golden.load_json("init_stats.json")

WITH_PRORES = [*filter(golden.has_prores, META["cases"])]
LAYOUTS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "one rank": ([*META["cases"]], {}),
    "TP2 with sequence parallelism": (
        WITH_PRORES,
        {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    ),
    "PP2": (WITH_PRORES, {"pipeline_model_parallel_size": 2}),
    "hybrid": ([*META["cases"]], {"hybrid_layer_pattern": "*-" * META["num_layers"]}),
}
"""Name -> the cases that are computed on a layout, and the layout."""


@pytest.fixture(scope="module")
def forward(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Computes all cases of a layout in one launch, for the first test that asks for it."""
    made: dict[str, Path] = {}

    def run(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("forward")
            cases, layout = LAYOUTS[name]
            args = (cases, layout, str(made[name]))
            ranks = 2 if any(size == 2 for size in layout.values()) else 1
            job = run_ranks(made[name], golden_ranks.run_forward_cases, args, ranks)
            (made[name] / "output").write_text("" if job.succeeded else job.output)
        assert not (output := (made[name] / "output").read_text()), output[-3000:]
        return made[name]

    return run


def load(directory: Path) -> dict[str, NDArray[Any]]:
    """Reads logits, loss, and each gradient as 'gradient <Llama name>', from all stages."""
    results: dict[str, NDArray[Any]] = {}
    for stage in sorted(directory.glob("stage*.npz")):
        with np.load(stage) as arrays:
            results |= dict(arrays)
    return results


def assert_golden(case: str, results: dict[str, NDArray[Any]]) -> None:
    expected = golden.load_arrays(f"forward_{case}.npz")["logits"]
    scale = np.abs(expected).max()
    assert np.abs(results["logits"] - expected).max() <= 1e-5 * scale
    figures = META["cases"][case]
    assert results["loss"] == pytest.approx(figures["loss"], abs=1e-6)
    norms = {
        name.removeprefix("gradient "): float(np.linalg.norm(gradient.astype(np.float64)))
        for name, gradient in results.items()
        if name.startswith("gradient ")
    }
    assert norms.keys() == figures["grad_l2"].keys()
    assert norms == pytest.approx(figures["grad_l2"], rel=1e-4, abs=1e-9)


@pytest.mark.parametrize(
    ("case", "layout"),
    [(case, layout) for layout, (cases, _) in LAYOUTS.items() for case in cases],
    ids=lambda value: value,
)
def test_logits_loss_and_gradients(case: str, layout: str, forward: Callable[[str], Path]) -> None:
    if "TP2" in layout and META["num_attention_heads"] % 2:
        pytest.skip("an odd number of heads cannot be cut over two tensor-parallel ranks")
    if layout == "PP2" and META["num_layers"] % 2:
        pytest.skip("an odd number of layers cannot be cut over two pipeline stages")
    assert_golden(case, load(forward(layout) / case))


@pytest.fixture(scope="module")
def fused(tmp_path_factory: pytest.TempPathFactory) -> Job:
    directory = tmp_path_factory.mktemp("fused")
    args = ([*META["cases"]], str(directory))
    return run_ranks(directory, fused_backend.run_forward_cases, args)


@pytest.mark.parametrize("case", META["cases"])
def test_a_backend_that_fuses_norm_and_linear(case: str, fused: Job) -> None:
    assert fused.succeeded, fused.output[-3000:]
    assert_golden(case, load(fused.directory / case))
    placement = PLACEMENTS[golden.placement(case)]
    behind = "IdentityOp" if placement.is_stock else "RMSNorm"
    linear = "NormThenLinear" if placement.norm_input else "ColumnParallelLinear"
    (output,) = re.findall(
        rf"^case {case}$(.*?)(?=^case |\Z)", fused.output, re.DOTALL | re.MULTILINE
    )
    layers = [line.split()[1:] for line in output.splitlines() if line.startswith("modules")]
    assert len(layers) == META["num_layers"]
    for layer in layers:
        assert layer == [
            "input_layernorm=IdentityOp",
            f"linear_qkv={linear}",
            f"post_self_attn_layernorm={behind}",
            "pre_mlp_layernorm=IdentityOp",
            f"linear_fc1={linear}",
            f"post_mlp_layernorm={behind}",
        ]


@pytest.fixture(scope="module")
def folded(tmp_path_factory: pytest.TempPathFactory) -> Job:
    directory = tmp_path_factory.mktemp("folded")
    args = (WITH_PRORES, {}, str(directory), True)
    return run_ranks(directory, golden_ranks.run_forward_cases, args)


@pytest.mark.parametrize("case", WITH_PRORES)
def test_alphas_folded_into_the_weights_are_the_same_model(case: str, folded: Job) -> None:
    assert folded.succeeded, folded.output[-3000:]
    results = load(folded.directory / case)
    expected = golden.load_arrays(f"forward_{case}.npz")["logits"]
    assert np.abs(results["logits"] - expected).max() <= 1e-5 * np.abs(expected).max()
    assert results["loss"] == pytest.approx(META["cases"][case]["loss"], abs=1e-6)


def test_swapped_norms_are_seen(tmp_path: Path) -> None:
    job = run_ranks(tmp_path, run_with_swapped_norms, ("sandwich_prores", {}, str(tmp_path)))
    assert job.succeeded, job.output[-3000:]
    with pytest.raises(AssertionError):
        assert_golden("sandwich_prores", load(tmp_path))


def run_with_swapped_norms(case: str, layout: dict[str, Any], directory: str) -> None:
    """Plants a fault: the norms behind the two branches change places."""
    from megatron_prores.model.layer import ProResLayerMixin

    stock = ProResLayerMixin.__init__

    def swapped(layer: Any, *args: Any, **kwargs: Any) -> None:
        stock(layer, *args, **kwargs)
        attention, mlp = layer.self_attn_bda, layer.mlp_bda
        layer.self_attn_bda = partial(attention.func, attention.args[0], mlp.args[1])
        layer.mlp_bda = partial(mlp.func, mlp.args[0], attention.args[1])

    ProResLayerMixin.__init__ = swapped  # type: ignore[method-assign]
    golden_ranks.run_forward_case(case, layout, directory)


@pytest.mark.parametrize("case", TRAIN)
def test_training_run_through_megatrons_loop(case: str, tmp_path: Path) -> None:
    adam = META["adam"]
    key_rows = golden.parameters("train", case)["model.layers.0.self_attn.k_proj.weight"].shape[0]
    channels = META["hidden_size"] // META["num_attention_heads"]
    argv = f"""
        --device cpu --num-layers {META["num_layers"]} --hidden-size {META["hidden_size"]}
        --ffn-hidden-size {META["ffn_hidden_size"]}
        --num-attention-heads {META["num_attention_heads"]}
        --group-query-attention --num-query-groups {key_rows // channels}
        --seq-length {META["seq_length"]} --max-position-embeddings {META["seq_length"]}
        --micro-batch-size {META["batch"]} --global-batch-size {META["batch"]}
        --train-iters {META["train_steps"]} --norm-epsilon {META["rms_norm_eps"]}
        --normalization RMSNorm --swiglu --disable-bias-linear --position-embedding-type rope
        --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0
        --lr {adam["lr"]} --lr-decay-style constant --weight-decay {adam["weight_decay"]}
        --adam-beta1 {adam["betas"][0]} --adam-beta2 {adam["betas"][1]} --adam-eps {adam["eps"]}
        --clip-grad {adam["clip_grad"]} --log-interval 1
        --eval-interval 100 --eval-iters 0 --num-workers 0
        --tokenizer-type NullTokenizer --vocab-size {META["vocab_size"]}
        --make-vocab-size-divisible-by 1 --mock-data --no-create-attention-mask-in-dataloader
        --norm-placement {golden.placement(case)}
        --prores-schedule {"linear" if golden.has_prores(case) else "none"}
        --prores-warmup-iters {META["prores_warmup_steps_total"]}
    """.split()
    job = run_job(tmp_path, argv, prepare=partial(golden_ranks.start_from_golden_weights, case))
    assert job.succeeded, job.output[-3000:]
    figures = TRAIN[case]
    losses, norms = job.scalars("lm loss"), job.scalars("grad-norm")
    assert list(losses) == list(range(1, META["train_steps"] + 1))
    assert list(losses.values()) == pytest.approx(figures["loss"], abs=2e-4)
    assert list(norms.values()) == pytest.approx(figures["grad_norm"], rel=1e-2)
    if golden.has_prores(case):
        held = job.alphas_by_step()
        for step, alphas in enumerate(figures["alpha"]):
            assert list(held[step].values()) == pytest.approx(alphas, rel=1e-6)


INIT_FLAGS = {
    "scale_pre": ["--branch-init", "scaled"],
    # The authors' DeepNorm with ProRes starts from plain normal weights.
    "deeppost_prores": ["--branch-init", "normal"],
}


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("case", INIT["stats"])
def test_initial_weights(case: str, ranks: int, tmp_path: Path) -> None:
    sizes = INIT["config"]
    argv = (
        f"""
        --device cpu --num-layers {sizes["num_layers"]} --hidden-size {sizes["hidden_size"]}
        --ffn-hidden-size {sizes["intermediate_size"]} --num-attention-heads 8
        --seq-length 16 --max-position-embeddings 16 --micro-batch-size 1 --train-iters 1 --lr 1e-3
        --eval-interval 1
        --normalization RMSNorm --swiglu --disable-bias-linear --position-embedding-type rope
        --untie-embeddings-and-output-weights --mock-data --tokenizer-type NullTokenizer
        --vocab-size {sizes["vocab_size"]} --make-vocab-size-divisible-by 1
        --tensor-model-parallel-size {ranks} --norm-placement {golden.placement(case)}
        --prores-schedule {"linear" if golden.has_prores(case) else "none"}
    """.split()
        + INIT_FLAGS.get(case, [])
    )
    job = run_ranks(
        tmp_path,
        golden_ranks.write_initial_statistics,
        (argv, sizes["vocab_size"], str(tmp_path)),
        ranks,
    )
    assert job.succeeded, job.output[-3000:]
    with np.load(tmp_path / "weights.npz") as arrays:
        weights = dict(arrays)
    kinds: dict[str, list[NDArray[Any]]] = {}
    for name in sorted(weights, key=lambda name: [int(n) for n in re.findall(r"\d+", name)]):
        kinds.setdefault(re.sub(r"layers\.\d+", "layers", name), []).append(weights[name])
    expected = INIT["stats"][case]
    assert kinds.keys() == expected.keys()
    for kind, figure in expected.items():
        if "norm" in kind:
            means = [weight.mean() for weight in kinds[kind]]
            assert means == pytest.approx(figure, rel=1e-5), kind
        else:
            assert np.concatenate([w.ravel() for w in kinds[kind]]).std() == pytest.approx(
                figure, rel=0.02
            ), kind
