"""Which of Megatron's models a run builds, and ProRes in it: decided here, and nowhere else.

Megatron 0.19 calls ``GPTModel`` deprecated in favour of ``HybridModel``; docs/hybrid.md says what
is left to do on the day that the first one is gone.
"""

from __future__ import annotations

import argparse
from functools import partial

from megatron.training.argument_utils import gpt_config_from_args, hybrid_config_from_args
from megatron.training.models.gpt import GPTModelConfig
from megatron.training.models.hybrid import HybridModelConfig

from megatron_prores.config.prores_config import ProResConfig
from megatron_prores.model.hybrid_specs import stack_spec
from megatron_prores.model.specs import prores_layer_spec
from megatron_prores.model.with_prores import with_prores

type MegatronModelConfig = GPTModelConfig | HybridModelConfig


def stock_config(args: argparse.Namespace) -> MegatronModelConfig:
    """Return Megatron's configuration of the model that its arguments describe.

    Args:
        args: Validated by Megatron.
    """
    if args.hybrid_layer_pattern is not None:
        return hybrid_config_from_args(args)
    return gpt_config_from_args(args)


def set_layers(
    config: MegatronModelConfig, prores: ProResConfig, document_masks: bool = False
) -> None:
    """Put the layers that ProRes needs into a configuration, in place.

    Args:
        config: Of :func:`stock_config`.
        prores: With the schedule ``none`` and Megatron's own norm placement no class of ours gets
            into the model, but for what Megatron lacks of a hybrid model's local modules.
        document_masks: Whether attention masks keep documents apart (``--reset-attention-mask``).

    Raises:
        ArgumentError: The model has a layer or a branch that ProRes has no counterpart of.
    """
    placement = prores.norm_placement
    if isinstance(config, GPTModelConfig):
        if prores.needs_own_layer:
            config.transformer_layer_spec = partial(
                prores_layer_spec, norm_placement=placement, document_masks=document_masks
            )
        return
    spec = stack_spec(config.transformer, document_masks)
    if prores.needs_own_layer:
        spec = with_prores(spec, placement, config.hybrid_layer_pattern)
    config.hybrid_stack_spec = spec
