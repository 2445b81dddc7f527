"""The parameters of a Megatron model by their Llama names, for every norm placement: a table.

A Megatron parameter is one or more Llama weights joined along their rows, each cut over the
tensor-parallel ranks along one dimension.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_prores.config.placement import placement_of


def is_of_attention(name: str) -> bool:
    """Return whether a parameter, named within its layer, belongs to the layer's attention."""
    return name.startswith(("self_attention.", "input_layernorm.", "post_self_attn_layernorm."))


@dataclass(frozen=True)
class Entry:
    """One Megatron parameter and the Llama weights that it is made of."""

    megatron: tuple[str, ...]
    """Its name in the model or layer; the second one where Transformer Engine fuses a norm, and
    in a hybrid model's stack."""
    llama: tuple[str, ...]
    """Llama names, in the order in which they are joined."""
    shard_dim: int | None
    """The dimension that is cut over tensor-parallel ranks; None where each rank holds all."""
    rows: str = ""
    """How rows are joined: "qkv" by query group, "halves" one after the other, "" not at all."""

    @property
    def of_attention(self) -> bool:
        """Whether it belongs to the attention of a layer, which a hybrid model has apart."""
        return is_of_attention(self.megatron[0])


_LINEARS = (
    Entry(
        ("self_attention.linear_qkv.weight",),
        ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
        shard_dim=0,
        rows="qkv",
    ),
    Entry(("self_attention.linear_proj.weight",), ("self_attn.o_proj.weight",), shard_dim=1),
    Entry(
        ("mlp.linear_fc1.weight",),
        ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
        shard_dim=0,
        rows="halves",
    ),
    Entry(("mlp.linear_fc2.weight",), ("mlp.down_proj.weight",), shard_dim=1),
)

type _Norms = dict[tuple[str, ...], str]

_BEFORE_ATTENTION = ("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight")
_AFTER_ATTENTION = ("post_self_attn_layernorm.weight",)
_BEFORE_MLP = ("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight")
_AFTER_MLP = ("post_mlp_layernorm.weight",)

# The names of the authors' model. They change their meaning with the placement: what is called
# post_attention_layernorm stands before the MLP in a pre-norm layer.
_PRE_NORMS: _Norms = {
    _BEFORE_ATTENTION: "input_layernorm.weight",
    _BEFORE_MLP: "post_attention_layernorm.weight",
}
_POST_NORMS: _Norms = {
    _AFTER_ATTENTION: "post_attention_layernorm.weight",
    _AFTER_MLP: "post_feedforward_layernorm.weight",
}
_SANDWICH_NORMS: _Norms = {
    _BEFORE_ATTENTION: "input_layernorm.weight",
    _AFTER_ATTENTION: "post_attention_layernorm.weight",
    _BEFORE_MLP: "pre_feedforward_layernorm.weight",
    _AFTER_MLP: "post_feedforward_layernorm.weight",
}

LAYER_ENTRIES: dict[str, tuple[Entry, ...]] = {
    placement: (
        *_LINEARS,
        *(Entry(megatron, (llama,), shard_dim=None) for megatron, llama in norms.items()),
    )
    for placement, norms in {
        "pre": _PRE_NORMS,
        "lns": _PRE_NORMS,
        "sandwich": _SANDWICH_NORMS,
        "post": _POST_NORMS,
        "deepnorm": _POST_NORMS,
    }.items()
}
"""Norm placement -> the parameters of one layer, named within ``model.layers.<l - 1>``."""

MODEL_ENTRIES = (
    Entry(("embedding.word_embeddings.weight",), ("model.embed_tokens.weight",), shard_dim=0),
    Entry(
        ("decoder.final_layernorm.weight", "decoder.final_norm.weight"),
        ("model.norm.weight",),
        shard_dim=None,
    ),
    Entry(("output_layer.weight",), ("lm_head.weight",), shard_dim=0),
)
"""The parameters outside the layers."""


def branch_ends(norm_placement: str) -> tuple[str, str]:
    """Return the Llama names of the weights that the two branches of a layer end with.

    A linear, or, in a sandwich, a norm: scaling it scales the branch.

    Args:
        norm_placement: One of ``placement.PLACEMENTS``.

    Raises:
        ArgumentError: There is no such placement.
    """
    if placement_of(norm_placement).branch_output_norm:
        return _SANDWICH_NORMS[_AFTER_ATTENTION], _SANDWICH_NORMS[_AFTER_MLP]
    return "self_attn.o_proj.weight", "mlp.down_proj.weight"
