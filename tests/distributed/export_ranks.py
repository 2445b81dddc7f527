"""What the export tests run in each rank: models saved by Megatron, and the logits it computes."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class Model:
    """A model to save."""

    name: str
    flags: tuple[str, ...]
    steps: tuple[int, ...]
    """Iterations after which it is saved."""
    load: str = ""
    """A checkpoint directory to load the weights from, instead of drawing them."""


def _forward_step(tokens: torch.Tensor, data_iterator: Any, model: Any) -> tuple[Any, None]:
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    return model(tokens, positions, None), None


def _randomize_norms(chunks: list[Any]) -> None:
    """Moves norms and biases away from 1 and 0, the same way on every layout."""
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            if "norm" in name:
                wave = torch.cos(torch.arange(parameter.numel()) + len(name.split(".")[-1]))
                parameter.data.add_(0.3 * wave.to(parameter))
            elif name.endswith(".bias"):
                parameter.data.add_(0.1)


def compute(chunks: list[Any], args: Any, tokens: torch.Tensor) -> torch.Tensor | None:
    """Computes the logits [b, s, vocabulary], on the ranks of the last stage."""
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.pipeline_parallel import get_forward_backward_func

    for chunk in chunks:
        chunk.eval()
    with torch.no_grad():
        outputs = get_forward_backward_func()(
            forward_step_func=partial(_forward_step, tokens),
            data_iterator=None,
            model=chunks,
            num_microbatches=1,
            seq_length=tokens.shape[1],
            micro_batch_size=tokens.shape[0],
            forward_only=True,
            collect_non_loss_data=False,
        )
    if not parallel_state.is_pipeline_last_stage():
        return None
    whole: torch.Tensor = tensor_parallel.gather_from_tensor_model_parallel_region(outputs[0])
    return whole


def save_models(models: Sequence[Model], directory: str, tokens: list[list[int]]) -> None:
    """Saves each model at each of its steps under ``directory/name``, with its logits."""
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training import checkpointing, global_vars, initialize_megatron

    from megatron_prores.checkpoint import guard
    from megatron_prores.command_line.arguments import parse_args, read_prores_flags
    from megatron_prores.training.prores_run import model_config
    from megatron_prores.upstream.async_writer import end_writers_with_training
    from megatron_prores.upstream.datasets import use_prebuilt_dataset_helpers
    from megatron_prores.warmup.residual_warmup import ResidualWarmup

    use_prebuilt_dataset_helpers()
    guard.install()
    end_writers_with_training()
    for number, model in enumerate(models):
        root = Path(directory, model.name)
        global_vars.unset_global_variables()
        place = ("--load", model.load) if model.load else ("--save", str(root))
        sys.argv = ["pretrain_gpt_prores.py", *model.flags, *place]
        _, device = read_prores_flags(sys.argv[1:])
        args, prores = parse_args(device)
        if number == 0:
            initialize_megatron()
        else:
            from megatron.core import tensor_parallel

            tensor_parallel.model_parallel_cuda_manual_seed(args.seed)
        config = model_config(args, prores)
        chunks = config.get_builder_cls()(config).build_distributed_models(
            ProcessGroupCollection.use_mpu_process_groups(), wrap_with_ddp=False
        )
        if model.load:
            checkpointing.load_checkpoint(chunks, None, None)
        else:
            _randomize_norms(chunks)
        for step in model.steps:
            if prores.enabled:
                ResidualWarmup(prores, args.num_layers, chunks).set_step(step)
            logits = compute(chunks, args, torch.tensor(tokens))
            args.consumed_train_samples = step * args.global_batch_size
            if not model.load:
                checkpointing.save_checkpoint(step, chunks, None, None, 0)
            if logits is not None and parallel_state.get_tensor_model_parallel_rank() == 0:
                values = logits.float().numpy()
                Path(directory, model.name).mkdir(exist_ok=True)
                np.save(Path(directory, model.name, f"logits{step}.npy"), values)
