"""A stored Megatron model as the weights of a class of transformers, one tensor after the other.

Nothing is built and no rank is started: the index of the checkpoint says where each part of a whole
weight lies, whatever layout the run had, and no more is in memory than what one weight is made of.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from megatron_prores.checkpoint.manifest import DamagedError
from megatron_prores.checkpoint.reader import INDEX, StoredCheckpoint
from megatron_prores.config.placement import PLACEMENTS
from megatron_prores.convert.architecture import Architecture, key_value_heads
from megatron_prores.convert.names import LAYER_ENTRIES, is_of_attention
from megatron_prores.errors import UserError
from megatron_prores.schedule.depth import depths_of

_LAYERS = "decoder.layers."


@dataclass(frozen=True)
class Weight:
    """A weight of the exported model, not read yet."""

    name: str
    shape: tuple[int, ...]
    read: Callable[[], Tensor]
    """Read it, float32 or as it is stored."""


def weights_of(
    stored: StoredCheckpoint,
    args: Namespace,
    architecture: Architecture,
    alphas: Sequence[float],
    vocab_size: int,
) -> list[Weight]:
    """List the weights of the exported model, in the order of its layers.

    Args:
        stored: The checkpoint.
        args: Its arguments.
        architecture: What it becomes.
        alphas: alpha of layer 1..L, which the last weight of each branch is multiplied by.
        vocab_size: Rows of the embedding without padding.

    Raises:
        UserError: The model has a weight that the class has no place for, or lacks one.
    """
    model = _Stored(stored, args, architecture, alphas, vocab_size)
    weights = [model.vocabulary("embedding.word_embeddings.weight", "model.embed_tokens.weight")]
    for layer in range(depths_of(args)[-1]):
        weights += model.layer(layer)
    weights += model.norm(
        "decoder.final_norm" if model.is_hybrid else "decoder.final_layernorm", "model.norm"
    )
    if args.untie_embeddings_and_output_weights:
        weights.append(model.vocabulary("output_layer.weight", "lm_head.weight"))
    model.check_all_used()
    return weights


class _Stored:
    """Finds and reads the weights of one checkpoint."""

    def __init__(
        self,
        stored: StoredCheckpoint,
        args: Namespace,
        architecture: Architecture,
        alphas: Sequence[float],
        vocab_size: int,
    ) -> None:
        self.stored = stored
        self.args = args
        self.architecture = architecture
        self.placement = PLACEMENTS[architecture.norm_placement]
        self.alphas = alphas
        self.vocab_size = vocab_size
        self.tensors = stored.tensors
        self.used: set[str] = set()
        self.groups = key_value_heads(args)
        self.is_hybrid = getattr(args, "hybrid_layer_pattern", None) is not None

    def check_all_used(self) -> None:
        """Refuse weights that would be left out of the export.

        Prediction layers (``--mtp-num-layers``) are left out: they are no part of the language
        model that generates.
        """
        left = [
            name
            for name in self.tensors
            if name.startswith(("embedding.", "decoder.", "output_layer."))
            and name not in self.used
            and not name.endswith("_extra_state")
        ]
        if left:
            raise UserError(
                f"{self.stored.directory}: {self.architecture.name} has no place for "
                f"{', '.join(left[:5])}{', ...' if len(left) > 5 else ''}: it cannot be exported"
            )

    def vocabulary(self, megatron: str, name: str) -> Weight:
        """Return the embedding or the head, without the rows that pad the vocabulary."""
        rows, width = self._size(megatron)
        if rows < self.vocab_size:
            raise UserError(
                f"{self.stored.directory}: its vocabulary has {rows} ids, fewer than the "
                f"{self.vocab_size} of the tokenizer: give the tokenizer it was trained with"
            )
        return Weight(
            name, (self.vocab_size, width), lambda: self._read(megatron)[: self.vocab_size].clone()
        )

    def norm(
        self, megatron: str, name: str, layer: int | None = None, gain: float = 1.0
    ) -> list[Weight]:
        """Return a norm's weight, and its bias where it has one; ``gain`` multiplies both."""
        at = 0 if layer is None else layer
        separator = "_" if self._has(f"{megatron}_weight", at) else "."
        offset = 1.0 if getattr(self.args, "layernorm_zero_centered_gamma", False) else 0.0
        weights = []
        for part, shift in (("weight", offset), ("bias", 0.0)):
            full = f"{megatron}{separator}{part}"
            if part == "bias" and not self._has(full, at):
                continue
            self._size(full, at)
            read = partial(self._scaled, full, layer, gain, shift)
            weights.append(Weight(f"{name}.{part}", (self.args.hidden_size,), read))
        return weights

    def layer(self, layer: int) -> Iterator[Weight]:
        """Yield the weights of a layer, counted from 0."""
        hidden, channels = self.args.hidden_size, self.args.kv_channels
        queries = self.args.num_attention_heads * channels
        keys = self.groups * channels
        gain = self.alphas[layer]
        on_linear = 1.0 if self.placement.branch_output_norm else gain
        prefix = f"model.layers.{layer}."
        attention, mlp = "self_attention.", "mlp."
        for part, row in (("weight", (hidden,)), ("bias", ())):
            qkv = f"{_LAYERS}{attention}linear_qkv.{part}"
            if part == "bias" and not self._has(qkv, layer):
                continue
            self._size(qkv, layer)
            for index, (letter, rows) in enumerate((("q", queries), ("k", keys), ("v", keys))):
                read = partial(self._query_key_value, qkv, layer, index)
                yield Weight(f"{prefix}self_attn.{letter}_proj.{part}", (rows, *row), read)
        yield from self._linear(
            f"{attention}linear_proj", f"{prefix}self_attn.o_proj", layer, (hidden, queries),
            on_linear,
        )  # fmt: skip
        if getattr(self.args, "qk_layernorm", False):
            for letter in "qk":
                full = f"{_LAYERS}{attention}{letter}_layernorm.weight"
                read = partial(self._scaled, full, layer, 1.0, 0.0)
                self._size(full, layer)
                yield Weight(f"{prefix}self_attn.{letter}_norm.weight", (channels,), read)
        if getattr(self.args, "num_experts", None):
            yield from self._experts(layer, prefix, on_linear)
        else:
            ffn = self.args.ffn_hidden_size
            yield from self._gate_and_up(f"{_LAYERS}{mlp}linear_fc1", layer, prefix, ffn)
            yield from self._linear(
                f"{mlp}linear_fc2", f"{prefix}mlp.down_proj", layer, (hidden, ffn), on_linear
            )
        yield from self._norms(layer, prefix, gain)

    def _norms(self, layer: int, prefix: str, gain: float) -> Iterator[Weight]:
        for entry in LAYER_ENTRIES[self.architecture.norm_placement]:
            if not entry.megatron[0].endswith("norm.weight"):
                continue
            bases = [name.removesuffix("weight")[:-1] for name in entry.megatron]
            found = [base for base in bases if self._has_norm(f"{_LAYERS}{base}", layer)]
            if not found:
                raise UserError(f"{self.stored.directory}: it has no {_LAYERS}{bases[0]}")
            name = entry.llama[0].removesuffix(".weight")
            if self.architecture.name == "Glm4ForCausalLM":
                name = GLM4_NORMS[name]
            behind = entry.megatron[0].startswith("post_")
            scale = gain if behind and self.placement.branch_output_norm else 1.0
            yield from self.norm(f"{_LAYERS}{found[0]}", f"{prefix}{name}", layer, scale)

    def _linear(
        self, megatron: str, name: str, layer: int, shape: tuple[int, int], gain: float
    ) -> Iterator[Weight]:
        for part, size in (("weight", shape), ("bias", shape[:1])):
            full = f"{_LAYERS}{megatron}.{part}"
            if part == "weight" or self._has(full, layer):
                self._size(full, layer)
                yield Weight(f"{name}.{part}", size, partial(self._scaled, full, layer, gain, 0.0))
            elif self._needs_bias(name):
                # The class has biases for all four projections or for none.
                yield Weight(f"{name}.bias", size, partial(torch.zeros, size))

    def _needs_bias(self, name: str) -> bool:
        return name.endswith("o_proj") and bool(self.architecture.config["attention_bias"])

    def _gate_and_up(self, megatron: str, layer: int, prefix: str, ffn: int) -> Iterator[Weight]:
        hidden = self.args.hidden_size
        for part, row in (("weight", (hidden,)), ("bias", ())):
            full = f"{megatron}.{part}"
            if part == "bias" and not self._has(full, layer):
                continue
            self._size(full, layer)
            if self.architecture.name == "Glm4ForCausalLM":
                read = partial(self._scaled, full, layer, 1.0, 0.0)
                yield Weight(f"{prefix}mlp.gate_up_proj.{part}", (2 * ffn, *row), read)
                continue
            for half, name in enumerate(("gate", "up")):
                read = partial(self._half, full, (layer,), half)
                yield Weight(f"{prefix}mlp.{name}_proj.{part}", (ffn, *row), read)

    def _experts(self, layer: int, prefix: str, gain: float) -> Iterator[Weight]:
        """Yield Mixtral's experts: w1 is the gate, w3 the way up, w2 the way down."""
        ffn, hidden = self.args.moe_ffn_hidden_size, self.args.hidden_size
        block = f"{prefix}block_sparse_moe."
        router = f"{_LAYERS}mlp.router.weight"
        self._size(router, layer)
        yield Weight(
            f"{block}gate.weight",
            (self.args.num_experts, hidden),
            partial(self._scaled, router, layer, 1.0, 0.0),
        )
        first, second = (f"{_LAYERS}mlp.experts.experts.linear_fc{n}.weight" for n in (1, 2))
        self._size(first, layer)
        self._size(second, layer)
        for expert in range(self.args.num_experts):
            for half, name in ((0, "w1"), (1, "w3")):
                read = partial(self._half, first, (layer, expert), half)
                yield Weight(f"{block}experts.{expert}.{name}.weight", (ffn, hidden), read)
            yield Weight(
                f"{block}experts.{expert}.w2.weight",
                (hidden, ffn),
                partial(self._scaled, second, layer, gain, 0.0, (expert,)),
            )

    def _query_key_value(self, name: str, layer: int, index: int) -> Tensor:
        """Read the rows of queries, keys or values: Megatron joins them by query group."""
        joined = self._read(name, (layer,))
        channels = self.args.kv_channels
        queries = self.args.num_attention_heads // self.groups * channels
        grouped = joined.view(self.groups, queries + 2 * channels, *joined.shape[1:])
        part = grouped.split([queries, channels, channels], dim=1)[index]
        part = part.reshape(-1, *joined.shape[1:])
        if self.architecture.name == "Glm4ForCausalLM" and index < 2:
            return interleave_rope(part, channels)
        return part.clone()

    def _half(self, name: str, leading: tuple[int, ...], half: int) -> Tensor:
        return self._read(name, leading).chunk(2)[half].clone()

    def _scaled(
        self,
        name: str,
        layer: int | None,
        gain: float,
        offset: float,
        further: tuple[int, ...] = (),
    ) -> Tensor:
        leading = further if layer is None else (layer, *further)
        tensor = self._read(name, leading)
        if gain == 1.0 and offset == 0.0:
            return tensor
        # In float32: alpha moves by less than bfloat16 can tell apart.
        return (tensor.float() + offset) * gain

    def _has(self, name: str, layer: int) -> bool:
        return name in self.tensors or self._unstacked(name, layer) in self.tensors

    def _has_norm(self, base: str, layer: int) -> bool:
        return any(self._has(f"{base}{separator}weight", layer) for separator in "._")

    def _unstacked(self, name: str, layer: int) -> str:
        """Return the name where Megatron keeps each layer apart, as in models of unlike layers."""
        if self.is_hybrid:
            # *-*-: an attention and a feed-forward layer in turn.
            layer = 2 * layer + (not is_of_attention(name.removeprefix(_LAYERS)))
        return name.replace(_LAYERS, f"{_LAYERS}{layer}.", 1)

    def _size(self, name: str, layer: int = 0) -> torch.Size:
        if name not in self.tensors and self._unstacked(name, layer) in self.tensors:
            name = self._unstacked(name, layer)
        if name not in self.tensors:
            raise UserError(f"{self.stored.directory}: it has no {name}: it cannot be exported")
        self.used.add(name)
        return self.tensors[name].size

    def _read(self, name: str, leading: tuple[int, ...] = ()) -> Tensor:
        """Put a weight together from its chunks.

        Args:
            name: Its name in the checkpoint; that of a layer has the layers as first dimension.
            leading: Which of the first dimensions: layer, expert.
        """
        if name not in self.tensors and leading:
            name, leading = self._unstacked(name, leading[0]), leading[1:]
        self.used.add(name)
        kind, depth = self.tensors[name], len(leading)
        whole = torch.empty(kind.size[depth:], dtype=kind.properties.dtype)
        covered = 0
        for key, chunk in self.stored.chunks(name):
            ranges = list(zip(chunk.offsets, chunk.sizes, strict=True))
            inside = [
                start <= at < start + length
                for at, (start, length) in zip(leading, ranges, strict=False)
            ]
            if not all(inside):
                continue
            part = self.stored.chunk(key, chunk.sizes)
            for at, (start, _) in zip(leading, ranges, strict=False):
                part = part[at - start]
            place = tuple(slice(start, start + length) for start, length in ranges[depth:])
            whole[place] = part
            covered += part.numel()
        if covered != whole.numel():
            raise DamagedError(
                f"{INDEX} has {covered} of the {whole.numel()} values of {name} {list(leading)}"
            )
        return whole


GLM4_NORMS = {
    "input_layernorm": "input_layernorm",
    "post_attention_layernorm": "post_self_attn_layernorm",
    "pre_feedforward_layernorm": "post_attention_layernorm",
    "post_feedforward_layernorm": "post_mlp_layernorm",
}
"""Names of the authors' sandwich layer -> those of GLM-4, which has the same four norms."""


def interleave_rope(weight: Tensor, channels: int) -> Tensor:
    """Reorder the rows of queries or keys for a rotary embedding that turns neighbours.

    Llama's turns channel i with channel i + channels / 2 of a head, GLM-4's channel 2i with 2i + 1.

    Args:
        weight: [heads * channels, ...].
        channels: Of a head.
    """
    heads = weight.view(-1, 2, channels // 2, *weight.shape[1:])
    return heads.transpose(1, 2).reshape(weight.shape)
