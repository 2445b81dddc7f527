"""A core attention that never holds the scores: torch's scaled_dot_product_attention.

Megatron's local spec has the unfused one, which writes all scores [b, n, s, s] and reads them
several times. Torch's kernel gives the same figures to the rounding of the dtype, block by block.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnBackend, AttnMaskType
from torch import Tensor

FUSED_BACKENDS = (AttnBackend.fused, AttnBackend.flash)
"""Values of ``--attention-backend`` that select this attention in the local spec."""


class FusedDotProductAttention(DotProductAttention):
    """Stands where Megatron's DotProductAttention stands, with the same constructor.

    What torch's kernel cannot do goes the stock way: attention dropout (upstream draws it under
    the tensor-parallel random-number tracker, for all scores), softmax offsets, sliding windows,
    and queries of another length than the keys. Upstream refuses packed sequences and biases.

    With a mask torch takes a slower kernel, and whether a mask on a GPU is the causal one cannot be
    seen without waiting for the GPU. So the module is told.
    """

    def __init__(self, *args: Any, document_masks: bool = False, **kwargs: Any) -> None:
        """Take the arguments of the stock module, and what the masks are.

        Args:
            *args: As the stock module's.
            document_masks: Whether masks keep documents apart, as with --reset-attention-mask.
                Else Megatron's datasets make no other mask than the causal one, and it is not read.
            **kwargs: As the stock module's.
        """
        super().__init__(*args, **kwargs)
        self.document_masks = document_masks

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attend, on this tensor-parallel rank's n heads and g groups of keys and values.

        Args:
            query: [s, b, n, d].
            key: [s, b, g, d].
            value: [s, b, g, d].
            attention_mask: [b or 1, 1, s, s], True where a query (row) must not see a key; each
                query must see one key at least, which Megatron's datasets grant. Read only where
                masks keep documents apart; else, and where it is None: causal, or all keys, by the
                mask type that the module was built with.
            attn_mask_type: Not used, as in the stock module.
            attention_bias: None.
            packed_seq_params: None.

        Returns:
            [s, b, n * d].
        """
        by_kernel = (
            query.size(0) == key.size(0)
            and query.size(3) == value.size(3)
            and (self.attention_dropout.p == 0.0 or not self.training)
            and self.softmax_offset is None
            and self.scale_mask_softmax.window_size is None
            and attention_bias is None
            and packed_seq_params is None
        )
        if not by_kernel:
            return super().forward(
                query,
                key,
                value,
                attention_mask,
                attn_mask_type,
                attention_bias=attention_bias,
                packed_seq_params=packed_seq_params,
            )
        mask = attention_mask if self.document_masks else None
        context = F.scaled_dot_product_attention(
            query.permute(1, 2, 0, 3),
            key.permute(1, 2, 0, 3),
            value.permute(1, 2, 0, 3),
            attn_mask=None if mask is None else ~mask,
            is_causal=mask is None and self.attn_mask_type == AttnMaskType.causal,
            # Under --apply-query-key-layer-scaling the stock softmax takes back what the scores
            # were divided by.
            scale=self.softmax_scale * (self.scale_mask_softmax.scale or 1.0),
            enable_gqa=query.size(2) != key.size(2),
        )
        # [b, n, s, d] -> [s, b, n * d]
        return context.permute(2, 0, 1, 3).flatten(2)
