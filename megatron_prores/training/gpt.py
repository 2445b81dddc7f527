"""What Megatron's training program asks of a GPT run: data, forward step, loss, embedding ranks.

``megatron.training.pretrain`` takes these as functions; upstream keeps its own in a script outside
of the wheel (pretrain_gpt.py). Nothing here knows of ProRes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.models.gpt import GPTModel
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.transformer.multi_token_prediction import get_mtp_ranks, mtp_on_this_rank
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
from megatron.core.utils import (
    StragglerDetector,
    get_attr_wrapped_model,
    get_batch_on_this_cp_rank,
    get_batch_on_this_tp_rank,
)
from megatron.training import get_args, get_timers, get_tokenizer
from megatron.training.utils import (
    get_blend_and_blend_per_split,
    is_first_or_last_pipeline_stage,
    print_rank_0,
)
from torch import Tensor

Batch = dict[str, Any]

SPIKY_LOSS_FACTOR = 10
"""A loss this many times the largest one so far is reported under --check-for-spiky-loss."""

# Every key that upstream's broadcast within a tensor-parallel group reads.
_BATCH_KEYS = (
    "tokens",
    "labels",
    "loss_mask",
    "position_ids",
    "attention_mask",
    "cu_seqlens",
    "cu_seqlens_padded",
    "max_seqlen",
    "local_cp_size",
    "hybrid_cp_group",
)

_straggler_timer = StragglerDetector()


def _needs_batch(args: Any, vp_stage: int | None) -> bool:
    """Return whether this model chunk reads tokens or labels: the first, the last, and MTP's."""
    return is_first_or_last_pipeline_stage(vp_stage) or _has_mtp(args, vp_stage)


def _has_mtp(args: Any, vp_stage: int | None) -> bool:
    return mtp_on_this_rank(
        layout=_layout(args),
        mtp_num_layers=args.mtp_num_layers,
        ignore_virtual=False,
        vp_stage=vp_stage,
    )


def _layout(args: Any) -> PipelineParallelLayerLayout | None:
    """Return the layout of ``--pipeline-model-parallel-layout``: the arguments hold its text."""
    text = args.pipeline_model_parallel_layout
    return None if text is None else _parse_layout(text, args.pipeline_model_parallel_size)


@cache
def _parse_layout(text: str, pipeline_size: int) -> PipelineParallelLayerLayout:
    return PipelineParallelLayerLayout(text, pipeline_size)


def embedding_ranks(pipeline: list[int]) -> list[int]:
    """Return the ranks of a pipeline that hold a copy of the word embedding, for ``pretrain``.

    Megatron adds up the gradients of the copies. They are on the first stage, on the last one where
    the output head is tied to the embedding, and wherever a multi-token prediction layer embeds the
    next tokens. Megatron's default leaves out a prediction layer on a stage in the middle.

    Args:
        pipeline: Global ranks of one pipeline, first stage first.
    """
    args = get_args()
    ranks = {pipeline[0]}
    if not args.untie_embeddings_and_output_weights:
        ranks.add(pipeline[-1])
    placed = SimpleNamespace(
        mtp_num_layers=args.mtp_num_layers, pipeline_model_parallel_layout=_layout(args)
    )
    return sorted(ranks.union(get_mtp_ranks(pipeline, placed)))


def get_batch(data_iterator: Iterator[Batch] | None, vp_stage: int | None) -> Batch:
    """Read the next micro-batch of this rank.

    Args:
        data_iterator: The dataset's iterator; None on tensor-parallel ranks other than the first.
        vp_stage: Virtual pipeline stage of the chunk that asks.

    Returns:
        tokens, labels, loss_mask, position_ids [b, s / cp] and attention_mask [b, 1, s / cp, s] or
        None; all None on a pipeline stage in the middle.
    """
    args = get_args()
    if not _needs_batch(args, vp_stage):
        return dict.fromkeys(_BATCH_KEYS)
    batch: Batch = {}
    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    if tp_rank == 0:
        assert data_iterator is not None
        loaded = next(data_iterator)
        for key in _BATCH_KEYS:
            value = loaded.get(key)
            batch[key] = value.cuda(non_blocking=True) if isinstance(value, Tensor) else None
    batch = get_batch_on_this_tp_rank(
        batch,
        has_cu_seqlens=False,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        broadcast_src_rank=parallel_state.get_tensor_model_parallel_src_rank(),
        broadcast_group=parallel_state.get_tensor_model_parallel_group(),
        cp_size=args.context_parallel_size,
        tp_rank=tp_rank,
        micro_batch_size=args.micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=_has_mtp(args, vp_stage),
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=parallel_state.is_pipeline_first_stage(
            ignore_virtual=vp_stage is None, vp_stage=vp_stage
        ),
        is_pipeline_last_stage=parallel_state.is_pipeline_last_stage(
            ignore_virtual=vp_stage is None, vp_stage=vp_stage
        ),
    )
    return get_batch_on_this_cp_rank(
        batch, is_hybrid_cp=False, cp_group=parallel_state.get_context_parallel_group()
    )


def loss_func(loss_mask: Tensor, output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Sum the loss of a micro-batch over its tokens.

    Args:
        loss_mask: [b, s], 0 where a token does not count.
        output: Loss per token [b, s], as GPTModel returns it when it is given labels.

    Returns:
        The sum of the losses, the number of tokens that count, and for the log both of them as
        'lm loss', from which Megatron averages over the tokens of all ranks.
    """
    args = get_args()
    mask = loss_mask.view(-1).float()
    loss = (output.view(-1).float() * mask).sum()
    num_tokens = mask.sum().detach().to(torch.int)
    rerun = get_rerun_state_machine()
    if args.check_for_nan_in_loss_and_grad:
        for name, is_bad in (("NaN", torch.isnan), ("Inf", torch.isinf)):
            rerun.validate_result(
                result=loss,
                rejection_func=is_bad,
                message=f"{name} in the loss of this rank",
                tolerance=0.0,
                fatal=True,
            )
    if args.check_for_spiky_loss:
        rerun.validate_result(
            result=loss,
            rejection_func=partial(
                rerun.is_unexpectedly_large, threshold=SPIKY_LOSS_FACTOR, context="loss"
            ),
            message="spike in the loss of this rank",
            tolerance=0.0,
            fatal=False,
        )
    report = torch.stack([loss.detach(), num_tokens.to(loss.dtype)])
    return loss, num_tokens, {"lm loss": report}


def forward_step(
    data_iterator: Iterator[Batch] | None, model: GPTModel, return_schedule_plan: bool = False
) -> tuple[Any, partial[Any]]:
    """Run one micro-batch through one model chunk, for Megatron's pipeline schedules.

    Args:
        data_iterator: The data of this rank.
        model: The model chunk, wrapped.
        return_schedule_plan: Return the plan of the fine-grained schedule that overlaps expert
            communication instead of running the chunk.

    Returns:
        The chunk's output (hidden states [s, b, h], or the loss per token [b, s] on the last
        stage) or its plan, and the loss function of the micro-batch.
    """
    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    with _straggler_timer(bdata=True):
        batch = get_batch(data_iterator, get_attr_wrapped_model(model, "vp_stage"))
    timers("batch-generator").stop()
    inputs = (batch["tokens"], batch["position_ids"], batch["attention_mask"])
    kwargs = {"labels": batch["labels"], "loss_mask": batch["loss_mask"]}
    with _straggler_timer:
        if return_schedule_plan:
            output = get_attr_wrapped_model(model, "build_schedule_plan")(*inputs, **kwargs)
        else:
            output = model(*inputs, **kwargs)
    return output, partial(loss_func, batch["loss_mask"])


def dataset_config(args: Any) -> GPTDatasetConfig:
    """Build the configuration of the run's datasets from Megatron's arguments."""
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    sequences_per_dataset = None
    if args.per_dataset_sequences_path is not None:
        with open(args.per_dataset_sequences_path) as file:
            sequences_per_dataset = json.load(file)
    return GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        multiple_validation_sets=args.multiple_validation_sets,
        full_validation=args.full_validation,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=get_tokenizer(),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
        object_storage_cache_path=args.object_storage_cache_path,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
        allow_ambiguous_pad_tokens=args.allow_ambiguous_pad_tokens,
        fast_cache_load=args.dataloader_fast_cache_load,
        defer_npy_index_mmap=args.dataloader_defer_npy_index_mmap,
        sequences_per_dataset=sequences_per_dataset,
        context_parallel_size=args.context_parallel_size,
        data_parallel_size=args.data_parallel_size,
    )


def train_valid_test_datasets_provider(
    num_samples: tuple[int, int | None, int], vp_stage: int | None = None
) -> tuple[Any, Any, Any]:
    """Build the train, validation and test datasets on the ranks that read data.

    Args:
        num_samples: How many sequences to draw for each of the three.
        vp_stage: Virtual pipeline stage of the chunk that they are for.

    Returns:
        The three datasets, each None where there is none or where this rank reads none.
    """
    args = get_args()
    print_rank_0("> building train, validation, and test datasets for GPT ...")
    datasets = BlendedMegatronDatasetBuilder(
        MockGPTDataset if args.mock_data else GPTDataset,
        num_samples,
        lambda: (
            _needs_batch(args, vp_stage) and parallel_state.get_tensor_model_parallel_rank() == 0
        ),
        dataset_config(args),
    ).build()
    print_rank_0("> finished creating GPT datasets ...")
    return tuple(datasets)


# Megatron calls the provider on every rank, not only on the first of each tensor-parallel group:
# the builder above synchronises the ranks itself.
train_valid_test_datasets_provider.is_distributed = True  # type: ignore[attr-defined]
