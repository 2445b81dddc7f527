"""A program on megatron.training.pretrain with its own model provider, as a stranger could have it.

With ProRes from its public names. It trains on the CPU device, on which tests/distributed/launch.py
starts the ranks, as there is no GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig, MockGPTDataset
from megatron.core.enums import ModelType
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.training import get_args, get_tokenizer, pretrain
from megatron.training.argument_utils import (
    core_transformer_config_from_args,
    pretrain_cfg_container_from_args,
)
from megatron.training.arguments import parse_and_validate_args
from megatron.training.global_vars import get_tensorboard_writer
from torch import Tensor

import megatron_prores as prores

config = prores.ProResConfig(schedule="linear", warmup_iters=48)
chunks: list[GPTModel] = []
warmup: Any = None


def model_provider(
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    config: Any = None,
    pg_collection: Any = None,
) -> GPTModel:
    args = get_args()
    spec = get_gpt_layer_local_spec(normalization=args.normalization)
    transformer_config = core_transformer_config_from_args(args)
    transformer_config.output_layer_init_method = transformer_config.init_method
    model = GPTModel(
        config=transformer_config,
        transformer_layer_spec=prores.with_prores(spec, norm_placement="sandwich"),
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        position_embedding_type=args.position_embedding_type,
        rotary_percent=args.rotary_percent,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        vp_stage=vp_stage,
        pg_collection=pg_collection,
    )
    chunks.append(model)
    return model


def datasets_provider(samples: list[int], vp_stage: int | None = None) -> tuple[Any, ...]:
    global warmup
    args = get_args()
    if warmup is None:
        # Megatron asks for the data when the model is built and loaded, on all ranks.
        warmup = prores.ResidualWarmup(config, args.num_layers, chunks)
        warmup.set_step(args.iteration)
        prores.audit(warmup, args.iteration)
    dataset_config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        split=args.split,
        tokenizer=get_tokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    builder = BlendedMegatronDatasetBuilder(MockGPTDataset, samples, lambda: True, dataset_config)
    return tuple(builder.build())


datasets_provider.is_distributed = True  # type: ignore[attr-defined]


def loss_func(output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    loss = output.float().sum()
    tokens = torch.tensor(output.numel(), dtype=torch.int, device=output.device)
    return loss, tokens, {"lm loss": torch.stack([loss.detach(), tokens.float()])}


def forward_step(data: Iterator[dict[str, Tensor]], model: Any) -> tuple[Tensor, Any]:
    # During a step Megatron has the iterations completed before it here, after it one less.
    warmup.set_step(get_args().curr_iteration + (0 if model.training else 1))
    batch = {name: value.cuda() for name, value in next(data).items()}
    output = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
    return output, loss_func


if __name__ == "__main__":
    arguments = parse_and_validate_args()
    arguments.prores = config.settings(arguments.num_layers)  # into the checkpoints
    pretrain(
        pretrain_cfg_container_from_args(arguments),
        datasets_provider,
        ModelType.encoder_or_decoder,
        forward_step,
        model_provider,
    )
    if writer := get_tensorboard_writer():
        writer.close()  # Megatron leaves the evaluation after training to a thread of the writer
