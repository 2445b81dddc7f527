"""The model chunks of a pipeline stage, on the meta device: shapes without memory.

They are built by Megatron's own builder from the run's own configuration. What exists only in CUDA
kernels is exchanged for what the local spec has in its place; both number their layers and shape
their weights alike: a norm that Transformer Engine fuses into the linear behind it has its weight
there, a grouped GEMM of experts has the weights of the experts one after another.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from megatron_prores.errors import UserError
from megatron_prores.plan.elsewhere import replaced


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a rank, as (dense, expert): the optimizer shards the two differently."""

    dense: int = 0
    expert: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return self.dense + self.expert

    def __add__(self, other: ParameterCount) -> ParameterCount:
        return ParameterCount(self.dense + other.dense, self.expert + other.expert)


@dataclass(frozen=True)
class Chunk:
    """One model chunk of one rank: of a pipeline stage, and of a virtual stage of it."""

    stage: int
    virtual_stage: int
    layers: tuple[int, ...]
    """The layers of the L that it holds, as they number themselves."""
    embedding: bool
    output: bool
    prediction_layers: int
    """Multi-token prediction layers, which are not among the L."""
    parameters: ParameterCount


# What needs a kernel or a package that is not here, and does not change numbers or shapes.
_LOCAL: dict[str, Any] = {
    "transformer_impl": "local",
    "sequence_parallel": False,
    "context_parallel_size": 1,
    "layernorm_zero_centered_gamma": False,
    "persist_layer_norm": False,
    "memory_efficient_layer_norm": False,
    "gradient_accumulation_fusion": False,
    "masked_softmax_fusion": False,
    "apply_rope_fusion": False,
    "tp_comm_overlap": False,
    "moe_grouped_gemm": False,
    "moe_use_legacy_grouped_gemm": False,
    "moe_permute_fusion": False,
    "moe_token_dispatcher_type": "allgather",
    "moe_enable_deepep": False,
    "use_kitchen": False,
    "use_kitchen_attention": False,
    "use_te_activation_func": False,
    "use_te_rng_tracker": False,
    "use_transformer_engine_op_fuser": False,
    "cuda_graph_impl": "none",
    "enable_cuda_graph": False,
    "external_cuda_graph": False,
    "cpu_offloading": False,
    "fine_grained_activation_offloading": False,
    "overlap_moe_expert_parallel_comm": False,
    "delay_wgrad_compute": False,
    "fp8": None,
    "fp4": None,
    "fp8_param": False,
    "first_last_layers_bf16": False,
    "recompute_granularity": None,
    # Weights stay as they are allotted: not at all.
    "perform_initialization": False,
    "use_cpu_initialization": False,
    "init_model_with_meta_device": True,
}


def local_config(config: Any) -> Any:
    """Copy a model's configuration for a build without CUDA kernels.

    Args:
        config: A ``GPTModelConfig``; stays as it is.
    """
    from megatron.core.transformer.enums import AttnBackend

    hooks = config.pre_wrap_hooks, config.post_wrap_hooks
    config.pre_wrap_hooks, config.post_wrap_hooks = [], []
    try:
        local = copy.deepcopy(config)
    finally:
        config.pre_wrap_hooks, config.post_wrap_hooks = hooks
    for name, value in {**_LOCAL, "attention_backend": AttnBackend.unfused}.items():
        for owner in (local, local.transformer):
            if name in vars(owner):
                object.__setattr__(owner, name, value)
    return local


class _LatentCoreAttention(torch.nn.Module):
    """Stands in for the core of multi-latent attention, which the local spec has none for.

    It has no weights; Transformer Engine's takes widths that the local one does not know.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()


@contextmanager
def _on_meta(config: Any) -> Iterator[None]:
    """Make "the CUDA device" of Megatron, and torch's default device, the meta device."""
    from megatron.core.models.backends import LocalSpecProvider

    meta = torch.device("meta")
    core = LocalSpecProvider.core_attention
    if config.transformer.multi_latent_attention:
        core = lambda provider: _LatentCoreAttention  # noqa: E731
    with (
        replaced(torch.cuda, current_device=lambda: meta),
        replaced(LocalSpecProvider, core_attention=core),
        meta,
    ):
        yield


def build_chunks(config: Any) -> list[Any]:
    """Build the model chunks of the rank that Megatron's parallel state is set up for.

    Args:
        config: A ``GPTModelConfig``, as :func:`local_config` gives it.

    Returns:
        The chunks, one per virtual stage, on the meta device; the alphas of their layers are real.

    Raises:
        UserError: The model needs a kernel for its very shape, which is not on this machine.
    """
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.models.dist_utils import build_virtual_pipeline_stages

    builder = config.get_builder_cls()(config)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    try:
        with _on_meta(config):
            chunks = build_virtual_pipeline_stages(
                builder.build_model,
                groups,
                config.transformer.virtual_pipeline_model_parallel_size,
            )
    except (AssertionError, ImportError, ValueError, TypeError, AttributeError) as error:
        raise UserError(
            "these flags are right, but the planner cannot build their model: it has parts that "
            f"exist only in Transformer Engine ({str(error) or type(error).__name__})"
        ) from error
    return list(chunks)


def describe(chunks: list[Any], stage: int) -> list[Chunk]:
    """Tell what the chunks of a stage hold.

    Args:
        chunks: As :func:`build_chunks` gives them.
        stage: Their pipeline stage.
    """
    return [
        Chunk(
            stage=stage,
            virtual_stage=virtual_stage,
            layers=tuple(layer.layer_number for layer in chunk.decoder.layers),
            embedding=chunk.pre_process,
            output=chunk.post_process,
            prediction_layers=len(chunk.mtp.layers) if getattr(chunk, "mtp_process", False) else 0,
            parameters=count(chunk),
        )
        for virtual_stage, chunk in enumerate(chunks)
    ]


def count(chunk: torch.nn.Module) -> ParameterCount:
    """Count the parameters of a chunk; Megatron marks those of experts with ``allreduce``."""
    expert = dense = 0
    for parameter in chunk.parameters():
        if getattr(parameter, "allreduce", True):
            dense += parameter.numel()
        else:
            expert += parameter.numel()
    return ParameterCount(dense, expert)
