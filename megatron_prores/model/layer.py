"""The layer with the residual hook: x + alpha F(N(x)), or where else the norms sit.

Megatron's TransformerLayer adds a branch to the residual stream in its bias-dropout-add ("bda")
submodules, ``self_attn_bda`` and ``mlp_bda``; a hybrid model's layers have one of them, or
``mamba_bda``. ProRes scales there and nowhere else, so that
recompute, every kind of parallelism, MoE, MLA and the fine-grained schedules that call a layer's
bda themselves all see it, and Transformer Engine's low-precision GEMMs stay as they are: the scalar
multiplies their high-precision output (paper, section 3).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from megatron.core.fusions.fused_bias_dropout import bias_dropout_add_unfused
from megatron.core.jit import jit_fuser
from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.transformer.enums import CudaGraphModule
from megatron.core.transformer.identity_op import IdentityFuncOp, IdentityOp
from megatron.core.transformer.torch_norm import LayerNormBuilder
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    MoETransformerLayer,
    TransformerLayer,
    TransformerLayerSubmodules,
)
from torch import Tensor

from megatron_prores.config.placement import PLACEMENTS
from megatron_prores.schedule.depth import Depths

BranchOutput = tuple[Tensor, Tensor | None]
"""What a branch hands to its bda: output [s, b, h] and the bias [h] that is still to be added."""

BiasDropoutAdd = Callable[[BranchOutput, Tensor, float], Tensor]
"""(branch output and bias, residual [s, b, h], dropout probability) -> new residual [s, b, h]."""


def _scaled_bias_dropout_add(
    x_with_bias: BranchOutput, residual: Tensor, prob: float, *, training: bool, alpha: Tensor
) -> Tensor:
    """Return residual + dropout(alpha * (x + bias)), [s, b, h].

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


@dataclass
class ProResLayerSubmodules(TransformerLayerSubmodules):
    """Megatron's parts of a layer, and the norms that stand behind a branch."""

    post_self_attn_layernorm: LayerNormBuilder = IdentityOp
    """N2 of the attention branch (sandwich), or N of its sum (post, deepnorm)."""
    post_mlp_layernorm: LayerNormBuilder = IdentityOp
    """N2 of the MLP branch (sandwich), or N of its sum (post, deepnorm)."""


@dataclass
class ProResMambaLayerSubmodules(MambaLayerSubmodules):
    """Megatron's parts of a Mamba layer, and the norm that stands behind its branch."""

    post_mamba_layernorm: LayerNormBuilder = IdentityOp
    """N2 of the branch (sandwich), or N of its sum (post, deepnorm)."""


class Branch(NamedTuple):
    """What a branch of a layer is made of, by the names of the layer's parts."""

    module: str
    """F."""
    input_norm: str
    """The norm before it, where that is not fused into F."""
    bda: str
    """What adds it to the residual stream; ``IdentityFuncOp`` in a layer without the branch."""
    output_norm: str
    """The norm that a placement may put behind it."""


TRANSFORMER_BRANCHES = (
    Branch("self_attention", "input_layernorm", "self_attn_bda", "post_self_attn_layernorm"),
    Branch("mlp", "pre_mlp_layernorm", "mlp_bda", "post_mlp_layernorm"),
)
MAMBA_BRANCHES = (Branch("mixer", "norm", "mamba_bda", "post_mamba_layernorm"),)


class ProResLayerMixin:
    """Scales the residual branches of a Megatron layer by ``alpha``.

    ``alpha`` is a float32 scalar tensor on the layer's device, changed in place by
    :meth:`set_alpha`: nothing recompiles when it moves, and a captured CUDA graph reads the new
    value. It is neither a parameter nor a buffer: it is in no state dict, and a model that is cast
    to bfloat16 keeps it in full precision.
    """

    alpha: Tensor
    layer_number: int
    is_mtp_layer: bool = False
    _stock_bda: Callable[[bool, bool], BiasDropoutAdd] | None = None
    """Megatron's bda submodule, the same for all branches."""

    branches: ClassVar[tuple[Branch, ...]] = TRANSFORMER_BRANCHES

    def __init__(
        self,
        config: TransformerConfig,
        submodules: ProResLayerSubmodules | ProResMambaLayerSubmodules,
        *args: Any,
        norm_placement: str = "pre",
        depths: Depths | None = None,
        **kwargs: Any,
    ) -> None:
        """Build Megatron's layer and put the hook into it.

        Args:
            config: The model's configuration.
            submodules: Of the layer.
            *args: As for Megatron's layer.
            norm_placement: One of ``placement.PLACEMENTS``.
            depths: l of every layer of a hybrid model; None where the layers are the L.
            **kwargs: As for Megatron's layer.
        """
        super().__init__(config, submodules, *args, **kwargs)  # type: ignore[call-arg]
        self.placement = PLACEMENTS[norm_placement]
        self.depths = depths
        self.stream_gain = self.placement.stream_gain(depths[-1] if depths else config.num_layers)
        norm_arguments = {
            "config": config,
            "hidden_size": config.hidden_size,
            "eps": config.layernorm_epsilon,
        }
        for branch in self.branches:
            output_norm = getattr(submodules, branch.output_norm)(**norm_arguments)
            setattr(self, branch.output_norm, output_norm)

        self.alpha = torch.ones((), dtype=torch.float32, device=_device_of(self))
        self._alpha_value = 1.0
        # A graph replays the path that it captured: there the scaled one must stay, at 1 as well.
        self._always_scale = config.cuda_graph_impl != "none"
        for branch in self.branches:
            stock = getattr(self, branch.bda)
            # A layer without this branch: there is nothing to add, nor to scale.
            if not isinstance(stock, IdentityFuncOp):
                norm = getattr(self, branch.output_norm)
                setattr(self, branch.bda, partial(self._get_bda, stock, norm))
                self._stock_bda = stock
        if not self.placement.is_stock:
            # Megatron enables gradients around every bda, even in an evaluation and in the first
            # pass of a recomputed layer. Our norms have weights: autograd would keep a graph.
            self.bias_dropout_add_exec_handler = contextlib.nullcontext

    @property
    def prores_layer(self) -> int | None:
        """l, this layer's place among the L layers of the whole model, from 1; None outside them.

        ``layer_number`` already counts over pipeline and virtual-pipeline stages. Multi-token
        prediction layers number from 1 again and are not part of the L layers.
        """
        if self.is_mtp_layer:
            return None
        return self.depths[self.layer_number - 1] if self.depths else self.layer_number

    def set_alpha(self, value: float) -> None:
        """Set alpha in place; takes effect with the next forward pass.

        Args:
            value: alpha(l, t), within [0, 1].
        """
        # The GPU is left alone when nothing changes, which is always so once a layer is open.
        if value != self._alpha_value:
            self.alpha.fill_(value)
            self._alpha_value = value

    def compile_stock_addition(self, shape: tuple[int, int, int]) -> None:
        """Compile Megatron's own addition, which the layer takes once it is open.

        All layers of a process share it. Megatron's warm-up of fused functions calls it with a bias
        and dropout, and torch.compile wants a version for every kind of arguments: else the first
        layer that opens would stop the run to compile.

        Args:
            shape: [s, b, h] of the residual stream on this rank.
        """
        config: TransformerConfig = self.config  # type: ignore[attr-defined]
        if self._always_scale or self._stock_bda is None or not config.bias_dropout_fusion:
            return
        device = self.alpha.device
        like: dict[str, Any] = {"dtype": config.params_dtype, "device": device}
        bias = None
        if config.add_bias_linear and not self.placement.branch_output_norm:
            bias = torch.nn.Parameter(torch.zeros(shape[-1], **like))
        residual_type = torch.float32 if config.fp32_residual_connection else config.params_dtype
        # A layer that is recomputed as a whole first runs on inputs without gradients.
        recomputed = config.recompute_granularity == "full"
        for training, grad in [(True, True), *[(True, False)] * recomputed, (False, False)]:
            branch = torch.zeros(shape, **like, requires_grad=grad)
            residual = torch.zeros_like(branch, dtype=residual_type, requires_grad=grad)
            with (
                torch.set_grad_enabled(grad),
                self.bias_dropout_add_exec_handler(),
                # Dropout draws here, and the run must not see it.
                torch.random.fork_rng([device] if device.type == "cuda" else []),
            ):
                bda, x = self._stock_bda(training, True), residual
                for _ in ("attention", "mlp"):
                    # In an evaluation the sum takes the place of the branch.
                    x = bda((branch.clone(), bias), x, self.hidden_dropout)  # type: ignore[attr-defined]
            if grad:
                torch.autograd.grad(x.sum(), (branch, residual))

    def place_alpha(self, device: torch.device) -> None:
        """Move alpha to a device, with its value.

        Args:
            device: Where the layer computes.
        """
        if self.alpha.device != device:
            self.alpha = torch.full((), self._alpha_value, dtype=torch.float32, device=device)

    def _get_bda(
        self,
        get_stock_bda: Callable[[bool, bool], BiasDropoutAdd],
        norm: Callable[[Tensor], Tensor],
        training: bool,
        fused: bool,
    ) -> BiasDropoutAdd:
        """Stand in for a bda submodule of the layer: (training, fused) -> bda."""
        add = self._get_addition(get_stock_bda, training, fused)
        return add if self.placement.is_stock else partial(self._add_with_norm, add, norm)

    def _get_addition(
        self, get_stock_bda: Callable[[bool, bool], BiasDropoutAdd], training: bool, fused: bool
    ) -> BiasDropoutAdd:
        """Return the addition x + a F: stock once the layer is open, else scaled."""
        if self._alpha_value == 1.0 and not self._always_scale:
            return get_stock_bda(training, fused)
        if not fused:
            return partial(_scaled_bias_dropout_add, training=training, alpha=self.alpha)
        if training:
            return partial(_scaled_bias_dropout_add_fused_train, alpha=self.alpha)
        return partial(_scaled_bias_dropout_add_fused_inference, alpha=self.alpha)

    def _add_with_norm(
        self,
        add: BiasDropoutAdd,
        norm: Callable[[Tensor], Tensor],
        branch_with_bias: BranchOutput,
        x: Tensor,
        prob: float,
    ) -> Tensor:
        """Add a branch to the stream with the norm behind it, all [s, b, h].

        Sandwich: x + a N(F). Post: N(x + a F). Deepnorm: N(d x + a F).
        """
        if self.placement.branch_output_norm:
            branch, bias = branch_with_bias
            return add((norm(branch if bias is None else branch + bias), None), x, prob)
        if self.stream_gain != 1.0:
            x = self.stream_gain * x
        return norm(add(branch_with_bias, x, prob))

    def _get_submodules_under_cudagraphs(self) -> list[Any]:
        """Count the norms behind a branch among what a graph of a part of the layer covers.

        Upstream calls the pre-forward hooks of these modules by hand before a replay: with
        ``--overlap-param-gather`` they wait for the weights that the graph is about to read.
        """
        modules = super()._get_submodules_under_cudagraphs()  # type: ignore[misc]
        parts = self.config.cuda_graph_modules  # type: ignore[attr-defined]
        if self in modules:
            return modules  # the layer as a whole
        mlp = CudaGraphModule.moe if self.is_moe_layer else CudaGraphModule.mlp  # type: ignore[attr-defined]
        if CudaGraphModule.attn in parts:
            modules.append(self.post_self_attn_layernorm)  # type: ignore[attr-defined]
        if mlp in parts:
            modules.append(self.post_mlp_layernorm)  # type: ignore[attr-defined]
        return modules

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Let alpha follow the layer to another device, but not to another dtype."""
        module = super()._apply(fn, recurse)  # type: ignore[misc]
        self.place_alpha(_device_of(self))
        return module


def _device_of(layer: Any) -> torch.device:
    # A layer with both branches left out has no parameters, and its alpha multiplies nothing.
    parameter = next(layer.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


class ProResTransformerLayer(ProResLayerMixin, TransformerLayer):
    """Megatron's transformer layer with ProRes."""


class ProResMoETransformerLayer(ProResLayerMixin, MoETransformerLayer):
    """Megatron's mixture-of-experts transformer layer with ProRes."""


class ProResMLPLayer(ProResLayerMixin, MLPLayer):
    """A hybrid model's layer of an MLP alone, with ProRes."""


class ProResMambaLayer(ProResLayerMixin, MambaLayer):
    """A hybrid model's Mamba layer, with ProRes."""

    branches: ClassVar[tuple[Branch, ...]] = MAMBA_BRANCHES


PRORES_LAYERS: dict[type, type[ProResLayerMixin]] = {
    TransformerLayer: ProResTransformerLayer,
    MoETransformerLayer: ProResMoETransformerLayer,
    MLPLayer: ProResMLPLayer,
    MambaLayer: ProResMambaLayer,
}
"""Stock layer class -> its counterpart with ProRes."""
