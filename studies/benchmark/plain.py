"""The rival: a plain PyTorch training loop of the paper's model, as one would write it in a day.

Nothing of Megatron's is in it: modules of torch, its AdamW and its gradient clipping, one process.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Recipe:
    """The sizes of the model, and how it is trained."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    vocabulary: int
    seq_length: int
    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    clip_grad: float


class Attention(nn.Module):
    """Causal self-attention with rotary positions, by torch's fused kernel."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.heads = recipe.heads
        size = recipe.hidden
        self.q_proj = nn.Linear(size, size, bias=False)
        self.k_proj = nn.Linear(size, size, bias=False)
        self.v_proj = nn.Linear(size, size, bias=False)
        self.o_proj = nn.Linear(size, size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Attend: [b, s, h] -> [b, s, h]; cos and sin are [s, d]."""
        q, k, v = (
            projection(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(y.transpose(1, 2).flatten(2))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (i, i + d / 2) of each head by their angles; x is [b, n, s, d]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(recipe.hidden, recipe.ffn, bias=False)
        self.up_proj = nn.Linear(recipe.hidden, recipe.ffn, bias=False)
        self.down_proj = nn.Linear(recipe.ffn, recipe.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[b, s, h] -> [b, s, h]."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """x + alpha F(N(x)), for attention and MLP."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(recipe.hidden, eps=1e-5)
        self.self_attn = Attention(recipe)
        self.post_attention_layernorm = nn.RMSNorm(recipe.hidden, eps=1e-5)
        self.mlp = MLP(recipe)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, alpha: float) -> Tensor:
        """[b, s, h] -> [b, s, h]."""
        x = x + alpha * self.self_attn(self.input_layernorm(x), cos, sin)
        return x + alpha * self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """What is before the output head."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(recipe.vocabulary, recipe.hidden)
        self.layers = nn.ModuleList(Layer(recipe) for _ in range(recipe.layers))
        self.norm = nn.RMSNorm(recipe.hidden, eps=1e-5)
        size = recipe.hidden // recipe.heads
        inverse = 10000.0 ** (-torch.arange(0, size, 2) / size)
        angles = torch.outer(torch.arange(recipe.seq_length), inverse).repeat(1, 2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, tokens: Tensor, alphas: Sequence[float]) -> Tensor:
        """[b, s] -> [b, s, h]."""
        x = self.embed_tokens(tokens)
        for layer, alpha in zip(self.layers, alphas, strict=True):
            x = layer(x, self.cos, self.sin, alpha)
        return self.norm(x)


class PlainModel(nn.Module):
    """The paper's Llama-like decoder, with Llama's names of weights."""

    def __init__(self, recipe: Recipe) -> None:
        """Build it with torch's initial weights."""
        super().__init__()
        self.model = Decoder(recipe)
        self.lm_head = nn.Linear(recipe.hidden, recipe.vocabulary, bias=False)

    def forward(self, tokens: Tensor, labels: Tensor, alphas: Sequence[float]) -> Tensor:
        """Return the mean cross entropy of labels [b, s] after tokens [b, s]."""
        logits = self.lm_head(self.model(tokens, alphas))
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


class PlainLoop:
    """The model and its optimizer, ready for training steps."""

    def __init__(self, recipe: Recipe, weights: Mapping[str, Tensor]) -> None:
        """Build the model with these weights, by their Llama names."""
        self.model = PlainModel(recipe)
        self.model.load_state_dict(weights)
        self.clip_grad = recipe.clip_grad
        named = [*self.model.named_parameters()]
        decayed = [each for name, each in named if each.dim() > 1 and "embed" not in name]
        rest = [each for name, each in named if each.dim() == 1 or "embed" in name]
        groups: list[dict[str, Any]] = [{"params": decayed}]
        groups.append({"params": rest, "weight_decay": 0.0})
        self.optimizer = torch.optim.AdamW(
            groups,
            lr=recipe.lr,
            betas=recipe.betas,
            eps=recipe.eps,
            weight_decay=recipe.weight_decay,
            fused=False,  # torch's default on a CPU
        )

    def train(self, steps: Iterable[tuple[Tensor, Tensor, Sequence[float]]]) -> tuple[float, float]:
        """Take training steps.

        Args:
            steps: Tokens and labels [b, s], and alpha of each layer.

        Returns:
            Seconds per step, and the loss of the last one.
        """
        started, count, loss = time.perf_counter(), 0, torch.zeros(())
        for tokens, labels, alphas in steps:
            loss = self.model(tokens, labels, alphas)
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_grad)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            count += 1
        return (time.perf_counter() - started) / count, loss.item()
