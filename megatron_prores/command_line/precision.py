"""What FP8 and CUDA graphs cannot do, said before any work.

Upstream and Transformer Engine find most of it out in the first forward pass, or while a graph is
captured, when every GPU of the job has been taken and the data has been read.
"""

from __future__ import annotations

import math
import os
from typing import Any

from megatron_prores.errors import UserError
from megatron_prores.system.environment import THIS_MACHINE, TargetEnvironment

_COLUMNS = {"mxfp8": 32}
"""What the width of a matrix must divide by under a recipe, where it is not 16: the elements that
share a scale. (Transformer Engine 2.20, ``assert_dim_for_fp8_exec`` and ``MXFP8Quantizer``.)"""

_ROWS = {"mxfp8": 32}
"""The same for the height, where it is not 8."""


def check_graphs(args: Any) -> None:
    """Refuse what cannot be captured in a CUDA graph.

    Args:
        args: Parsed, not yet validated by Megatron.

    Raises:
        UserError: Names both flags.
    """
    graph = args.cuda_graph_impl
    if graph == "none":
        return
    named = f"--cuda-graph-impl {graph}"
    if (
        graph == "local"
        and args.transformer_impl == "local"
        and not (args.te_rng_tracker or args.inference_rng_tracker)
    ):
        # With the Transformer Engine implementation upstream turns it on by itself.
        raise UserError(
            f"{named} with --transformer-impl local needs --te-rng-tracker: the random states of "
            "the default tracker cannot be captured"
        )
    if graph != "full_iteration":
        return
    if args.check_for_spiky_loss:
        raise UserError(
            f"--check-for-spiky-loss cannot be used with {named}: it reads the loss of every "
            "micro-batch, which a captured iteration does not give"
        )
    if args.timing_log_level > 1:
        raise UserError(
            f"--timing-log-level {args.timing_log_level} cannot be used with {named}: its timers "
            "stop the GPU in the middle of the iteration that is captured; use 0 or 1"
        )


def check_fp8_shapes(args: Any) -> None:
    """Refuse matrices that FP8 GEMMs cannot take, as each tensor-parallel rank holds them.

    Args:
        args: Validated by Megatron: with its defaults filled in.

    Raises:
        UserError: Names the size, and what it must divide by.
    """
    if not args.fp8:
        return
    recipe, parts = _name(args.fp8_recipe), args.tensor_model_parallel_size
    columns, rows = _COLUMNS.get(recipe, 16), _ROWS.get(recipe, 8)
    attention = args.num_attention_heads * args.kv_channels
    tokens = args.seq_length * args.micro_batch_size // args.context_parallel_size
    widths = [
        ("--hidden-size", args.hidden_size, 1),
        ("--num-attention-heads times --kv-channels", attention, parts),
        ("--ffn-hidden-size", args.ffn_hidden_size, parts),
    ]
    if args.num_experts is not None:
        experts = args.moe_ffn_hidden_size or args.ffn_hidden_size
        widths[-1] = ("--moe-ffn-hidden-size", experts, args.expert_tensor_parallel_size or parts)
    for name, size, divisor in widths:
        if size % (divisor * columns):
            cut = f", over {divisor} tensor-parallel ranks {size / divisor:g}" * (divisor > 1)
            above = math.ceil(size / (divisor * columns)) * divisor * columns
            raise UserError(
                f"{name} {size}{cut}: with --fp8-recipe {recipe} each rank's part must divide by "
                f"{columns}; the next size that does is {above}, or train in --bf16 alone"
            )
    if tokens % rows:
        raise UserError(
            f"--seq-length {args.seq_length} times --micro-batch-size {args.micro_batch_size}: "
            f"with --fp8-recipe {recipe} the tokens of a micro-batch on a rank must divide by "
            f"{rows}"
        )


def check_fp8_hardware(args: Any, target: TargetEnvironment = THIS_MACHINE) -> None:
    """Refuse an FP8 recipe that this rank's GPU has no kernels for.

    Args:
        args: Parsed, not yet validated by Megatron.
        target: The machine of the run.

    Raises:
        UserError: Names the recipe, the GPU, and why.
    """
    if not args.fp8 or not target.has_this_gpu:
        return
    import torch

    try:
        from transformer_engine.pytorch import quantization
    except ImportError:
        return  # refused already

    # This rank's own GPU, as Megatron sets it later: else every rank would touch the first.
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if local_rank < torch.cuda.device_count():
        torch.cuda.set_device(local_rank)
    checks = {
        "mxfp8": quantization.is_mxfp8_available,
        "blockwise": quantization.is_fp8_block_scaling_available,
    }
    recipe = _name(args.fp8_recipe)
    available, reason = checks.get(recipe, quantization.is_fp8_available)(return_reason=True)
    if not available:
        raise UserError(
            f"--fp8-recipe {recipe} cannot be used on {torch.cuda.get_device_name()}: {reason}"
        )


def _name(recipe: Any) -> str:
    return str(getattr(recipe, "value", recipe))  # Megatron's validation makes it an enumeration
