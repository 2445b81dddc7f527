"""The transformer layer with the residual hook: x + alpha F(N(x)) for each of its branches.

Megatron's TransformerLayer adds a branch to the residual stream in its bias-dropout-add ("bda")
submodules, ``self_attn_bda`` and ``mlp_bda``. ProRes scales there and nowhere else, so that
recompute, every kind of parallelism, MoE, MLA and the fine-grained schedules that call a layer's
bda themselves all see it, and Transformer Engine's low-precision GEMMs stay as they are: the scalar
multiplies their high-precision output (paper, section 3).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import bias_dropout_add_unfused
from megatron.core.jit import jit_fuser
from megatron.core.transformer.transformer_layer import MoETransformerLayer, TransformerLayer
from torch import Tensor

BranchOutput = tuple[Tensor, Tensor | None]
"""What a branch hands to its bda: output [s, b, h] and the bias [h] that is still to be added."""

BiasDropoutAdd = Callable[[BranchOutput, Tensor, float], Tensor]
"""(branch output and bias, residual [s, b, h], dropout probability) -> new residual [s, b, h]."""


def _scaled_bias_dropout_add(
    x_with_bias: BranchOutput, residual: Tensor, prob: float, *, training: bool, alpha: Tensor
) -> Tensor:
    """Gives residual + dropout(alpha * (x + bias)), [s, b, h].

    The product is taken in float32: alpha moves by less than bfloat16 can tell apart. Autograd
    keeps nothing for it but alpha itself, as alpha needs no gradient.
    """
    x, bias = x_with_bias
    x = (x.float() * alpha).to(residual.dtype)
    if bias is not None:
        bias = (bias.float() * alpha).to(residual.dtype)
    return bias_dropout_add_unfused(training)((x, bias), residual, prob)


@jit_fuser
def _scaled_bias_dropout_add_fused_train(
    x_with_bias: BranchOutput, residual: Tensor, prob: float, alpha: Tensor
) -> Tensor:
    return _scaled_bias_dropout_add(x_with_bias, residual, prob, training=True, alpha=alpha)


@jit_fuser
def _scaled_bias_dropout_add_fused_inference(
    x_with_bias: BranchOutput, residual: Tensor, prob: float, alpha: Tensor
) -> Tensor:
    return _scaled_bias_dropout_add(x_with_bias, residual, prob, training=False, alpha=alpha)


class ProResLayerMixin:
    """Scales the residual branches of a Megatron transformer layer by ``alpha``.

    ``alpha`` is a float32 scalar tensor on the layer's device, changed in place by
    :meth:`set_alpha`: nothing recompiles when it moves, and a captured CUDA graph reads the new
    value. It is neither a parameter nor a buffer: it is in no state dict, and a model that is cast
    to bfloat16 keeps it in full precision.
    """

    alpha: Tensor
    layer_number: int
    is_mtp_layer: bool

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.alpha = torch.ones((), dtype=torch.float32, device=_device_of(self))
        self._alpha_value = 1.0
        # A graph replays the path that it captured: there the scaled one must stay, at 1 as well.
        self._always_scale = self.config.cuda_graph_impl != "none"  # type: ignore[attr-defined]
        self.self_attn_bda = partial(self._get_bda, self.self_attn_bda)  # type: ignore[has-type]
        self.mlp_bda = partial(self._get_bda, self.mlp_bda)  # type: ignore[has-type]

    @property
    def prores_layer(self) -> int | None:
        """l, this layer's place among the L layers of the whole model, from 1; None outside them.

        ``layer_number`` already counts over pipeline and virtual-pipeline stages. Multi-token
        prediction layers number from 1 again and are not part of the L layers.
        """
        return None if self.is_mtp_layer else self.layer_number

    def set_alpha(self, value: float) -> None:
        """Sets alpha in place; takes effect with the next forward pass.

        Args:
            value: alpha(l, t), within [0, 1].
        """
        # The GPU is left alone when nothing changes, which is always so once a layer is open.
        if value != self._alpha_value:
            self.alpha.fill_(value)
            self._alpha_value = value

    def _get_bda(
        self, get_stock_bda: Callable[[bool, bool], BiasDropoutAdd], training: bool, fused: bool
    ) -> BiasDropoutAdd:
        """Stands in for the layer's bda submodule: stock once the layer is open, else scaled."""
        if self._alpha_value == 1.0 and not self._always_scale:
            return get_stock_bda(training, fused)
        if not fused:
            return partial(_scaled_bias_dropout_add, training=training, alpha=self.alpha)
        if training:
            return partial(_scaled_bias_dropout_add_fused_train, alpha=self.alpha)
        return partial(_scaled_bias_dropout_add_fused_inference, alpha=self.alpha)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Lets alpha follow the layer to another device, but not to another dtype."""
        module = super()._apply(fn, recurse)  # type: ignore[misc]
        if self.alpha.device != (device := _device_of(self)):
            self.alpha = torch.full((), self._alpha_value, dtype=torch.float32, device=device)
        return module


def _device_of(layer: Any) -> torch.device:
    return next(layer.parameters()).device


class ProResTransformerLayer(ProResLayerMixin, TransformerLayer):
    """Megatron's transformer layer with ProRes."""


class ProResMoETransformerLayer(ProResLayerMixin, MoETransformerLayer):
    """Megatron's mixture-of-experts transformer layer with ProRes."""


PRORES_LAYERS: dict[type, type] = {
    TransformerLayer: ProResTransformerLayer,
    MoETransformerLayer: ProResMoETransformerLayer,
}
"""Stock layer class -> its counterpart with ProRes."""
