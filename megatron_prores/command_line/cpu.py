"""Megatron's flags on the CPU device: other defaults, and those that cannot work."""

from __future__ import annotations

import argparse
from typing import Any

from megatron.core.transformer.enums import AttnBackend

from megatron_prores.command_line.rules import Rule

# dest -> value. Each needs a CUDA kernel, or is the CPU's counterpart of a CUDA choice.
_DEFAULTS: dict[str, Any] = {
    "transformer_impl": "local",
    "distributed_backend": "gloo",
    # With ProRes, torch's own attention (model/attention.py); unfused: Megatron's local one.
    "attention_backend": AttnBackend.fused,
    "disable_jit_fuser": True,
    "gradient_accumulation_fusion": False,
    "masked_softmax_fusion": False,
    "bias_swiglu_fusion": False,
    "bias_gelu_fusion": False,
    "apply_rope_fusion": False,
    "no_persist_layer_norm": True,
}

NOT_ON_CPU: tuple[Rule, ...] = (
    (
        "--transformer-impl",
        lambda a: a.transformer_impl != "local",
        "Transformer Engine needs a GPU; leave the flag out (local is the default here)",
    ),
    (
        "--distributed-backend nccl",
        lambda a: a.distributed_backend != "gloo",
        "NCCL needs GPUs; leave the flag out (gloo is the default here)",
    ),
    (
        "--context-parallel-size",
        lambda a: a.context_parallel_size > 1,
        "context parallelism needs Transformer Engine's attention",
    ),
    (
        "--multi-latent-attention",
        lambda a: a.multi_latent_attention,
        "multi-latent attention needs Transformer Engine's layers",
    ),
    ("--fp8", lambda a: a.fp8 is not None, "FP8 needs Transformer Engine and a GPU"),
    ("--fp4", lambda a: a.fp4 is not None, "FP4 needs Transformer Engine and a GPU"),
    ("--fp16", lambda a: a.fp16, "train in float32, or with --bf16"),
    (
        "--fp32-residual-connection",
        lambda a: a.fp32_residual_connection and a.bf16,
        "torch's norms on the CPU take no float32 input beside bfloat16 weights",
    ),
    (
        "--apply-layernorm-1p",
        lambda a: a.layernorm_zero_centered_gamma,
        "torch's norms do not add 1 to their weight",
    ),
    (
        "--cuda-graph-impl",
        lambda a: a.cuda_graph_impl != "none",
        "there is no CUDA graph without CUDA",
    ),
    (
        "--recompute-modules layernorm",
        lambda a: "layernorm" in (a.recompute_modules or ()),
        "recomputing norms needs Transformer Engine",
    ),
    (
        "--moe-token-dispatcher-type",
        lambda a: (
            a.num_experts is not None
            and a.moe_token_dispatcher_type != "allgather"
            and (a.expert_model_parallel_size > 1 or a.moe_token_dispatcher_type == "flex")
        ),
        "gloo has no uneven all-to-all; use --moe-token-dispatcher-type allgather",
    ),
    ("--moe-grouped-gemm", lambda a: a.moe_grouped_gemm, "the grouped GEMM is a CUDA kernel"),
    ("--use-torch-fsdp2", lambda a: a.use_torch_fsdp2, "use --use-distributed-optimizer"),
    ("--use-megatron-fsdp", lambda a: a.use_megatron_fsdp, "use --use-distributed-optimizer"),
    (
        "--fine-grained-activation-offloading",
        lambda a: a.fine_grained_activation_offloading,
        "there is nothing to offload to",
    ),
    (
        "--cpu-offloading-num-layers",
        lambda a: a.cpu_offloading_num_layers > 0,
        "there is nothing to offload to",
    ),
    (
        "--optimizer-cpu-offload",
        lambda a: a.optimizer_cpu_offload,
        "the optimizer is on the CPU already",
    ),
    ("--profile", lambda a: a.profile and not a.use_pytorch_profiler, "nsys profiles CUDA"),
    (
        "--log-memory-to-tensorboard",
        lambda a: a.log_memory_to_tensorboard,
        "there is no GPU whose memory could be measured",
    ),
    (
        "--record-memory-history",
        lambda a: a.record_memory_history,
        "there is no GPU whose memory could be recorded",
    ),
    ("--log-energy", lambda a: a.log_energy, "there is no GPU to measure"),
    ("--use-flash-attn", lambda a: a.use_flash_attn, "flash attention is a CUDA kernel"),
    (
        "--sequence-parallel with --prores-schedule none",
        lambda a: a.sequence_parallel and a.prores_schedule == "none",
        "Megatron's own local norms refuse it, and without ProRes no class of ours is in the model",
    ),
    (
        "--sequence-parallel with --mtp-num-layers",
        lambda a: a.sequence_parallel and bool(a.mtp_num_layers),
        "Megatron's own local norms in the prediction layers refuse it",
    ),
    (
        "--sequence-parallel with --qk-layernorm",
        lambda a: a.sequence_parallel and a.qk_layernorm,
        "Megatron's own local norms of queries and keys refuse it",
    ),
)


def set_defaults(parser: argparse.ArgumentParser) -> None:
    """Return Megatron's parser the defaults for the CPU; what a user gives still counts.

    Raises:
        RuntimeError: Upstream has renamed one of the flags.
    """
    known = {action.dest for action in parser._actions}
    if missing := sorted(_DEFAULTS.keys() - known):
        raise RuntimeError(f"megatron-core has moved: no flag sets {', '.join(missing)} any more")
    parser.set_defaults(**_DEFAULTS)
