"""Models whose layers differ (``--heterogeneous-layers-config-path``): what of them cannot run."""

from __future__ import annotations

from megatron.core.transformer.heterogeneous.heterogeneous_config import (
    HeterogeneousTransformerConfig,
)
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_prores.config.prores_config import ProResConfig
from megatron_prores.errors import UserError

_FLAG = "--heterogeneous-layers-config-path"


def check(config: TransformerConfig, prores: ProResConfig, encoded: str | None) -> None:
    """Refuse what fails when the model is built or run, in Megatron or in its initial weights.

    Args:
        config: The model's configuration.
        prores: Its ``initialization`` names the scheme of the initial weights.
        encoded: The description of the layers in Megatron's arguments, if there is one.

    Raises:
        UserError: Names the flags, and what to use.
    """
    if not isinstance(config, HeterogeneousTransformerConfig):
        # Taken from a checkpoint by --use-checkpoint-args, for instance.
        if encoded:
            raise UserError(
                f"the model's layers differ (--heterogeneous-layers-config-encoded-json), and "
                f"Megatron builds such layers only with {_FLAG}: give the file"
            )
        return
    if config.virtual_pipeline_model_parallel_size is not None:
        # default_layer_spec does not pass the virtual stage on.
        raise UserError(
            f"{_FLAG} cannot be used with virtual pipeline stages: Megatron does not tell which of "
            "these layers a virtual stage holds; use --pipeline-model-parallel-size alone"
        )
    replaced = [
        f"the {name} of layer {number}"
        for number, block in enumerate(config.per_block_parameters, start=1)
        for name, branch in (("attention", block.attention), ("MLP", block.mlp))
        if branch.replace_with_linear
    ]
    if not replaced:
        return
    linear = f"{_FLAG}: {replaced[0]} is a linear layer, which"
    if config.sequence_parallel:
        # linear_replacements pads the sequence instead of the hidden dimension.
        raise UserError(
            f"{linear} Megatron cannot run with --sequence-parallel: leave that flag out"
        )
    if prores.initialization == "deepnorm":
        raise UserError(f"{linear} DeepNorm's gains are not defined for: use --branch-init normal")
