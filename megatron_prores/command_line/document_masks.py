"""Where ``--reset-attention-mask`` would be dropped on its way to the attention.

Megatron makes the mask in its dataset and hands it to every layer, but not every attention reads it
(NVIDIA/Megatron-LM issue 2357), and not every pipeline stage gets it.
"""

from __future__ import annotations

import argparse
from typing import Any

from megatron_prores.errors import UserError

_FLAG = "--reset-attention-mask"


def check_document_mask(args: Any) -> None:
    """Refuse to train across documents where the command line asks for masks between them.

    Args:
        args: Parsed, not yet validated by Megatron.

    Raises:
        UserError: Names the other flag, and what happens to the mask.
    """
    if not args.reset_attention_mask:
        return
    virtual = (
        args.num_layers_per_virtual_pipeline_stage,
        args.num_virtual_stages_per_pipeline_rank,
        args.pipeline_model_parallel_layout,
    )
    for other, is_given, reason in (
        (
            "--no-create-attention-mask-in-dataloader",
            not args.create_attention_mask_in_dataloader,
            "no mask is made",
        ),
        (
            "--transformer-impl transformer_engine",
            args.transformer_impl == "transformer_engine",
            "Transformer Engine's attention is causal and ignores the mask; use "
            "--transformer-impl local",
        ),
        (
            "--bf16 or --fp16 without --no-masked-softmax-fusion",
            args.masked_softmax_fusion and (args.bf16 or args.fp16),
            "the fused softmax is causal and ignores the mask",
        ),
        (
            "virtual pipeline stages",
            any(each is not None for each in virtual),
            "stages between the first and the last get no mask",
        ),
        (
            f"--pipeline-model-parallel-size {args.pipeline_model_parallel_size}",
            args.pipeline_model_parallel_size > 2,
            "stages between the first and the last get no mask",
        ),
    ):
        if is_given:
            raise UserError(f"{_FLAG} cannot be used with {other}: {reason}")


def position_advice(args: argparse.Namespace) -> list[str]:
    """List what ``--reset-position-ids`` does not do.

    Args:
        args: Validated by Megatron.

    Returns:
        One line where only learned positions would follow the flag, else none.
    """
    if not args.reset_position_ids or args.position_embedding_type == "learned_absolute":
        return []
    return [
        "--reset-position-ids has no effect with --position-embedding-type "
        f"{args.position_embedding_type}: Megatron's model reads these ids for learned positions "
        "alone"
    ]
