"""Runs layers whose fused functions are really compiled; prints what was compiled, and when.

A process of its own, without the CPU device: that switches torch.compile off. Megatron's layers can
be built and run on a CPU without it, as long as nothing is drawn from the generators of a GPU.
"""

from __future__ import annotations

import json
import os

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import initialize_rng_tracker
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.spec_utils import build_module
from megatron.training.models.gpt import GPTModelConfig
from torch._dynamo.utils import counters
from torch._inductor import metrics

from megatron_prores.model.layer import ProResTransformerLayer, _scaled_bias_dropout_add
from megatron_prores.model.specs import prores_layer_spec
from tests.distributed.layers import BATCH, HIDDEN, SEQUENCE, causal_mask, transformer_config

CHANGES = 50


def build_layers() -> list[ProResTransformerLayer]:
    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel()
    # Its generators are none, where the usual tracker's are the GPU's.
    initialize_rng_tracker(inference_rng_tracker=True)
    config = transformer_config(
        num_layers=2,
        bias_dropout_fusion=True,
        use_cpu_initialization=True,
        attention_backend=AttnBackend.fused,
    )
    spec = prores_layer_spec(GPTModelConfig(transformer=config, vocab_size=128))
    return [build_module(spec, config=config, layer_number=number) for number in (1, 2)]


def compiled() -> int:
    return int(counters["stats"]["unique_graphs"])


def kernels_of_addition() -> int:
    """Counts the kernels of the scaled bias-dropout-add's forward, compiled alone."""
    torch._dynamo.reset()
    metrics.reset()
    function = torch.compile(_scaled_bias_dropout_add)
    branch, residual = torch.randn(2, SEQUENCE, BATCH, HIDDEN, dtype=torch.bfloat16)
    with torch.no_grad():
        function((branch, None), residual, 0.0, training=True, alpha=torch.tensor(0.5))
    return int(metrics.generated_kernel_count)


def main() -> None:
    layers = build_layers()
    stream = torch.randn(SEQUENCE, BATCH, HIDDEN, requires_grad=True)
    mask = causal_mask()

    def forward() -> torch.Tensor:
        x = stream
        for layer in layers:
            x, _ = layer(x, attention_mask=mask)
        return x

    def step(alpha: float) -> torch.Tensor:
        for layer in layers:
            layer.set_alpha(alpha / layer.layer_number)
            layer.train()
        forward().square().sum().backward()
        for layer in layers:
            layer.eval()
        with torch.no_grad():
            return forward()

    outputs = [step(0.0), step(0.1)]
    before = compiled()
    outputs += [step(0.2 + 0.01 * change) for change in range(CHANGES)]
    result = {
        "compiled": before,
        "compiled again": compiled() - before,
        "distinct outputs": len({float(output.sum()) for output in outputs}),
        "kernels": kernels_of_addition(),
    }
    print("RESULT", json.dumps(result))


if __name__ == "__main__":
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")
    main()
