"""What FP8 and CUDA graphs cannot do is refused with the flag, the size, and what to do."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_prores.command_line.precision import (
    check_fp8_hardware,
    check_fp8_shapes,
    check_graphs,
)
from megatron_prores.errors import UserError
from megatron_prores.plan.target import PlannedMachine

# ffn sizes of the paper's models, which are all multiples of 8 and not all of 16 or 32.
PUBLISHED = {
    "71M": (512, 1368, 8),
    "130M": (768, 2048, 12),
    "350M": (1024, 2736, 16),
    "1B": (2048, 5632, 32),
    "3B": (2560, 6848, 32),
    "7B": (4096, 11008, 32),
}


def model(size: str, **changes: Any) -> SimpleNamespace:
    hidden, ffn, heads = PUBLISHED[size]
    values: dict[str, Any] = {
        "fp8": "hybrid",
        "fp8_recipe": "tensorwise",
        "hidden_size": hidden,
        "ffn_hidden_size": ffn,
        "num_attention_heads": heads,
        "kv_channels": hidden // heads,
        "seq_length": 1024,
        "micro_batch_size": 1,
        "tensor_model_parallel_size": 1,
        "expert_tensor_parallel_size": None,
        "context_parallel_size": 1,
        "num_experts": None,
        "moe_ffn_hidden_size": None,
    }
    return SimpleNamespace(**values | changes)


@pytest.mark.parametrize("size", ["130M", "350M", "1B", "3B", "7B"])
def test_published_models_that_train_in_fp8(size: str) -> None:
    check_fp8_shapes(model(size))


def test_the_71m_model_does_not() -> None:
    with pytest.raises(UserError, match=r"--ffn-hidden-size 1368: .* divide by 16; .* 1376"):
        check_fp8_shapes(model("71M"))
    check_fp8_shapes(model("71M", fp8=None))


def test_each_ranks_part_counts() -> None:
    check_fp8_shapes(model("3B", tensor_model_parallel_size=4))
    with pytest.raises(UserError, match=r"6848, over 8 tensor-parallel ranks 856: .* 6912"):
        check_fp8_shapes(model("3B", tensor_model_parallel_size=8))


def test_blocks_of_mxfp8() -> None:
    check_fp8_shapes(model("7B", fp8_recipe="mxfp8"))
    with pytest.raises(UserError, match=r"--ffn-hidden-size 2736: .*mxfp8 .* 32; .* 2752"):
        check_fp8_shapes(model("350M", fp8_recipe="mxfp8"))


def test_tokens_of_a_micro_batch() -> None:
    with pytest.raises(UserError, match=r"--seq-length 12 .* must divide by 8"):
        check_fp8_shapes(model("130M", seq_length=12))


def test_experts_have_a_size_of_their_own() -> None:
    with pytest.raises(UserError, match="--moe-ffn-hidden-size 100"):
        check_fp8_shapes(model("130M", num_experts=4, moe_ffn_hidden_size=100))


def graph(impl: str, **changes: Any) -> SimpleNamespace:
    values: dict[str, Any] = {
        "cuda_graph_impl": impl,
        "transformer_impl": "transformer_engine",
        "te_rng_tracker": False,
        "inference_rng_tracker": False,
        "check_for_spiky_loss": False,
        "timing_log_level": 0,
    }
    return SimpleNamespace(**values | changes)


@pytest.mark.parametrize("impl", ["none", "local", "full_iteration"])
def test_graphs_that_work(impl: str) -> None:
    check_graphs(graph(impl))


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (graph("local", transformer_impl="local"), "--te-rng-tracker"),
        (graph("full_iteration", check_for_spiky_loss=True), "--check-for-spiky-loss"),
        (graph("full_iteration", timing_log_level=2), "--timing-log-level 2"),
    ],
)
def test_graphs_that_do_not(args: SimpleNamespace, words: str) -> None:
    with pytest.raises(UserError, match=words):
        check_graphs(args)
    check_graphs(SimpleNamespace(**vars(args) | {"cuda_graph_impl": "none"}))


def test_a_gpu_without_kernels_for_the_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for Transformer Engine, which knows what the GPU can do."""
    stand_in = SimpleNamespace(
        is_mxfp8_available=lambda return_reason: (False, "compute capability 10.0 is required"),
        is_fp8_block_scaling_available=lambda return_reason: (True, ""),
        is_fp8_available=lambda return_reason: (True, ""),
    )
    package = SimpleNamespace(quantization=stand_in)
    monkeypatch.setitem(sys.modules, "transformer_engine", SimpleNamespace(pytorch=package))
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", package)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "NVIDIA H200")
    check_fp8_hardware(model("7B"))
    with pytest.raises(UserError, match=r"mxfp8 cannot be used on NVIDIA H200: .* 10\.0"):
        check_fp8_hardware(model("7B", fp8_recipe="mxfp8"))
    check_fp8_hardware(model("7B", fp8=None, fp8_recipe="mxfp8"))
    check_fp8_hardware(model("7B", fp8_recipe="mxfp8"), PlannedMachine())
