"""A backend of Transformer Engine's shape that runs on the CPU.

Transformer Engine fuses a norm and the linear behind it into one module, with the norm's weight as
``layer_norm_weight``. This one does so with torch's norm, so that the spec of every placement for a
fusing backend can be built, trained and compared where Transformer Engine cannot.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.tensor_parallel import ColumnParallelLinear

from tests.distributed import golden_ranks


class NormThenLinear(ColumnParallelLinear):
    """RMSNorm and column-parallel linear in one module."""

    def __init__(self, input_size: int, output_size: int, *, config: Any, **kwargs: Any) -> None:
        super().__init__(input_size, output_size, config=config, **kwargs)
        self.layer_norm_weight = torch.nn.Parameter(torch.ones(input_size))
        self.eps = config.layernorm_epsilon

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        normed = F.rms_norm(x, x.shape[-1:], self.layer_norm_weight, self.eps)
        return super().forward(normed, *args, **kwargs)


class FusedBackend(LocalSpecProvider):
    """The local backend, with the norm fused into the linear behind it."""

    def fuse_layernorm_and_linear(self) -> bool:
        return True

    def column_parallel_layer_norm_linear(self) -> type:
        return NormThenLinear

    def layer_norm(self, rms_norm: bool = True, **kwargs: Any) -> Any:
        # Transformer Engine's norm reads the kind of norm from the configuration.
        return super().layer_norm(rms_norm=True, **kwargs)


def use() -> None:
    """Puts this backend where upstream and our spec take Transformer Engine's."""
    from megatron.core.models.gpt import gpt_layer_specs

    from megatron_prores.model import with_prores

    gpt_layer_specs.TESpecProvider = FusedBackend
    with_prores.TESpecProvider = FusedBackend


def run_forward_cases(cases: list[str], directory: str) -> None:
    """Computes golden cases on this backend, and prints which modules a layer has got."""
    from megatron_prores.model.layer import ProResLayerMixin

    use()
    stock = ProResLayerMixin.__init__

    def tell(layer: Any, *args: Any, **kwargs: Any) -> None:
        stock(layer, *args, **kwargs)
        modules = {
            "input_layernorm": layer.input_layernorm,
            "linear_qkv": layer.self_attention.linear_qkv,
            "post_self_attn_layernorm": layer.post_self_attn_layernorm,
            "pre_mlp_layernorm": layer.pre_mlp_layernorm,
            "linear_fc1": layer.mlp.linear_fc1,
            "post_mlp_layernorm": layer.post_mlp_layernorm,
        }
        print("modules", *(f"{name}={type(m).__name__}" for name, m in modules.items()))

    ProResLayerMixin.__init__ = tell
    layout = {"transformer_impl": "transformer_engine"}
    golden_ranks.run_forward_cases(cases, layout, directory)


def use_instead_of_local() -> None:
    """Builds the models of the CPU device, whose spec is the local one, on this backend."""
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_layer_with_transformer_engine_spec,
    )

    from megatron_prores.model import specs

    use()
    specs.default_layer_spec = lambda config, vp_stage: get_gpt_layer_with_transformer_engine_spec()
    print("local backend exchanged for one with", NormThenLinear.__name__)
