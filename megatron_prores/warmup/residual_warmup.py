"""The warmup: sets alpha on the layers of this rank as training advances."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from megatron_prores.config.prores_config import ProResConfig
from megatron_prores.model.hybrid_stack import hybrid_depths
from megatron_prores.model.layer import ProResLayerMixin
from megatron_prores.schedule.depth import Depths
from megatron_prores.schedule.formulas import Alphas


class ResidualWarmup:
    """Drives alpha(l, t) of every ProRes layer in the model chunks of this rank.

    Alpha is a function of the schedule and of the step alone. Every rank computes it for itself,
    and nothing is stored: a run resumed at step N goes on exactly as one that was never stopped.
    """

    def __init__(
        self, config: ProResConfig, num_layers: int, model_chunks: Iterable[nn.Module]
    ) -> None:
        """Find the layers to drive.

        Args:
            config: The schedule and its length.
            num_layers: L, the layers of the whole model; of a hybrid model those of the schedule:
                ``pattern_depths(pattern)[-1]``.
            model_chunks: The model chunks of this rank, wrapped or not, one per virtual stage.

        Raises:
            ArgumentError: A schedule of the user's own cannot be read, or is for another number of
                layers.
        """
        config.check_layers(num_layers)
        self.config = config
        self.num_layers = num_layers
        self.depths: Depths | None = None
        """l of every layer of a hybrid model; None where the layers are the L."""
        self.chunks: list[list[ProResLayerMixin]] = []
        for chunk in model_chunks:
            self.depths = hybrid_depths(chunk) or self.depths
            layers: list[ProResLayerMixin] = [
                module
                for module in chunk.modules()
                if isinstance(module, ProResLayerMixin) and module.prores_layer is not None
            ]
            device = _device_of(chunk)
            for layer in layers:
                # A model that was built on the meta device is materialized module by module, but
                # only those that own parameters: alpha is left behind.
                layer.place_alpha(device)
            self.chunks.append(layers)

    def set_step(self, step: int) -> None:
        """Set alpha(l, step) on every layer of this rank.

        Must be called before the forward passes of a step, on all ranks alike.

        Args:
            step: t, the iterations completed (or their samples, as the schedule counts). The first
                training step runs with 0, an evaluation after N iterations with N.
        """
        values = self.alphas(step)
        for layers in self.chunks:
            for layer in layers:
                # Out of range only where the layer numbers are wrong, which the audit reports.
                if layer.prores_layer is not None and layer.prores_layer <= self.num_layers:
                    layer.set_alpha(float(values[layer.prores_layer - 1]))

    def alphas(self, step: int) -> Alphas:
        """Evaluate the schedule for all L layers, also those of other ranks: float64 [L]."""
        return self.config.alphas(step, self.num_layers)


def _device_of(chunk: nn.Module) -> torch.device:
    """Return the device of a model chunk; the CPU for one that has no storage, as in a plan."""
    stored = (each.device for each in chunk.parameters() if each.device.type != "meta")
    return next(stored, torch.device("cpu"))
