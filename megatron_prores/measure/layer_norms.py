"""The size of every layer in a training step: residual stream, branches, gradient, weights.

A measured step has stand-ins for the bias-dropout-add of its layers, the one place where a branch
meets the residual stream, with ProRes and without; after the step the layers are as they were.
docs/measurements.md defines the figures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from megatron.core import parallel_state
from megatron.core.optimizer import DistributedOptimizer
from megatron.core.tensor_parallel.layers import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.identity_op import IdentityFuncOp
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

from megatron_prores.model.layer import BiasDropoutAdd, BranchOutput, ProResLayerMixin
from megatron_prores.upstream.optimizer import call_before_clipping
from megatron_prores.upstream.registry import undo
from megatron_prores.warmup.scalars import has_writer, log_scalars

BRANCHES = (
    ("attention", "self_attn_bda", "post_self_attn_layernorm"),
    ("mlp", "mlp_bda", "post_mlp_layernorm"),
)
"""A branch, its bias-dropout-add in Megatron's layer, and the norm that may stand behind it."""

Figures = dict[str, npt.NDArray[np.float64]]
"""Name of a figure -> its value for layer 1..L, float64 [L]."""


class LayerNormsLog:
    """Measures every N-th iteration and logs it (``--log-layer-norms-interval``)."""

    def __init__(self, interval: int, num_layers: int, hidden_size: int) -> None:
        """Take N in iterations, L, and the channels of the residual stream."""
        self.interval = interval
        self.num_layers = num_layers
        self.hidden_size = hidden_size

    def around_step(
        self, step: Callable[[], Any], iteration: int, chunks: Sequence[nn.Module], optimizer: Any
    ) -> Any:
        """Run a training step, and measure it where its iteration is one of every N."""
        if iteration % self.interval:
            return step()
        meter = LayerMeter(self.num_layers)
        with meter.measuring(chunks, optimizer):
            result = step()
        if figures := meter.figures(self.hidden_size):
            log_scalars(
                {
                    figure_tag(name, layer): float(value)
                    for name, values in figures.items()
                    for layer, value in enumerate(values, start=1)
                },
                iteration,
            )
        return result


class LayerMeter:
    """Sums of squares of one training step, by layer.

    Nothing waits for the device: each quantity costs one reduction, and one collective adds up the
    ranks. What several ranks hold alike (activations without sequence parallelism, the stream
    at the border of two stages) they all count, elements as well as squares, which leaves the
    means as they are. Of weights and gradients each element is counted on one rank only.
    """

    def __init__(self, num_layers: int) -> None:
        """Take L, the layers of the whole model."""
        # Places of the table: the stream before the first branch and behind each of the 2 L, what
        # each branch adds, the gradient and the weights of each layer.
        self.num_layers = num_layers
        self.added = 2 * num_layers + 1
        self.gradient = self.added + 2 * num_layers
        self.weight = self.gradient + num_layers
        self.norms: list[Tensor] = []
        self.places: list[int] = []
        self.counts = np.zeros(self.weight + num_layers)
        self.scales: dict[int, Tensor] = {}
        """Place -> scalar that its norms are multiplied by."""

    @contextmanager
    def measuring(self, chunks: Sequence[nn.Module], optimizer: Any) -> Iterator[None]:
        """Measure the training step of the block.

        Args:
            chunks: The model chunks of this rank, wrapped or not.
            optimizer: Megatron's, which takes the step.
        """
        with ExitStack() as undoing:
            for chunk in chunks:
                before_first = True
                for layer in layers_of(chunk):
                    for branch in range(len(BRANCHES)):
                        if self._watch(layer, branch, before_first, undoing):
                            before_first = False
            call_before_clipping(optimizer, partial(self._read_parameters, chunks, optimizer))
            undoing.callback(undo, call_before_clipping)
            yield

    def _watch(
        self, layer: TransformerLayer, branch: int, before_first: bool, undoing: ExitStack
    ) -> bool:
        """Put a stand-in in the place of a bias-dropout-add; False where there is no branch."""
        _, name, norm_name = BRANCHES[branch]
        get_bda = getattr(layer, name)
        if isinstance(get_bda, IdentityFuncOp):  # a heterogeneous model leaves the branch out
            return False
        position = 2 * (layer.layer_number - 1) + branch
        adds = self.added + position
        behind_norm = False
        if isinstance(layer, ProResLayerMixin):
            # Where the layer is open, alpha is 1.
            self.scales[adds] = layer.alpha
            behind_norm = layer.placement.branch_output_norm

        def get_measured(training: bool, fused: bool) -> BiasDropoutAdd:
            add = get_bda(training, fused)

            def measured(branch_with_bias: BranchOutput, residual: Tensor, prob: float) -> Tensor:
                if before_first:
                    self._count(position, residual)
                if not behind_norm:
                    output, bias = branch_with_bias
                    self._count(adds, output if bias is None else output.detach() + bias.detach())
                stream = add(branch_with_bias, residual, prob)
                self._count(position + 1, stream)
                return stream

            return measured

        # Of this object alone, not of Megatron's class.
        vars(layer)[name] = get_measured
        undoing.callback(vars(layer).__setitem__, name, get_bda)
        if behind_norm:
            norm = getattr(layer, norm_name)
            hook = norm.register_forward_hook(
                lambda module, given, output: self._count(adds, output)
            )
            undoing.callback(hook.remove)
        return True

    def _count(self, place: int, values: Tensor) -> None:
        # A recomputed layer runs a second time, within the backward pass.
        if torch._C._current_graph_task_id() == -1:
            norm = torch.linalg.vector_norm(values.detach(), dtype=torch.float32)
            self._keep(place, [norm], values.numel())

    def _keep(self, place: int, norms: Sequence[Tensor], count: int) -> None:
        self.norms += norms
        self.places += [place] * len(norms)
        self.counts[place] += count

    def _read_parameters(self, chunks: Sequence[nn.Module], optimizer: Any) -> None:
        """Measure weights, and gradients as they are reduced, before they are clipped."""
        shards = _shards(optimizer)
        for layer in (each for chunk in chunks for each in layers_of(chunk)):
            weights, gradients = [], []
            for parameter in layer.parameters():
                owned = _owned(parameter, shards)
                if owned is None or (gradient := getattr(parameter, "main_grad", None)) is None:
                    continue
                weights.append(parameter.detach().view(-1)[owned])
                gradients.append(gradient.view(-1)[owned])
            row = layer.layer_number - 1
            for place, tensors in ((self.weight, weights), (self.gradient, gradients)):
                if tensors:
                    norms = torch._foreach_norm(tensors, 2, dtype=torch.float32)
                    self._keep(place + row, norms, 0)
        # In fp16 the gradients still have the factor of the loss.
        inverse = 1 / optimizer.get_loss_scale().float()
        self.scales |= {self.gradient + row: inverse.view(()) for row in range(self.num_layers)}

    def figures(self, hidden_size: int) -> Figures | None:
        """Add up the ranks, and compute the figures: collective.

        Args:
            hidden_size: Channels of the residual stream.

        Returns:
            The figures where Megatron's writers are open; elsewhere None, and no waiting.
        """
        device = self.norms[0].device if self.norms else torch.empty(0, device="cuda").device
        table = torch.zeros(2, len(self.counts), dtype=torch.float64, device=device)
        if self.norms:
            squares = torch.stack(self.norms).double().square()
            table[0].index_add_(0, torch.tensor(self.places, device=device), squares)
        if self.scales:
            scales = torch.stack([*self.scales.values()]).to(device)
            table[0][[*self.scales]] *= scales.double().square()
        table[1] = torch.from_numpy(self.counts)
        torch.distributed.all_reduce(table)
        if not has_writer():
            return None
        sums, counts = table.cpu().numpy()
        return self._figures(sums, counts, hidden_size)

    def _figures(
        self, sums: npt.NDArray[np.float64], counts: npt.NDArray[np.float64], hidden_size: int
    ) -> Figures:
        means = np.divide(sums, counts, out=np.zeros_like(sums), where=counts > 0)
        stream, added = np.sqrt(means[: self.added]), np.sqrt(means[self.added : self.gradient])
        for place in range(1, self.added):
            if not counts[place]:  # no such branch: the stream passes by
                stream[place] = stream[place - 1]
        ratio = np.divide(added, stream[:-1], out=np.zeros_like(added), where=added != 0)
        behind = stream[2::2]
        found = {"residual_norm": behind * np.sqrt(hidden_size), "residual_rms": behind}
        for branch, (name, _, _) in enumerate(BRANCHES):
            found[f"{name}_norm"] = added[branch::2] * np.sqrt(hidden_size)
            found[f"{name}_rms"] = added[branch::2]
            found[f"{name}_ratio"] = ratio[branch::2]
        found["grad_norm"] = np.sqrt(sums[self.gradient : self.weight])
        found["weight_norm"] = np.sqrt(sums[self.weight :])
        return found


def layers_of(chunk: nn.Module) -> list[TransformerLayer]:
    """Return the layers of a model chunk without those of multi-token prediction."""
    return [
        module
        for module in chunk.modules()
        if isinstance(module, TransformerLayer) and not module.is_mtp_layer
    ]


def figure_tag(name: str, layer: int) -> str:
    """Name the scalar of a figure of one layer, counted from 1."""
    return f"prores/{name}/layer_{layer}"


def _shards(optimizer: Any) -> dict[nn.Parameter, slice] | None:
    """Return which elements of each parameter this rank updates; None where it updates all."""
    sharded = [
        each for each in optimizer.chained_optimizers if isinstance(each, DistributedOptimizer)
    ]
    if not sharded:
        return None
    buckets = [
        bucket
        for each in sharded
        if not each.is_stub_optimizer
        for by_dtype in each.gbuf_ranges
        for buckets in by_dtype.values()
        for bucket in buckets
    ]
    return {
        parameter: slice(ranges["param"].start, ranges["param"].end)
        for bucket in buckets
        for parameter, ranges in bucket["param_map"].items()
    }


def _owned(parameter: nn.Parameter, shards: dict[nn.Parameter, slice] | None) -> slice | None:
    """Return the elements of a parameter that this rank counts, of all that hold them."""
    if not param_is_not_tensor_parallel_duplicate(
        parameter,
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        expert_tp_group=parallel_state.get_expert_tensor_parallel_group(),
    ):
        return None
    if shards is not None:
        return shards.get(parameter)
    if getattr(parameter, "allreduce", True):
        replica = parallel_state.get_data_parallel_rank(with_context_parallel=True)
    else:
        replica = parallel_state.get_expert_data_parallel_rank()
    return slice(None) if replica == 0 else None
