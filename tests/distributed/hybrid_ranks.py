"""What the hybrid tests run in a rank of their own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from tests.distributed import layers

BLOCKS = 4


def initial_weights(norm_placement: str, branch_init: str, hybrid: bool) -> dict[str, torch.Tensor]:
    """Builds a model and draws its weights as a run does; gives them by their Llama names."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.models.gpt import GPTModelConfig
    from megatron.training.models.hybrid import HybridModelConfig

    from megatron_prores.config.prores_config import ProResConfig
    from megatron_prores.convert.llama import to_llama
    from megatron_prores.model import initial_weights as init
    from megatron_prores.training.model import set_layers

    layers.initialize()
    prores = ProResConfig(norm_placement=norm_placement, branch_init=branch_init)
    prores = replace(prores, truncated_init=branch_init == "scaled")
    common: dict[str, Any] = {
        "vocab_size": 128,
        "share_embeddings_and_output_weights": False,
        "position_embedding_type": "rope",
    }
    model: Any
    if hybrid:
        transformer = layers.transformer_config(num_layers=2 * BLOCKS, is_hybrid_model=True)
        model = HybridModelConfig(
            transformer=transformer, hybrid_layer_pattern="*-" * BLOCKS, **common
        )
    else:
        transformer = layers.transformer_config(num_layers=BLOCKS)
        model = GPTModelConfig(transformer=transformer, **common)
    init.configure(transformer, prores)
    set_layers(model, prores)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    chunk = model.get_builder_cls()(model).build_model(groups, True, True)
    init.finish([chunk], prores)
    return to_llama([chunk], norm_placement, 128)


def check_initial_weights_are_the_gpt_models(norm_placement: str, branch_init: str) -> None:
    """The same draws in the same order, scaled by the same l and L."""
    gpt = initial_weights(norm_placement, branch_init, hybrid=False)
    hybrid = initial_weights(norm_placement, branch_init, hybrid=True)
    assert gpt.keys() == hybrid.keys()
    differ = [name for name, weight in gpt.items() if not torch.equal(weight, hybrid[name])]
    assert not differ, differ
