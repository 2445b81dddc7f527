"""Megatron's linear layers with the GEMMs of an FP8 recipe, emulated.

The local ``ColumnParallelLinear`` and ``RowParallelLinear`` call ``_forward_impl`` for their matrix
product; this is put in its place, on the instances. What is around it stays Megatron's.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

from studies.fp8.formats import Quantized, quantize
from studies.fp8.recipes import Recipe
from studies.fp8.record import LINEARS, Recorder

Quantizer = Callable[[Tensor], tuple[Quantized, Quantized]]
"""Takes a tensor [rows, columns], float32; returns what the GEMM along its rows sees of it, and
what the one along its columns sees."""


def make_quantizer(recipe: Recipe | None, tensor: str) -> Quantizer:
    """Make what quantizes the "input", "weight" or "gradient" of one linear layer.

    Without a recipe the GEMMs see the tensor as it is.
    """
    if recipe is None:
        return lambda x: (Quantized(x, x),) * 2
    target = recipe.format_of(tensor)
    along_rows, along_columns = recipe.scalings_of(tensor)

    def quantizer(x: Tensor) -> tuple[Quantized, Quantized]:
        rows = quantize(x, along_rows(x), target)
        if along_columns is along_rows:
            return rows, rows
        return rows, quantize(x, along_columns(x), target)

    return quantizer


class EmulatedLinear:
    """Stands in for the matrix product of one linear layer."""

    def __init__(self, recipe: Recipe | None, note: Callable[[Quantized, Quantized], None]) -> None:
        """Make the quantizers of the layer's three tensors.

        ``note`` is told of each micro-batch's gradient, as both of its GEMMs see it.
        """
        self.input = make_quantizer(recipe, "input")
        self.weight = make_quantizer(recipe, "weight")
        self.gradient = make_quantizer(recipe, "gradient")
        self.note = note

    def __call__(self, input: Tensor, weight: Tensor, bias: Tensor | None, **_: Any) -> Tensor:
        """Return input weight^T + bias; input [s, b, k], weight [n, k]."""
        output: Tensor = _Fp8Product.apply(input, weight, self)
        return output if bias is None else output + bias


class _Fp8Product(torch.autograd.Function):
    """The three GEMMs of a linear layer, over dequantized tensors, summed in float32."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, linear: EmulatedLinear) -> Tensor:
        x, x_columns = linear.input(input.detach().flatten(0, -2).float())
        w, w_columns = linear.weight(weight.detach().float())
        ctx.save_for_backward(x_columns.seen, w_columns.seen)
        ctx.linear, ctx.shape, ctx.dtypes = linear, input.shape, (input.dtype, weight.dtype)
        return (x.seen @ w.seen.t()).to(input.dtype).view(*input.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        x, w = ctx.saved_tensors
        g, g_columns = ctx.linear.gradient(gradient.flatten(0, -2).float())
        ctx.linear.note(g, g_columns)
        input_dtype, weight_dtype = ctx.dtypes
        input_gradient = (g.seen @ w).to(input_dtype).view(ctx.shape)
        return input_gradient, (g_columns.seen.t() @ x).to(weight_dtype), None


def emulate(
    model_chunks: list[nn.Module], recipe: Recipe | None, recorder: Recorder
) -> list[nn.Module]:
    """Put the recipe into the branches of a model of the local implementation.

    Embedding, output head, attention's own products and norms stay as they are, as they do under
    Megatron's ``--fp8-format``. Without a recipe the gradients are only recorded.

    Returns:
        The model chunks, as Megatron's hooks must.
    """
    for module in (module for chunk in model_chunks for module in chunk.modules()):
        if isinstance(module, TransformerLayer):
            _emulate_layer(module, recipe, recorder)
    return model_chunks


def _emulate_layer(layer: Any, recipe: Recipe | None, recorder: Recorder) -> None:
    number = layer.layer_number
    if recipe is not None and not recipe.covers(number, layer.config.num_layers):
        recipe = None
    attention, mlp = layer.self_attention, layer.mlp
    modules = (attention.linear_qkv, attention.linear_proj, mlp.linear_fc1, mlp.linear_fc2)
    for name, module in zip(LINEARS, modules, strict=True):
        module._forward_impl = EmulatedLinear(recipe, partial(recorder.add, number, name))
