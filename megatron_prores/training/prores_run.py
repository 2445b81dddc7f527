"""Puts ProRes into a Megatron training run: the model's configuration, and the warmup's hooks."""

from __future__ import annotations

import argparse
import dataclasses
from functools import partial
from textwrap import indent
from typing import Any

from megatron.training import get_args
from megatron.training.utils import print_rank_0

from megatron_prores.config.prores_config import ProResConfig
from megatron_prores.errors import StopRun
from megatron_prores.model import heterogeneous
from megatron_prores.model import initial_weights as init
from megatron_prores.schedule.depth import depths_of
from megatron_prores.training.model import MegatronModelConfig, set_layers, stock_config
from megatron_prores.upstream.optimizer import exclude_embedding_from_weight_decay
from megatron_prores.upstream.registry import undo
from megatron_prores.upstream.training_loop import call_around_steps
from megatron_prores.warmup.audit import AuditError, audit
from megatron_prores.warmup.residual_warmup import ResidualWarmup
from megatron_prores.warmup.scalars import log_alphas


def model_config(args: argparse.Namespace, prores: ProResConfig) -> MegatronModelConfig:
    """Build the model's configuration from Megatron's arguments, and install what ProRes needs.

    What an earlier call has installed for another configuration is taken back.

    Args:
        args: Megatron's validated arguments.
        prores: With the schedule ``none`` and Megatron's own norm placement no class of ours gets
            into the model. Initial weights and weight decay do not depend on the schedule: runs
            that differ in the schedule differ in nothing else.

    Returns:
        The configuration for ``megatron.training.pretrain``.

    Raises:
        UserError: The model cannot be built.
    """
    args.embedding_init_method_std = init.embedding_std(args)
    config = stock_config(args)
    if args.use_mup:
        # The user has said how weights start with a flag of Megatron's own.
        prores = dataclasses.replace(prores, branch_init="scaled")
    encoded = args.heterogeneous_layers_config_encoded_json
    heterogeneous.check(config.transformer, prores, encoded)
    init.configure(config.transformer, prores)
    config.pre_wrap_hooks = [*config.pre_wrap_hooks, partial(_finish_init, prores)]
    # A tied embedding is the output head as well, which decays.
    if args.untie_embeddings_and_output_weights and not prores.embedding_weight_decay:
        exclude_embedding_from_weight_decay()
    else:
        undo(exclude_embedding_from_weight_decay)
    set_layers(config, prores, args.reset_attention_mask)
    if prores.enabled:
        run = ProResRun(prores, depths_of(args)[-1])
        config.post_wrap_hooks = [*config.post_wrap_hooks, run.attach]
        call_around_steps(run.before_forward, run.after_logging)
    else:
        undo(ProResRun.before_forward)
    return config


def _finish_init(prores: ProResConfig, model_chunks: list[Any]) -> list[Any]:
    init.mark_shards(model_chunks)
    init.finish(model_chunks, prores)
    return model_chunks


class ProResRun:
    """The state that a run's hooks share: the warmup of this rank, audited once."""

    def __init__(self, config: ProResConfig, num_layers: int) -> None:
        """Take the schedule and L, the layers of the whole model."""
        self.config = config
        self.num_layers = num_layers
        self.warmup: ResidualWarmup | None = None
        self.audited = False

    def attach(self, model_chunks: list[Any]) -> list[Any]:
        """Take hold of the layers of this rank, once Megatron has built its model chunks."""
        self.warmup = ResidualWarmup(self.config, self.num_layers, model_chunks)
        return model_chunks

    def progress(self, iteration: int) -> int:
        """Return t, the step of the schedule: completed iterations, or the samples they consumed.

        Both are counters that a checkpoint restores; Megatron moves on the second between the
        forward passes of a step and the evaluation after it, as the first.
        """
        if self.config.unit == "samples":
            return int(get_args().consumed_train_samples)
        return iteration

    def before_forward(self, iteration: int) -> None:
        """Set alpha before the forward passes of a training step or an evaluation.

        Args:
            iteration: Iterations completed.
        """
        assert self.warmup is not None, "the model was not built through the configuration"
        step = self.progress(iteration)
        self.warmup.set_step(step)
        if not self.audited:
            try:
                layer_map = audit(self.warmup, step)
            except AuditError as error:
                raise StopRun(str(error)) from error
            unit, total = self.config.unit, self.config.total_warmup(self.num_layers)
            summary = (
                f"schedule {self.config.schedule}, warmup of {total} {unit} over "
                f"{self.num_layers} layers, after {step} {unit}"
            )
            print_rank_0(indent(f"{summary}\n{layer_map}", "> ProRes: "))
            # The curves of alpha begin where the run does.
            log_alphas(self.warmup.alphas(step), iteration)
            if any(self.config.opening_steps(self.num_layers)):
                self._compile_what_opens()
            self.audited = True

    def _compile_what_opens(self) -> None:
        """Compile, before the first step, what layers take that open in the middle of the run."""
        args = get_args()
        parts = args.context_parallel_size
        if args.sequence_parallel:
            parts *= args.tensor_model_parallel_size
        shape = (args.seq_length // parts, args.micro_batch_size, args.hidden_size)
        assert self.warmup is not None
        for layer in [layer for layers in self.warmup.chunks for layer in layers][:1]:
            layer.compile_stock_addition(shape)

    def after_logging(self, iteration: int) -> None:
        """Log alpha beside Megatron's own scalars, at the log interval."""
        if iteration % get_args().log_interval == 0:
            step = self.progress(iteration)
            log_alphas(self.config.alphas(step, self.num_layers), iteration)
