"""A mask between documents that no attention would read is refused, not dropped."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from megatron_prores.command_line.document_masks import check_document_mask, position_advice
from megatron_prores.errors import UserError


def flags(**given: Any) -> SimpleNamespace:
    values: dict[str, Any] = {
        "reset_attention_mask": True,
        "create_attention_mask_in_dataloader": True,
        "transformer_impl": "local",
        "masked_softmax_fusion": False,
        "bf16": True,
        "fp16": False,
        "pipeline_model_parallel_size": 2,
        "num_layers_per_virtual_pipeline_stage": None,
        "num_virtual_stages_per_pipeline_rank": None,
        "pipeline_model_parallel_layout": None,
    }
    return SimpleNamespace(**values | given)


DROPPED = {
    "no mask is made": {"create_attention_mask_in_dataloader": False},
    "Transformer Engine's attention is causal": {"transformer_impl": "transformer_engine"},
    "the fused softmax is causal": {"masked_softmax_fusion": True},
    "stages between the first and the last": {"pipeline_model_parallel_size": 3},
    "stages between the first and the last get": {"num_virtual_stages_per_pipeline_rank": 2},
    "stages between the first and the last get no": {"num_layers_per_virtual_pipeline_stage": 1},
    "stages between the first and the last get no mask": {"pipeline_model_parallel_layout": "E|L"},
}


@pytest.mark.parametrize("words", DROPPED)
def test_the_mask_would_be_dropped(words: str) -> None:
    with pytest.raises(UserError, match=f"^--reset-attention-mask cannot be used with .*{words}"):
        check_document_mask(flags(**DROPPED[words]))
    check_document_mask(flags(**DROPPED[words], reset_attention_mask=False))


def test_local_attention_reads_it() -> None:
    check_document_mask(flags())
    check_document_mask(flags(masked_softmax_fusion=True, bf16=False))


@pytest.mark.parametrize(
    ("positions", "lines"), [("learned_absolute", 0), ("rope", 1), ("none", 1)]
)
def test_positions_are_reset_where_they_are_learned(positions: str, lines: int) -> None:
    args: Any = SimpleNamespace(reset_position_ids=True, position_embedding_type=positions)
    assert len(position_advice(args)) == lines
    args.reset_position_ids = False
    assert position_advice(args) == []
