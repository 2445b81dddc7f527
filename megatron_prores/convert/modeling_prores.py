"""The language model of Megatron-ProRes for the library transformers, whatever its norm placement.

Read top to bottom: a configuration, a norm, a decoder layer, a model. Attention, MLP and rotary
embedding are Llama's; attention goes through transformers' attention interface.

In training, ProRes multiplies every branch by a scalar that grows from 0 to 1 (arXiv 2603.05369).
An export has it in its weights: nothing of the warmup is left here.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm


class ProResConfig(LlamaConfig):
    """Llama's configuration, and where the norms are."""

    model_type = "prores"

    norm_placement: str = "pre"
    """``pre``, ``lns``: x + F(N(x)). ``sandwich``: x + N2(F(N1(x))). ``post``: N(x + F(x)).
    ``deepnorm``: N(d x + F(x)), with d = (2 layers)^(1/4)."""
    normalization: str = "RMSNorm"
    """``RMSNorm`` or ``LayerNorm``; both take their epsilon from ``rms_norm_eps``."""


def make_norm(config: ProResConfig) -> nn.Module:
    """Build a norm over the last dimension, [b, s, h] -> [b, s, h]."""
    if config.normalization == "LayerNorm":
        return nn.LayerNorm(config.hidden_size, eps=config.rms_norm_eps)
    return LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class ProResDecoderLayer(LlamaDecoderLayer):
    """A transformer layer with its norms before, behind, or around its branches."""

    def __init__(self, config: ProResConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        for name in ("input_layernorm", "post_attention_layernorm"):
            delattr(self, name)
        self.placement = config.norm_placement
        self.stream_gain = 1.0
        if self.placement in ("pre", "lns"):
            self.input_layernorm = make_norm(config)
            self.post_attention_layernorm = make_norm(config)  # stands before the MLP, as in Llama
        elif self.placement == "sandwich":
            self.input_layernorm = make_norm(config)
            self.post_attention_layernorm = make_norm(config)
            self.pre_feedforward_layernorm = make_norm(config)
            self.post_feedforward_layernorm = make_norm(config)
        elif self.placement in ("post", "deepnorm"):
            self.post_attention_layernorm = make_norm(config)
            self.post_feedforward_layernorm = make_norm(config)
            if self.placement == "deepnorm":
                self.stream_gain = (2.0 * config.num_hidden_layers) ** 0.25
        else:
            raise ValueError(f"norm_placement={self.placement!r}: no such placement")

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """Add attention and MLP to the residual stream, [b, s, h] -> [b, s, h]."""

        def attention(x: Tensor) -> Tensor:
            return self.self_attn(hidden_states=x, **kwargs)[0]

        x = hidden_states
        if self.placement in ("pre", "lns"):
            x = x + attention(self.input_layernorm(x))
            return x + self.mlp(self.post_attention_layernorm(x))
        if self.placement == "sandwich":
            x = x + self.post_attention_layernorm(attention(self.input_layernorm(x)))
            return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))
        x = self.post_attention_layernorm(self.stream_gain * x + attention(x))
        return self.post_feedforward_layernorm(self.stream_gain * x + self.mlp(x))


class ProResModel(LlamaModel):
    """The layers between the embedding and the head."""

    config_class = ProResConfig
    _no_split_modules = ("ProResDecoderLayer",)

    def __init__(self, config: ProResConfig) -> None:
        super().__init__(config)
        layers = [ProResDecoderLayer(config, i) for i in range(config.num_hidden_layers)]
        self.layers = nn.ModuleList(layers)
        self.norm = make_norm(config)
        self.post_init()


class ProResForCausalLM(LlamaForCausalLM):
    """The language model."""

    config_class = ProResConfig

    def __init__(self, config: ProResConfig) -> None:
        super().__init__(config)
        self.model = ProResModel(config)
        self.post_init()
