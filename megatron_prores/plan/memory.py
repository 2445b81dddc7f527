"""Memory per rank: Megatron's theoretical report, and the same told part by part.

Weights, gradients and optimizer follow from the parameters that the ranks of a stage really hold.
Activations are upstream's formula, a model of one transformer layer; see :data:`LEFT_OUT`.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
from dataclasses import dataclass
from typing import Any

from megatron_prores.plan.model import ParameterCount

LEFT_OUT = (
    "the formula for activations is of a layer with a plain MLP: of SwiGLU layers (130M, 350M and "
    "7B, without tensor parallelism or recomputation) autograd keeps 1.4 to 1.5 times as much",
    "recomputation keeps less, context parallelism and FP8 divide it, and neither is in the "
    "formula; nor is the sharding of weights by FSDP",
    "the logits of the last of several pipeline stages are not counted",
    "the CUDA context, NCCL's buffers and what the allocator cannot use come on top: 2 to 6 GB is "
    "usual, not measured by us",
)
"""How far off the figures can be, in words."""


@dataclass(frozen=True)
class StageMemory:
    """Bytes of a rank of a pipeline stage that do not depend on the batch."""

    stage: int
    weights: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        """All three."""
        return self.weights + self.gradients + self.optimizer


@dataclass(frozen=True)
class Memory:
    """Memory per rank."""

    stages: tuple[StageMemory, ...]
    """From the parameters, per pipeline stage."""
    upstream_weights_and_optimizer: int
    """Bytes by upstream's report, which includes gradients, for the fullest rank."""
    upstream_activations: int
    """Bytes by upstream's report, for the first stage."""
    logits: int
    """Bytes of the logits of a micro-batch on the last stage, in float32: not in the report where
    there are several stages."""

    @property
    def fullest(self) -> StageMemory:
        """The stage whose ranks hold most."""
        return max(self.stages, key=lambda stage: stage.total)


def estimate(
    args: argparse.Namespace, parameters: list[ParameterCount], num_microbatches: int
) -> Memory:
    """Estimate the memory of the ranks.

    Args:
        args: Validated by Megatron.
        parameters: Of a rank of each pipeline stage.
        num_microbatches: Micro-batches per step.
    """
    from megatron.training.theoretical_memory_usage import (
        NUM_BYTES_IN_MEGABYTE,
        report_theoretical_memory,
    )

    # A copy: the report fills in fields. It prints as well.
    with contextlib.redirect_stdout(io.StringIO()):
        fixed, activations, _ = report_theoretical_memory(
            copy.copy(args), num_microbatches=num_microbatches
        )
    tokens = args.seq_length * args.micro_batch_size // args.context_parallel_size
    return Memory(
        stages=tuple(_stage(args, stage, held) for stage, held in enumerate(parameters)),
        upstream_weights_and_optimizer=int(fixed * NUM_BYTES_IN_MEGABYTE),
        upstream_activations=int(activations * NUM_BYTES_IN_MEGABYTE),
        logits=4 * tokens * args.padded_vocab_size // args.tensor_model_parallel_size,
    )


def _stage(args: argparse.Namespace, stage: int, held: ParameterCount) -> StageMemory:
    half = args.bf16 or args.fp16
    weight = 2 if half else 4
    if args.fp8_param_gather:
        weight = 1
    gradient = 4 if args.accumulate_allreduce_grads_in_fp32 or not half else 2
    return StageMemory(
        stage=stage,
        weights=weight * held.total,
        gradients=gradient * held.total,
        optimizer=_optimizer(args, held, half),
    )


def _optimizer(args: argparse.Namespace, held: ParameterCount, half: bool) -> int:
    """Bytes of the optimizer's state: its own float32 weights, and its moments."""
    sizes = {"main": 4 if half else 0, "first": 4, "second": 4 if args.optimizer == "adam" else 0}
    if args.use_precision_aware_optimizer:
        sizes = {
            "main": _bytes(args.main_params_dtype) if half else 0,
            "first": _bytes(args.exp_avg_dtype),
            "second": _bytes(args.exp_avg_sq_dtype),
        }
    per_parameter = sum(sizes.values())
    if not args.use_distributed_optimizer:
        return per_parameter * held.total
    instances = args.num_distributed_optimizer_instances
    dense = args.data_parallel_size * args.context_parallel_size // instances
    expert_ranks = (
        args.expert_tensor_parallel_size
        * args.expert_model_parallel_size
        * args.pipeline_model_parallel_size
    )
    expert = max(1, args.world_size // expert_ranks // instances)
    return per_parameter * (-(-held.dense // dense) + -(-held.expert // expert))


def _bytes(dtype: Any) -> int:
    """Return the size of a type of torch's, or of the name of one."""
    import torch

    names = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1}
    return names[dtype] if isinstance(dtype, str) else torch.empty((), dtype=dtype).element_size()
