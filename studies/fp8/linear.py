"""Megatron's linear layers with the GEMMs of an FP8 recipe, emulated.

The local ``ColumnParallelLinear`` and ``RowParallelLinear`` call ``_forward_impl`` for their matrix
product; this is put in its place, on the instances. What is around it stays Megatron's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

from studies.fp8.formats import Loss, loss_of, quantize
from studies.fp8.recipes import Recipe
from studies.fp8.record import Recorder, Use


class Quantizer:
    """Quantizes one tensor of one linear layer, micro-batch after micro-batch."""

    def __init__(self, recipe: Recipe, tensor: str) -> None:
        """Take the recipe, and which tensor it is: "input", "weight" or "gradient"."""
        self.target = recipe.format_of(tensor)
        self.scaling = recipe.scaling_of(tensor)

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor, Callable[[], Use]]:
        """Quantize ``x`` [rows, columns], float32.

        Returns:
            What the GEMM along the rows sees of it, what the one along the columns sees, and a
            function that says what was lost.
        """
        along_rows, along_columns = self.scaling.scales(x)
        rows = columns = quantize(x, along_rows, self.target)
        if along_columns is not along_rows:
            columns = quantize(x, along_columns, self.target)

        def use() -> Use:
            lost = (loss_of(x, scale, self.target) for scale in (along_rows, along_columns))
            return Use(float(x.abs().amax()), float(along_rows.amax()), *lost)

        return rows, columns, use


class _Exact:
    """No FP8: the gradient is only looked at."""

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor, Callable[[], Use]]:
        def use() -> Use:
            norm = float(x.double().square().sum())
            nothing = Loss(x.numel(), int((x != 0).sum()), 0, 0, 0, norm, 0.0)
            return Use(float(x.abs().amax()), None, nothing, nothing)

        return x, x, use


class EmulatedLinear:
    """Stands in for the matrix product of one linear layer."""

    def __init__(self, recipe: Recipe | None, note: Callable[[Callable[[], Use]], None]) -> None:
        """Make the state of the layer's three tensors.

        Args:
            recipe: None: the product is exact, of the tensors as they are.
            note: Gets a function that says what became of each micro-batch's gradient.
        """
        kinds = ("input", "weight", "gradient")
        self.quantizers: dict[str, Any] = {
            kind: _Exact() if recipe is None else Quantizer(recipe, kind) for kind in kinds
        }
        self.note = note

    def __call__(self, input: Tensor, weight: Tensor, bias: Tensor | None, **_: Any) -> Tensor:
        """Return input weight^T + bias; input [s, b, k], weight [n, k]."""
        output: Tensor = _Fp8Product.apply(input, weight, self)
        return output if bias is None else output + bias


class _Fp8Product(torch.autograd.Function):
    """The three GEMMs of a linear layer, over dequantized tensors, summed in float32."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, linear: EmulatedLinear) -> Tensor:
        x, x_columns, _ = linear.quantizers["input"](input.detach().flatten(0, -2).float())
        w, w_columns, _ = linear.quantizers["weight"](weight.detach().float())
        ctx.save_for_backward(x_columns, w_columns)
        ctx.linear, ctx.shape, ctx.dtypes = linear, input.shape, (input.dtype, weight.dtype)
        return (x @ w.t()).to(input.dtype).view(*input.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        x, w = ctx.saved_tensors
        flat = gradient.flatten(0, -2).float()
        g, g_columns, use = ctx.linear.quantizers["gradient"](flat)
        ctx.linear.note(use)
        input_dtype, weight_dtype = ctx.dtypes
        input_gradient = (g @ w).to(input_dtype).view(ctx.shape)
        return input_gradient, (g_columns.t() @ x).to(weight_dtype), None


def branch_linears(model_chunks: list[nn.Module]) -> dict[tuple[int, str], Any]:
    """Find the linear layers of the residual branches: (layer 1..L, name) -> module."""
    found: dict[tuple[int, str], Any] = {}
    for chunk in model_chunks:
        for layer in chunk.modules():
            if isinstance(layer, TransformerLayer):
                attention, mlp = layer.self_attention, layer.mlp
                modules = (attention.linear_qkv, attention.linear_proj, mlp.linear_fc1)
                for name, module in zip(
                    ("qkv", "proj", "fc1", "fc2"), (*modules, mlp.linear_fc2), strict=True
                ):
                    found[layer.layer_number, name] = module
    return found


def emulate(model_chunks: list[nn.Module], recipe: Recipe | None, recorder: Recorder) -> None:
    """Put the recipe into the branches of a model of the local implementation.

    Embedding, output head, attention's own products and norms stay as they are, as they do under
    Megatron's ``--fp8-format``.

    Args:
        model_chunks: The model, on one rank.
        recipe: None: no FP8, gradients are only recorded.
        recorder: Where the gradients are taken down.
    """
    linears = branch_linears(model_chunks)
    num_layers = max(layer for layer, _ in linears)
    for (layer, name), module in linears.items():
        covered = recipe if recipe is None or recipe.covers(layer, num_layers) else None
        note = _note(recorder, layer, name)
        module._forward_impl = EmulatedLinear(covered, note)


def _note(recorder: Recorder, layer: int, name: str) -> Callable[[Callable[[], Use]], None]:
    def note(use: Callable[[], Use]) -> None:
        if recorder.wanted:
            recorder.add(layer, name, use())

    return note
