"""One training run of the study: Megatron's own training loop, with a recipe put into its model.

To be imported when the CPU device is ready, as Megatron is.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core.enums import ModelType
from megatron.training import pretrain
from megatron.training.argument_utils import pretrain_cfg_container_from_args

from megatron_prores.command_line.arguments import parse_args
from megatron_prores.launch.network import set_single_process_env
from megatron_prores.runs.logged import TRAIN_TAG, read_scalars
from megatron_prores.schedule.formulas import SCHEDULES
from megatron_prores.training.gpt import forward_step, train_valid_test_datasets_provider
from megatron_prores.training.prores_run import model_config
from megatron_prores.upstream.datasets import use_prebuilt_dataset_helpers
from megatron_prores.upstream.training_loop import call_around_steps
from studies.fp8.linear import emulate
from studies.fp8.recipes import RECIPES
from studies.fp8.record import COLUMNS, Recorder


def train(
    options: argparse.Namespace, placement: str, schedule: str, seed: int, recipe: str
) -> dict[str, Any]:
    """Train in this process, which must not have trained before.

    Returns:
        What was asked for, the losses by step, and the rows of the gradients.
    """
    # One thread: the order of sums must not depend on the machine.
    torch.set_num_threads(1)
    set_single_process_env()
    use_prebuilt_dataset_helpers()
    with tempfile.TemporaryDirectory() as folder:
        flags = megatron_flags(options, placement, schedule, seed)
        sys.argv = [sys.argv[0], *flags, "--tensorboard-dir", folder]
        args, prores = parse_args("cpu")
        recorder = Recorder(recorded_steps(options, schedule))
        config = model_config(args, prores)
        attach = partial(emulate, recipe=RECIPES[recipe], recorder=recorder)
        config.post_wrap_hooks = [*config.post_wrap_hooks, attach]
        call_around_steps(recorder.begin, lambda iteration: None)
        try:
            pretrain(
                pretrain_cfg_container_from_args(args, config),
                train_valid_test_datasets_provider,
                ModelType.encoder_or_decoder,
                forward_step,
            )
        except SystemExit as end:  # of --exit-interval; the rate's schedule goes on for longer
            if end.code:
                raise RuntimeError(f"Megatron ended with exit code {end.code}") from end
        scalars = read_scalars(Path(folder))
    return {
        "placement": placement,
        "schedule": schedule,
        "recipe": recipe,
        "seed": seed,
        "loss": [round(float(value), 4) for value in scalars[TRAIN_TAG].values],
        "columns": list(COLUMNS),
        "gradients": recorder.rows(),
    }


def recorded_steps(options: argparse.Namespace, schedule: str) -> set[int]:
    """List the steps whose gradients are kept: by default early ones, and the last."""
    steps = set(options.recorded_steps or (0, 1, 2, 3, 4, 5, 8, 16, options.steps - 1))
    if schedule.startswith("stagewise"):
        # A layer opens after the one before it: here too the step before, and two after.
        opening = options.warmup_iters_per_layer
        steps |= {opening, opening + 1, opening + 2, opening + 3}
    return {step for step in steps if step < options.steps}


def megatron_flags(
    options: argparse.Namespace, placement: str, schedule: str, seed: int
) -> list[str]:
    """Return the flags of the main program for a run: model, data, training."""
    flags = f"""
        --device cpu --bf16 --seed {seed} --log-interval 1 --norm-placement {placement}
        --num-layers {options.layers} --num-attention-heads 4
        --hidden-size {options.hidden_size} --ffn-hidden-size {3 * options.hidden_size}
        --seq-length {options.seq_length} --max-position-embeddings {options.seq_length}
        --normalization RMSNorm --swiglu --disable-bias-linear --position-embedding-type rope
        --untie-embeddings-and-output-weights --init-method-std 0.02
        --attention-dropout 0 --hidden-dropout 0 --micro-batch-size {options.micro_batch_size}
        --global-batch-size {2 * options.micro_batch_size}
        --lr 2e-3 --lr-decay-style constant --lr-warmup-iters {options.lr_warmup_iters}
        --weight-decay 0.1 --adam-beta2 0.95 --clip-grad 1.0
        --exit-interval {options.steps} --train-iters {options.steps + options.lr_warmup_iters}
        --eval-iters 0 --eval-interval 1000000 --num-workers 0
    """.split()
    flags += ["--prores-schedule", schedule, "--tokenizer-type", "SentencePieceTokenizer"]
    flags += ["--tokenizer-model", str(options.data_dir / "tokenizer.model")]
    flags += ["--train-data-path", str(options.data_dir / "train_text_document")]
    if schedule in SCHEDULES:
        flags += ["--prores-warmup-iters-per-layer", str(options.warmup_iters_per_layer)]
    return flags
