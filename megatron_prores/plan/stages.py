"""What every pipeline stage holds: its model chunks on the meta device, shapes without memory.

Megatron's own builder makes them from the run's own configuration. What exists only in CUDA kernels
is exchanged for what the local spec has in its place; both number their layers and shape their
weights alike: a norm that Transformer Engine fuses into the linear behind it has its weight there,
a grouped GEMM of experts has the weights of the experts one after another. Every rank of the world
then reports its layers to the audit that a real run starts with.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
from collections.abc import Iterable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnBackend
from megatron.training.models.dist_utils import build_virtual_pipeline_stages

from megatron_prores.config.prores_config import ProResConfig
from megatron_prores.errors import ArgumentError, StopRun, UserError
from megatron_prores.plan.groups import as_rank
from megatron_prores.schedule.depth import Depths, depths_of
from megatron_prores.training.model import set_layers
from megatron_prores.upstream.registry import replace, undone_afterwards, wrap
from megatron_prores.warmup.audit import HeldLayer, RankReport, find_faults, report_of
from megatron_prores.warmup.residual_warmup import ResidualWarmup


@dataclass(frozen=True)
class Chunk:
    """One model chunk of one rank: of a pipeline stage, and of a virtual stage of it."""

    stage: int
    virtual_stage: int
    layers: tuple[int, ...]
    """The layers of the L that it holds, as they number themselves."""
    numbers: tuple[int, ...]
    """The layers that Megatron builds here, as it counts; in a GPT model they are the L."""
    embedding: bool
    output: bool
    prediction_layers: int
    """Multi-token prediction layers, which are not among the L."""
    parameters: int
    expert_parameters: int
    """Of the parameters those of experts, which the optimizer shards over other ranks."""


@dataclass(frozen=True)
class Stage:
    """What a rank of one pipeline stage holds."""

    chunks: tuple[Chunk, ...]
    """One per virtual stage."""
    warmup: ResidualWarmup | None
    """Of their layers; None without ProRes: there is nothing to drive."""

    @property
    def parameters(self) -> int:
        """Parameters of all chunks."""
        return sum(chunk.parameters for chunk in self.chunks)

    @property
    def expert_parameters(self) -> int:
        """Of these those of experts."""
        return sum(chunk.expert_parameters for chunk in self.chunks)


_OFF = """
    sequence_parallel layernorm_zero_centered_gamma persist_layer_norm memory_efficient_layer_norm
    gradient_accumulation_fusion masked_softmax_fusion apply_rope_fusion tp_comm_overlap
    moe_grouped_gemm moe_permute_fusion moe_enable_deepep use_kitchen use_kitchen_attention
    use_te_activation_func use_te_rng_tracker use_transformer_engine_op_fuser enable_cuda_graph
    external_cuda_graph cpu_offloading fine_grained_activation_offloading fp8_param
    overlap_moe_expert_parallel_comm delay_wgrad_compute first_last_layers_bf16
    perform_initialization use_cpu_initialization
"""

_LOCAL: dict[str, Any] = {
    **dict.fromkeys(_OFF.split(), False),
    **dict.fromkeys(("fp8", "fp4", "recompute_granularity"), None),
    "transformer_impl": "local",
    "attention_backend": AttnBackend.unfused,
    "context_parallel_size": 1,
    "moe_token_dispatcher_type": "allgather",
    "cuda_graph_impl": "none",
    # Weights stay as they are allotted: not at all.
    "init_model_with_meta_device": True,
}
"""In the place of what needs a kernel or a package that is not here, and does not change numbers or
shapes."""

_ONES = """
    tensor_model_parallel_size pipeline_model_parallel_size expert_model_parallel_size
    expert_tensor_parallel_size context_parallel_size world_size data_parallel_size
    num_distributed_optimizer_instances
"""
_NONES = """
    virtual_pipeline_model_parallel_size pipeline_model_parallel_layout
    num_layers_in_first_pipeline_stage num_layers_in_last_pipeline_stage
    hierarchical_context_parallel_sizes
"""

_ONE_RANK: dict[str, Any] = {
    **dict.fromkeys(_ONES.split(), 1),
    **dict.fromkeys(_NONES.split(), None),
    "account_for_embedding_in_pipeline_split": False,
    "account_for_loss_in_pipeline_split": False,
    "mtp_standalone": False,
}
"""The layout of a model on one rank."""


_CANNOT_BUILD = (
    "these flags are right, but the planner cannot build their model: it has parts that exist only "
    "in Transformer Engine"
)


def local_config(config: Any, prores: ProResConfig) -> Any:
    """Copy a model's configuration for a build without CUDA kernels.

    Args:
        config: A ``GPTModelConfig`` or ``HybridModelConfig``; stays as it is.
        prores: The run's ProRes configuration.
    """
    local = _copied(config)
    local.pre_wrap_hooks, local.post_wrap_hooks = [], []
    _set_existing(local, _LOCAL)
    _set_existing(local.transformer, _LOCAL)
    try:
        set_layers(local, prores)
    except ArgumentError as error:
        raise UserError(f"{_CANNOT_BUILD} ({error})") from error
    return local


def _copied(config: Any) -> Any:
    """Copy a model's configuration; its specs, which hold classes made on the fly, are shared."""
    copied = copy.copy(config)
    copied.transformer = copy.deepcopy(config.transformer)
    return copied


def _set_existing(owner: Any, values: dict[str, Any]) -> None:
    for name in vars(owner).keys() & values.keys():
        object.__setattr__(owner, name, values[name])


def _build_chunks(config: Any) -> list[Any]:
    """Build the model chunks of the rank that Megatron's parallel state is set up for.

    They are on the meta device; the alphas of their layers are real.
    """
    meta = torch.device("meta")
    transformer = config.transformer
    builder = config.get_builder_cls()(config)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    try:
        with undone_afterwards(), meta:
            wrap(torch.cuda, "current_device", (), lambda stock, named: meta, _build_chunks)
            if transformer.multi_latent_attention:
                # The local spec has no core attention of such widths. It has no weights.
                identity = lambda stock, named: torch.nn.Identity  # noqa: E731
                wrap(LocalSpecProvider, "core_attention", (), identity, _build_chunks)
            _build_without_kernels()
            stages = transformer.virtual_pipeline_model_parallel_size
            return list(build_virtual_pipeline_stages(builder.build_model, groups, stages))
    except (AssertionError, ImportError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{_CANNOT_BUILD} ({str(error) or type(error).__name__})") from error


def _build_without_kernels() -> None:
    """Let Megatron build mixing layers whose CUDA kernels are packages that are not here."""
    from megatron.core.ssm import mamba_context_parallel, mamba_mixer
    from megatron.core.ssm.gated_delta_net import common, gdn

    def norm(size: int, eps: float, **kernel: Any) -> torch.nn.Module:
        return torch.nn.RMSNorm(size, eps=eps)

    def random_states(*flags: Any, **named: Any) -> Any:
        return SimpleNamespace(fork=contextlib.nullcontext)  # only a run has them

    replace(
        mamba_mixer,
        _build_chunks,
        HAVE_MAMBA_SSM=True,
        HAVE_EINOPS=True,
        ExtendedRMSNorm=norm,
        get_cuda_rng_tracker=random_states,
    )
    replace(mamba_context_parallel, _build_chunks, HAVE_EINOPS=True)
    replace(common, _build_chunks, HAVE_FLA=True)
    replace(gdn, _build_chunks, chunk_gated_delta_rule=lambda *tensors, **named: None)


def build_stage(prores: ProResConfig, config: Any, stage: int) -> Stage:
    """Build what a rank of one pipeline stage holds, and take hold of its layers as a run does.

    Args:
        prores: The run's ProRes configuration.
        config: As :func:`local_config` gives it.
        stage: The stage that Megatron's parallel state is set up for.

    Raises:
        UserError: The model needs a kernel for its very shape, which is not on this machine.
    """
    built = _build_chunks(config)
    depths = depths_of(config)
    chunks = tuple(
        Chunk(
            stage=stage,
            virtual_stage=virtual_stage,
            layers=tuple(dict.fromkeys(depths[number - 1] for number in numbers)),
            numbers=numbers,
            embedding=chunk.pre_process,
            output=chunk.post_process,
            prediction_layers=len(chunk.mtp.layers) if getattr(chunk, "mtp_process", False) else 0,
            parameters=_count(chunk.parameters()),
            # Megatron marks those of experts so.
            expert_parameters=_count(
                each for each in chunk.parameters() if not getattr(each, "allreduce", True)
            ),
        )
        for virtual_stage, chunk in enumerate(built)
        for numbers in [tuple(layer.layer_number for layer in chunk.decoder.layers)]
    )
    warmup = ResidualWarmup(prores, depths[-1], built) if prores.enabled else None
    return Stage(chunks, warmup)


def _count(parameters: Iterable[torch.nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def count_whole_model(args: argparse.Namespace, config: Any) -> int:
    """Count the parameters of the model on one rank: nothing is cut, nothing is there twice.

    Args:
        args: Megatron's validated arguments.
        config: As :func:`local_config` gives it.
    """
    whole, alone = _copied(config), copy.copy(args)
    if getattr(whole, "hybrid_layer_pattern", None) is not None:
        whole.hybrid_layer_pattern = whole.hybrid_layer_pattern.replace("|", "")
    _set_existing(whole.transformer, _ONE_RANK)
    _set_existing(alone, _ONE_RANK)
    with as_rank(alone, 0):
        return sum(_count(chunk.parameters()) for chunk in _build_chunks(whole))


def audit_world(
    pipelines: list[list[int]], stages: list[Stage], prores: ProResConfig, depths: Depths
) -> list[RankReport]:
    """Make the report of every rank of the world, and audit them as the start of a run does.

    Args:
        pipelines: The ranks of every pipeline, first stage first.
        stages: What a rank of each pipeline stage holds.
        prores: The run's ProRes configuration.
        depths: l of every layer that Megatron builds.

    Returns:
        One report per rank at step 0, in the order of the ranks.

    Raises:
        StopRun: The run's own audit would find a fault.
    """
    num_layers = depths[-1]
    # At the start all alphas may be alike: a swapped layer shows where they differ.
    steps = [prores.total_warmup(num_layers) // 2, 0] if prores.enabled else [0]
    for step in steps:
        for stage in stages:
            if stage.warmup is not None:
                stage.warmup.set_step(step)
        reports = [
            _report(stages[stage], depths, step, rank, stage, pipeline)
            for pipeline in pipelines
            for stage, rank in enumerate(pipeline)
        ]
        reports.sort(key=lambda report: report.rank)
        alphas = prores.alphas(step, num_layers).tolist() if prores.enabled else [1.0] * num_layers
        if faults := find_faults(reports, alphas, depths):
            raise StopRun(
                f"the run would be stopped by its audit, with {len(faults)} faults: "
                + "; ".join(faults[:5])
            )
    return reports


def _report(
    held: Stage, depths: Depths, step: int, rank: int, stage: int, pipeline: list[int]
) -> RankReport:
    if held.warmup is not None:
        return report_of(held.warmup, step, rank, pipeline)
    layers = tuple(
        HeldLayer(depths[number - 1], number, 1.0, rank, stage, chunk.virtual_stage, pipeline[0])
        for chunk in held.chunks
        for number in chunk.numbers
    )
    return RankReport(rank, pipeline[0], "without ProRes", layers)
