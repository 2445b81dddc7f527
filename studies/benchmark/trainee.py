"""A model that trains: built by Megatron's builders, stepped by Megatron's own ``train_step``.

Nothing of a step is left out but what Megatron's loop does around it: reading data from disk,
logging, evaluating, saving. One rank, so no communication either.

Imports Megatron: only after ``device.prepare``.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import time
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.enums import ModelType
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.rerun_state_machine import RerunDataIterator
from megatron.core.transformer.enums import AttnBackend
from megatron.core.utils import get_model_config
from megatron.training import get_args, get_timers, training
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.initialize import initialize_megatron, set_jit_fusion_options

from megatron_prores.command_line.arguments import parse_args
from megatron_prores.config.prores_config import OFF, ProResConfig
from megatron_prores.launch.network import set_single_process_env
from megatron_prores.measure.layer_norms import LayerNormsLog
from megatron_prores.model import initial_weights
from megatron_prores.model.specs import prores_layer_spec
from megatron_prores.training.gpt import Batch, forward_step
from megatron_prores.upstream.datasets import use_prebuilt_dataset_helpers
from megatron_prores.warmup.residual_warmup import ResidualWarmup
from studies.benchmark.cases import Side

WARMUP_ITERS_PER_LAYER = 1000
"""T of the paper. The steps during warmup are taken from T / 2 on, where no layer is open yet."""

BATCHES = 4


def start_megatron(device: str, flags: list[str]) -> argparse.Namespace:
    """Parse Megatron's flags and start its only rank.

    Args:
        device: "cuda" or "cpu", made ready by ``device.prepare`` already.
        flags: The command line of a training run.

    Raises:
        UserError: Megatron refuses the flags.
    """
    set_single_process_env()
    use_prebuilt_dataset_helpers()
    sys.argv = [sys.argv[0], *flags]
    parse_args(device)
    initialize_megatron()
    args = get_args()
    set_jit_fusion_options(tp_size=args.tensor_model_parallel_size)
    return args


def synthetic_batches(args: argparse.Namespace) -> list[Batch]:
    """Make micro-batches as Megatron's data loader returns them, on the device already.

    Tokens are as frequent as words are in a text (Zipf's law): the gradient of the embedding meets
    the same row many times, as in training.
    """
    samples, length = args.micro_batch_size, args.seq_length
    generator = torch.Generator(device="cpu").manual_seed(args.seed)
    causal = torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)
    batches: list[Batch] = []
    for _ in range(BATCHES):
        uniform = torch.rand(samples, length + 1, generator=generator)
        tokens = ((args.padded_vocab_size**uniform).long() - 1).clamp(min=0)
        batch = {
            "tokens": tokens[:, :-1].contiguous(),
            "labels": tokens[:, 1:].contiguous(),
            "loss_mask": torch.ones(samples, length),
            "position_ids": torch.arange(length).expand(samples, -1).contiguous(),
        }
        if args.create_attention_mask_in_dataloader:
            batch["attention_mask"] = causal.expand(samples, -1, -1, -1).contiguous()
        batches.append({name: value.cuda() for name, value in batch.items()})
    return batches


class Trainee:
    """One model with its optimizer, ready for training steps."""

    def __init__(self, side: Side, norm_placement: str, attention: str, fp8: str | None) -> None:
        """Build the model, its data-parallel wrapper and its optimizer from Megatron's flags.

        Args:
            side: Whose model it is.
            norm_placement: One of ``placement.PLACEMENTS``.
            attention: Megatron's ``--attention-backend``.
            fp8: Megatron's ``--fp8-format``, whatever its flags say; None for no FP8.
        """
        args = get_args()
        args.fp8 = fp8  # the model's configuration is made from it below
        prores = ProResConfig(
            schedule=side.schedule or OFF,
            warmup_iters_per_layer=WARMUP_ITERS_PER_LAYER,
            norm_placement=norm_placement,
        )
        # Upstream writes its choice of attention here, and stops if it finds another one.
        for name in ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN"):
            os.environ.pop(name, None)
        config = gpt_config_from_args(args)
        config.transformer.attention_backend = AttnBackend[attention]
        initial_weights.configure(config.transformer, prores)
        config.pre_wrap_hooks = [*config.pre_wrap_hooks, partial(_finish_weights, prores)]
        if side.schedule is not None:
            config.transformer_layer_spec = partial(
                prores_layer_spec,
                norm_placement=norm_placement,
                document_masks=args.reset_attention_mask,
            )
        self.model, self.optimizer, self.scheduler = training.setup_model_and_optimizer(
            ModelType.encoder_or_decoder,
            cfg_container=pretrain_cfg_container_from_args(args, config),
            pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
        )
        self.config = get_model_config(self.model[0])
        # As Megatron's train() does before its loop.
        for chunk in self.model:
            chunk.train()
        self.config.grad_scale_func = self.optimizer.scale_loss
        self.config.timers = get_timers()
        self.config.finalize_model_grads_func = finalize_model_grads
        self.forward_backward = get_forward_backward_func()
        self.data = RerunDataIterator(itertools.cycle(synthetic_batches(args)))
        self.warmup = ResidualWarmup(prores, args.num_layers, self.model)
        self.steps = 0

    def copy_weights(self, other: Trainee) -> None:
        """Copy the weights of another model of the same placement, FP8 or not."""
        theirs = dict(other.model[0].named_parameters())
        with torch.no_grad():
            # Parameter by parameter: a state dict has Transformer Engine's FP8 scales in it too.
            for name, parameter in self.model[0].named_parameters():
                parameter.copy_(theirs.pop(name))
        if theirs:
            raise RuntimeError(f"the models differ: only one of them has {', '.join(theirs)}")
        self.optimizer.reload_model_params()

    def alphas(self) -> list[float]:
        """Return what the layers multiply their branches by; nothing for Megatron's own layers."""
        return [layer.alpha.item() for chunk in self.warmup.chunks for layer in chunk]

    def train(self, steps: int, opened: bool, measured: bool = False) -> tuple[float, float]:
        """Train for some steps in a row, and wait for the device once, after the last one.

        Args:
            steps: How many.
            opened: Whether the warmup is over, rather than under way.
            measured: Whether each step measures its layers.

        Returns:
            Seconds per step, and the last loss.
        """
        # If the steps before had other alphas, that is not the cost of these.
        self._set_alpha(opened)
        norms = LayerNormsLog(1, get_args().num_layers, get_args().hidden_size)
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(steps):
            self._set_alpha(opened)
            step = partial(
                training.train_step,
                forward_step,
                self.data,
                self.model,
                self.optimizer,
                self.scheduler,
                self.config,
                self.forward_backward,
                iteration=self.steps,
            )
            self.steps += 1
            losses: Any
            if measured:
                losses = norms.around_step(step, self.steps, self.model, self.optimizer)[0]
            else:
                losses = step()[0]
        torch.cuda.synchronize()
        return (time.perf_counter() - start) / steps, float(losses["lm loss"])

    def _set_alpha(self, opened: bool) -> None:
        half = WARMUP_ITERS_PER_LAYER // 2
        after = WARMUP_ITERS_PER_LAYER * get_args().num_layers if opened else 0
        if self.warmup.config.enabled:
            self.warmup.set_step(after + half + self.steps % half)


def _finish_weights(prores: ProResConfig, model_chunks: list[Any]) -> list[Any]:
    initial_weights.finish(model_chunks, prores)
    return model_chunks
