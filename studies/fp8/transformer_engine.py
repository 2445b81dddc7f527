"""The same figures from the real recipes, on a GPU: written, but not run yet.

Megatron's own layers run with Transformer Engine's recipe; nothing is put in their place. Before a
linear layer's backward pass a copy of its own quantizer is applied to the gradient that arrives,
and what it makes of it is compared with the gradient. Under delayed scaling this is the scale that
the backward pass is about to use, and its amax goes into the history twice, which changes nothing.
Written against Transformer Engine 2.20.2 (``module/base.py``: ``quantizers["scaling_bwd"]``).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from studies.fp8.formats import E4M3, loss_between
from studies.fp8.linear import branch_linears
from studies.fp8.recipes import Recipe
from studies.fp8.record import Recorder, Use


def watch(model_chunks: list[nn.Module], recipe: Recipe | None, recorder: Recorder) -> None:
    """Take down what Transformer Engine's quantizers make of the branch gradients.

    Args:
        model_chunks: The model, of Transformer Engine's layers, on one rank.
        recipe: The recipe that Megatron runs with; None: bf16.
        recorder: Where the gradients are taken down.
    """
    for (layer, name), module in branch_linears(model_chunks).items():
        _watch_linear(module, layer, name, recipe, recorder)


def _watch_linear(
    module: Any, layer: int, name: str, recipe: Recipe | None, recorder: Recorder
) -> None:
    def before_backward(_: nn.Module, gradients: tuple[Tensor | None, ...]) -> None:
        gradient = gradients[0]
        if gradient is None or not recorder.wanted:
            return
        flat = gradient.detach().flatten(0, -2).contiguous()
        seen, scale, target = flat, None, E4M3
        quantizers = module.quantizers["scaling_bwd"] if recipe is not None else []
        if recipe is not None and quantizers:  # else bf16, or a layer that is kept in it
            quantizer = quantizers[0].copy()  # the module sets which usage its own one is for
            quantizer.set_usage(rowwise=True, columnwise=False)
            quantized = quantizer(flat)
            seen, target = quantized.dequantize(), recipe.format_of("gradient")
            if recipe.recipe in ("delayed", "tensorwise"):  # one scale for the whole tensor
                scale = 1.0 / quantized._scale_inv
        loss = loss_between(flat.float(), seen.float(), scale, target)
        used = None if scale is None else float(scale)
        recorder.add(layer, name, Use(float(flat.abs().amax()), used, loss, loss))

    module.register_full_backward_pre_hook(before_backward)
