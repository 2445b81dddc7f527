"""Megatron's stack of a hybrid model's layers, with ours in it and a final norm of any kind."""

from __future__ import annotations

from typing import Any

from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.transformer.torch_norm import LayerNormBuilder
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import unwrap_model

from megatron_prores.schedule.depth import Depths, pattern_depths


def hybrid_depths(chunk: Any) -> Depths | None:
    """Return l of every layer of the whole model that a chunk is of; None unless it is hybrid.

    Args:
        chunk: A model chunk, wrapped or not.
    """
    pattern = getattr(unwrap_model(chunk), "hybrid_layer_pattern", None)
    return None if pattern is None else pattern_depths(pattern)


class ProResHybridStack(HybridStack):
    """Stands where Megatron's HybridStack stands in a model's spec.

    The spec's ``submodules`` stay Megatron's own: prediction layers (MTP) are built from them, in a
    stock HybridStack, and are no part of the warmup.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: HybridStackSubmodules,
        *args: Any,
        layers: HybridStackSubmodules | None = None,
        final_norm: LayerNormBuilder | None = None,
        post_layer_norm: bool = True,
        **kwargs: Any,
    ) -> None:
        """Build the layers of one model chunk.

        Args:
            config: The model's configuration.
            submodules: Of the spec.
            *args: As for HybridStack.
            layers: What to build the layers from; None: ``submodules``.
            final_norm: The norm behind the last layer; None: Transformer Engine's, which Megatron
                builds whatever the spec says.
            post_layer_norm: Whether there is a norm behind the last layer.
            **kwargs: As for HybridStack.
        """
        is_stock = final_norm is None
        super().__init__(
            config,
            layers or submodules,
            *args,
            post_layer_norm=post_layer_norm and is_stock,
            **kwargs,
        )
        self.post_layer_norm = post_layer_norm
        if final_norm is not None and self.post_process and post_layer_norm:
            self.final_norm = final_norm(
                config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon
            )
