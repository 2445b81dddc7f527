"""Norms that a backend fuses into a linear: none is left before a branch that has none."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.launch import run_ranks


@dataclasses.dataclass
class MadeUpSubmodules:
    """Parts of a branch that nobody has heard of."""

    first: Any = None


def check_every_known_place() -> None:
    from functools import partial

    from megatron.core.ssm.gated_delta_net import GatedDeltaNetSubmodules
    from megatron.core.tensor_parallel import ColumnParallelLinear
    from megatron.core.transformer.attention import SelfAttentionSubmodules
    from megatron.core.transformer.heterogeneous.linear_replacements import (
        ColumnParallelLinearGathered,
    )
    from megatron.core.transformer.mlp import MLP, MLPSubmodules
    from megatron.core.transformer.multi_latent_attention import MLASelfAttentionSubmodules
    from megatron.core.transformer.spec_utils import ModuleSpec

    from megatron_prores.errors import ArgumentError
    from megatron_prores.model.with_prores import _without_input_norm
    from tests.distributed.fused_backend import FusedBackend, NormThenLinear

    class Duplicated:
        """Stands in for Transformer Engine's linear, of which each rank holds the whole."""

    class Backend(FusedBackend):
        def linear(self) -> type:
            return Duplicated

    class Gathered(NormThenLinear):
        """A linear in place of a whole branch."""

    def attention(submodules: Any) -> ModuleSpec:
        return ModuleSpec(module=object, submodules=submodules)

    def parts(first: Any, second: Any = None) -> dict[str, Any]:
        branches = {"self_attention": first, "mlp": second}
        return {
            name: _without_input_norm(branch, name, Backend(), "post")
            for name, branch in branches.items()
        }

    fused = NormThenLinear
    found = parts(attention(SelfAttentionSubmodules(fused, object, object)))
    assert found["self_attention"].submodules.linear_qkv is ColumnParallelLinear
    found = parts(attention(GatedDeltaNetSubmodules(in_proj=fused)))
    assert found["self_attention"].submodules.in_proj is ColumnParallelLinear
    latent = MLASelfAttentionSubmodules(
        linear_qkv_down_proj=fused,
        linear_q_up_proj=fused,
        linear_proj=object,
        q_layernorm=object,
        kv_layernorm=object,
    )
    found = parts(attention(latent))
    assert found["self_attention"].submodules.linear_qkv_down_proj is Duplicated
    # The norm of the latents is a part of the branch.
    assert found["self_attention"].submodules.linear_q_up_proj is fused
    mlp = partial(
        MLP.as_mlp_submodule, submodules=MLPSubmodules(linear_fc1=fused, linear_fc2=object)
    )
    found = parts(attention(None), mlp)
    assert found["mlp"].keywords["submodules"].linear_fc1 is ColumnParallelLinear
    found = parts(ModuleSpec(module=Gathered), partial(Gathered, tp_comm_buffer_name="x"))
    assert found["self_attention"].module is ColumnParallelLinearGathered
    assert found["mlp"].func is ColumnParallelLinearGathered
    assert found["mlp"].keywords == {"tp_comm_buffer_name": "x"}

    with pytest.raises(ArgumentError, match=r"self_attention\.first"):
        parts(attention(MadeUpSubmodules(first=fused)))
    nested = attention(MadeUpSubmodules(first=ModuleSpec(object, submodules=[])))
    nested.submodules.first.submodules = MadeUpSubmodules(first=partial(fused))
    with pytest.raises(ArgumentError, match=r"self_attention\.first\.first"):
        parts(nested)


def test_every_known_place_and_an_unknown_one(tmp_path: Path) -> None:
    job = run_ranks(tmp_path, check_every_known_place)
    assert job.succeeded, job.output[-3000:]
