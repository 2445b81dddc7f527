"""Transformer Engine's real modules at every placement, built without a GPU.

They cannot compute there (that is tests/gpu's part), but they can be put together, named, marked,
loaded and saved: everything of the layer spec and of the checkpoints that is not arithmetic.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_prores.config.placement import PLACEMENTS
from megatron_prores.convert.export import export, open_checkpoint
from tests import golden
from tests.distributed.launch import REPOSITORY, free_port, run_job

try:
    # After torch, which brings the libraries that Transformer Engine links to.
    import torch  # noqa: F401
    import transformer_engine.pytorch  # noqa: F401
except (ImportError, OSError) as error:
    pytest.skip(f"Transformer Engine cannot be imported: {error}", allow_module_level=True)

FUSED, PLAIN = "TELayerNormColumnParallelLinear", "TEColumnParallelLinear"


def run_te(*words: str, ranks: int = 1) -> list[str]:
    """Runs a function of te_ranks in fresh processes; gives what each rank printed."""
    port = str(free_port())
    environment = os.environ | {
        "PYTHONPATH": f"{REPOSITORY}:{os.environ.get('PYTHONPATH', '')}",
        "PYTHONWARNINGS": "ignore",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "OMP_NUM_THREADS": "1",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.distributed.te_ranks", *words],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]
    outputs = [process.communicate(timeout=600)[0] for process in processes]
    assert all(process.returncode == 0 for process in processes), "".join(outputs)[-3000:]
    return outputs


def test_which_module_stands_where(tmp_path: Path) -> None:
    run_te("inspect_specs", str(tmp_path))
    specs = json.loads((tmp_path / "specs.json").read_text())
    for kind in ("dense", "dense with query and key norms", "moe", "mla"):
        for name, placement in PLACEMENTS.items():
            parts = specs[f"{kind}, {name}"]
            assert parts["layer"] == "ProResTransformerLayer"
            behind = "IdentityOp" if placement.is_stock else "TENorm"
            assert parts["post_self_attn_layernorm"] == parts["post_mlp_layernorm"] == behind
            # The norm before a branch: fused into the linear, or, where upstream does not fuse,
            # a module of its own (which its fused-residual switch, refused with ProRes, may use).
            separate = "_TENormWithResidual" if placement.norm_input else "IdentityOp"
            linear = FUSED if placement.norm_input else PLAIN
            if kind == "mla":
                assert parts["input_layernorm"] == separate
            else:
                assert parts["input_layernorm"] == "IdentityOp"
                assert parts["linear_qkv"] == linear
            if kind == "moe":
                assert parts["pre_mlp_layernorm"] == separate
            else:
                assert parts["pre_mlp_layernorm"] == "IdentityOp"
                assert parts["linear_fc1"] == linear
                assert parts["linear_fc2"] == "TERowParallelLinear"
            assert parts["core_attention"] == "TEDotProductAttention"
            assert parts["linear_proj"] == "TERowParallelLinear"
            has_query_norm = kind == "dense with query and key norms"
            assert parts["q_layernorm"] == ("TENorm" if has_query_norm else "IdentityOp")


FUSED_INTO = {
    "latent attention": ["self_attention.linear_qkv_down_proj", "mlp.linear_fc1"],
    "gated delta net": ["self_attention.in_proj", "mlp.linear_fc1"],
    "linear": ["self_attention", "mlp"],
}


HYBRID = {
    "M": ("ProResMambaLayer", "mixer.in_proj"),
    "G": ("ProResTransformerLayer", "self_attention.in_proj"),
    "*": ("ProResTransformerLayer", "self_attention.linear_qkv"),
    "-": ("ProResMLPLayer", "mlp.linear_fc1"),
    # A norm of its own before the branch.
    "E": ("ProResMoETransformerLayer", "pre_mlp_layernorm"),
    "D": ("ProResTransformerLayer", "input_layernorm"),
    "+": ("ProResTransformerLayer", "input_layernorm"),
}


def test_which_module_stands_where_in_a_hybrid_model(tmp_path: Path) -> None:
    run_te("inspect_hybrid_specs", str(tmp_path))
    found = json.loads((tmp_path / "hybrid.json").read_text())
    for name, placement in PLACEMENTS.items():
        for kind, (layer, norm) in HYBRID.items():
            before = [norm] if placement.norm_input else []
            is_fused = "." in norm
            assert found[f"{kind}, {name}"] == {
                "layer": layer,
                "depths": [1, 1, 2, 2, 3, 3, 4, 4, 5, 5],
                "behind": ["IdentityOp" if placement.is_stock else "TENorm"],
                "before": [] if is_fused else before,
                "fused": before if is_fused else [],
            }


def test_no_norm_is_left_in_front_under_another_name(tmp_path: Path) -> None:
    run_te("inspect_fused_norms", str(tmp_path))
    found = json.loads((tmp_path / "fused.json").read_text())
    assert found["places"] == {
        f"{kind}, {name}": places if placement.norm_input else []
        for kind, places in FUSED_INTO.items()
        for name, placement in PLACEMENTS.items()
    }
    # Layer 4 of lns: 1/sqrt(4), which a zero-centered norm has as 1 + weight.
    for kind in ("latent attention", "linear"):
        for zero_centered in (False, True):
            norms = found["norms"][f"{kind}, {zero_centered}"]
            before = {f"{place}.layer_norm_weight" for place in FUSED_INTO[kind]}
            assert before <= norms.keys()
            for name, mean in norms.items():
                assert mean == (0.5 if name in before else 1.0) - zero_centered, name


CASES = ("pre_prores", "sandwich_prores", "post_prores", "deeppost_prores", "lns_prores")


@pytest.mark.parametrize("tensor_parallel", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_authors_weights_find_their_places(case: str, tensor_parallel: int, tmp_path: Path) -> None:
    run_te("build_golden", case, str(tensor_parallel), str(tmp_path), ranks=tensor_parallel)
    expected = golden.parameters("forward", case)
    with np.load(tmp_path / "weights.npz") as weights:
        assert set(weights) == set(expected)
        assert all(np.array_equal(weights[name], expected[name]) for name in expected)
    model = json.loads((tmp_path / "model.json").read_text())
    placement = PLACEMENTS[golden.placement(case)]
    for parts in model["parts"]:
        linear = FUSED if placement.norm_input else PLAIN
        assert parts["self_attention.linear_qkv"] == parts["mlp.linear_fc1"] == linear
        behind = "IdentityOp" if placement.is_stock else "RMSNorm"
        assert parts["post_self_attn_layernorm"] == parts["post_mlp_layernorm"] == behind
    norms_per_layer = 4 if placement.norm_input and not placement.is_stock else 2
    assert len(model["norms"]) == norms_per_layer * len(model["parts"]) + 1
    # Their gradients are partial sums on each rank, which Megatron adds up where it sees the mark.
    assert all(bool(mark) == (tensor_parallel > 1) for mark in model["norms"].values())


MODEL = """
    --device cpu --num-layers 2 --hidden-size 32 --ffn-hidden-size 64 --num-attention-heads 4
    --seq-length 16 --max-position-embeddings 16 --micro-batch-size 1 --global-batch-size 2
    --lr 1e-3 --lr-decay-style constant --eval-interval 100 --eval-iters 0 --log-interval 1
    --normalization RMSNorm --swiglu --disable-bias-linear --position-embedding-type rope
    --untie-embeddings-and-output-weights --mock-data --tokenizer-type NullTokenizer
    --vocab-size 63 --prores-warmup-iters 6 --norm-placement sandwich --save-interval 3
    --bf16 --use-distributed-optimizer --dist-ckpt-optim-fully-reshardable
    --override-opt-param-scheduler
""".split()


def test_checkpoint_from_the_cpu_through_transformer_engine_and_back(tmp_path: Path) -> None:
    whole = run_job(tmp_path / "whole", [*MODEL, "--train-iters", "8"])
    assert whole.succeeded, whole.output[-3000:]
    first, second = str(tmp_path / "local"), str(tmp_path / "te")
    job = run_job(tmp_path / "first", [*MODEL, "--train-iters", "4", "--save", first])
    assert job.succeeded, job.output[-3000:]
    # No step left to compute: loads model and optimizer, and saves what it has loaded.
    argv = [*MODEL, "--transformer-impl", "transformer_engine", "--train-iters", "4"]
    (output,) = run_te("pretrain", *argv, "--load", first, "--save", second)
    # Of each layer 2 norms, and the final norm; Megatron's own linears save an empty state.
    assert "the checkpoint has no Transformer Engine state for 5 modules" in output
    resumed = run_job(tmp_path / "second", [*MODEL, "--train-iters", "8", "--load", second])
    assert resumed.succeeded, resumed.output[-3000:]
    expected = whole.scalars("lm loss")
    assert resumed.scalars("lm loss") == {step: expected[step] for step in range(5, 9)}
    # Their exports are the same, file for file: the names and the layout of the norms are not.
    for name, root in (("of local", first), ("of te", second)):
        export(open_checkpoint(Path(root)), tmp_path / name, "bf16", "none")
    weights = [(tmp_path / name / "model.safetensors") for name in ("of local", "of te")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
