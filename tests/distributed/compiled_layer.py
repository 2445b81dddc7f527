"""Runs layers whose fused functions are really compiled; prints what was compiled, and when.

A process of its own, without the CPU device: that switches torch.compile off. Megatron's layers can
be built and run on a CPU without it, as long as nothing is drawn from the generators of a GPU.
"""

from __future__ import annotations

import json
import os

import torch
from megatron.core import parallel_state
from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from megatron.core.tensor_parallel.random import initialize_rng_tracker
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.spec_utils import build_module
from megatron.training.models.gpt import GPTModelConfig
from torch._dynamo.utils import counters
from torch._inductor import metrics

from megatron_prores.model.layer import ProResTransformerLayer, _scaled_bias_dropout_add
from megatron_prores.model.specs import prores_layer_spec
from studies.benchmark.measure import peak_memory
from tests.distributed.layers import BATCH, HIDDEN, SEQUENCE, causal_mask, transformer_config

CHANGES = 50
LOSSES = ((torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True))
"""Data type of the model, and whether ``--cross-entropy-loss-fusion`` is given."""


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


def bytes_of_the_loss(dtype: torch.dtype, fused: bool) -> float:
    """Counts what the loss allocates at its fullest, per token and entry of the vocabulary."""
    vocabulary = 4096
    # The gradient of so few weights hardly counts.
    weight = torch.randn(vocabulary, 1, dtype=dtype, requires_grad=True)
    stream = torch.randn(SEQUENCE, BATCH, 1, dtype=dtype)
    labels = torch.randint(vocabulary, (SEQUENCE, BATCH))

    def loss() -> torch.Tensor:
        logits = torch.nn.functional.linear(stream, weight)
        if fused:
            group = parallel_state.get_tensor_model_parallel_group()
            return fused_vocab_parallel_cross_entropy(logits, labels, group)
        return vocab_parallel_cross_entropy(logits, labels)

    loss().sum().backward()  # compiles, and allocates the gradient
    with peak_memory("cpu") as peak:
        loss().sum().backward()
    return peak() / (SEQUENCE * BATCH * vocabulary)


def main() -> None:
    layers = build_layers()
    stream = torch.randn(SEQUENCE, BATCH, HIDDEN, requires_grad=True)
    mask = causal_mask()

    def forward(x: torch.Tensor) -> torch.Tensor:
        for layer in layers:
            x, _ = layer(x, attention_mask=mask)
        return x

    def step(alpha: float) -> torch.Tensor:
        for layer in layers:
            layer.set_alpha(alpha / layer.layer_number)
            layer.train()
        forward(stream).square().sum().backward()
        for layer in layers:
            layer.eval()
        with torch.no_grad():
            return forward(stream.detach())

    outputs = [step(0.0), step(0.1)]
    before = compiled()
    outputs += [step(0.2 + 0.01 * change) for change in range(CHANGES)]
    again = compiled() - before
    layers[0].compile_stock_addition((SEQUENCE, BATCH, HIDDEN))
    warmed_up = compiled() - before - again
    step(1.0)  # opens the first layer; the second is at 1/2
    result = {
        "compiled": before,
        "compiled again": again,
        "compiled by the warm-up": warmed_up,
        "compiled when a layer opens": compiled() - before - again - warmed_up,
        "distinct outputs": len({float(output.sum()) for output in outputs}),
        "kernels": kernels_of_addition(),
        "bytes of the loss": [bytes_of_the_loss(*kind) for kind in LOSSES],
    }
    print("RESULT", json.dumps(result))


if __name__ == "__main__":
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")
    main()
