"""A training program on megatron-core alone, as a stranger could have written it, with ProRes.

Its training loop is the Python of README.md's section "Add ProRes to an existing Megatron program",
run as it stands there; what that calls is below. Nothing else here is of this project but the CPU
device: tests/distributed/launch.py starts the ranks on it, as there is no GPU.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig, MockGPTDataset
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tokenizers.text.libraries import NullTokenizer
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import init_method_normal
from torch.utils.tensorboard import SummaryWriter

README = Path(__file__).resolve().parents[2] / "README.md"
SECTION = r"## Add ProRes to an existing Megatron program\n.*?```python\n(.*?)```"

MICRO_BATCH, MICRO_BATCHES, SEQUENCE, VOCABULARY, HIDDEN = 2, 4, 64, 256, 64
BATCH = MICRO_BATCH * MICRO_BATCHES

transformer_config = TransformerConfig(
    num_layers=4,
    hidden_size=HIDDEN,
    ffn_hidden_size=128,
    num_attention_heads=4,
    normalization="RMSNorm",
    gated_linear_unit=True,
    activation_func=F.silu,
    add_bias_linear=False,
    hidden_dropout=0.0,
    attention_dropout=0.0,
    # The paper's initial weights: one standard deviation, and a larger one for the embedding.
    init_method_std=0.02,
    output_layer_init_method=init_method_normal(0.02),
    embedding_init_method_std=0.02 * HIDDEN**0.5,
    tensor_model_parallel_size=2,
    pipeline_model_parallel_size=2,
    pipeline_dtype=torch.float32,
    finalize_model_grads_func=finalize_model_grads,
)


def build_model(spec: Any) -> tuple[list[Any], Any]:
    model = GPTModel(
        config=transformer_config,
        transformer_layer_spec=spec,
        vocab_size=VOCABULARY,
        max_sequence_length=SEQUENCE,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
    )
    ddp_config = DistributedDataParallelConfig()
    chunk = DistributedDataParallel(transformer_config, ddp_config, model.cuda())
    chunk.train()
    optimizer = get_megatron_optimizer(
        OptimizerConfig(optimizer="adam", lr=2e-3, weight_decay=0.0), [chunk]
    )
    transformer_config.grad_scale_func = optimizer.scale_loss
    return [chunk], optimizer


def build_datasets() -> list[Any]:
    dataset_config = GPTDatasetConfig(
        random_seed=1234,
        sequence_length=SEQUENCE,
        split="969,30,1",
        tokenizer=NullTokenizer(127),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    return BlendedMegatronDatasetBuilder(
        MockGPTDataset, args.samples, lambda: True, dataset_config
    ).build()


def micro_batches(dataset: Any, first: int) -> Iterator[dict[str, torch.Tensor]]:
    for start in range(first, first + BATCH, MICRO_BATCH):
        samples = [dataset[index] for index in range(start, start + MICRO_BATCH)]
        keys = ("tokens", "labels", "position_ids")
        yield {key: torch.stack([sample[key] for sample in samples]).cuda() for key in keys}


def forward_step(batches: Iterator[dict[str, torch.Tensor]], model: Any) -> tuple[Any, Any]:
    batch = next(batches)
    output = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])

    def loss(losses: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return losses.mean(), {"loss": losses.mean().detach()}

    return output, loss


def run_forward(chunks: list[Any], dataset: Any, first: int, **more: Any) -> float | None:
    """Gives the mean loss of a batch, on the last pipeline stage."""
    losses = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=micro_batches(dataset, first),
        model=chunks,
        num_microbatches=MICRO_BATCHES,
        seq_length=SEQUENCE,
        micro_batch_size=MICRO_BATCH,
        **more,
    )
    return sum(each["loss"].item() for each in losses) / MICRO_BATCHES if losses else None


def log(name: str, loss: float | None, iteration: int) -> None:
    if writer is not None and loss is not None:
        writer.add_scalar(name, loss, iteration)
        writer.flush()


def train_step(chunks: list[Any], optimizer: Any, iteration: int) -> None:
    for chunk in chunks:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    loss = run_forward(chunks, training_data, iteration * BATCH, forward_only=False)
    optimizer.step()
    log("lm loss", loss, iteration + 1)


def evaluate(chunks: list[Any], iteration: int) -> None:
    first = (iteration // eval_interval - 1) * BATCH
    for chunk in chunks:
        chunk.eval()
    with torch.no_grad():
        loss = run_forward(chunks, validation_data, first, forward_only=True)
    for chunk in chunks:
        chunk.train()
    log("lm loss validation", loss, iteration)


def sharded_state(chunks: list[Any], optimizer: Any, is_loading: bool) -> dict[str, Any]:
    (chunk,) = chunks
    model = chunk.module.sharded_state_dict()
    return {"model": model, "optimizer": optimizer.sharded_state_dict(model, is_loading)}


def save_checkpoint(chunks: list[Any], optimizer: Any, state: dict[str, Any]) -> None:
    if args.save is not None:
        Path(args.save).mkdir(exist_ok=True)
        torch.distributed.barrier()
        dist_checkpointing.save({**sharded_state(chunks, optimizer, False), **state}, args.save)


def load_checkpoint(chunks: list[Any], optimizer: Any) -> dict[str, Any] | None:
    if args.load is None:
        return None
    state = dist_checkpointing.load(sharded_state(chunks, optimizer, True), args.load)
    chunks[0].module.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state


# Megatron starts a new Python when it saves, which reads this file once more.
if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--warmup-iters", type=int, required=True)
    parser.add_argument("--last-iteration", type=int, required=True)
    parser.add_argument("--samples", type=int, nargs=3, required=True)
    parser.add_argument("--save")
    parser.add_argument("--load")
    parser.add_argument("--tensorboard-dir")
    args = parser.parse_args()

    torch.distributed.init_process_group()
    parallel_state.initialize_model_parallel(2, 2)
    stage = parallel_state.get_pipeline_model_parallel_rank()
    torch.manual_seed(1234 + 100 * stage)
    tensor_parallel.model_parallel_cuda_manual_seed(1234 + 100 * stage)

    writer = SummaryWriter(args.tensorboard_dir) if torch.distributed.get_rank() == 3 else None
    training_data, validation_data, _ = build_datasets()

    num_layers = transformer_config.num_layers
    layer_spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    warmup_iters, last_iteration, eval_interval = args.warmup_iters, args.last_iteration, 4

    text = README.read_text()
    lines = re.search(SECTION, text, re.DOTALL)
    assert lines is not None, "README.md does not say how ProRes gets into a program"
    above = "\n" * text.count("\n", 0, lines.start(1))  # for the line numbers of a traceback
    exec(compile(above + lines[1], str(README), "exec"))
