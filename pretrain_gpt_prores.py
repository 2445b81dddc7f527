#!/usr/bin/env python3
"""Pretrains a GPT model with Progressive Residual Warmup (ProRes, arXiv 2603.05369).

Takes every flag of Megatron-LM's pretrain_gpt.py and the group "ProRes":

    torchrun --nproc-per-node 8 pretrain_gpt_prores.py --prores-schedule linear \
        --prores-warmup-iters-per-layer 1000 <Megatron's flags>
"""

import atexit
import gc
import os
import sys
import time

PROGRAM_START = time.time()

from megatron_prores.command_line import device  # noqa: E402
from megatron_prores.command_line.arguments import parse_args, read_prores_flags  # noqa: E402
from megatron_prores.config.flags import told_in_flags  # noqa: E402
from megatron_prores.errors import run_program  # noqa: E402
from megatron_prores.system.environment import check_environment, raise_open_files  # noqa: E402
from megatron_prores.system.processes import end_with_launcher  # noqa: E402


@told_in_flags()
def main() -> None:
    """Parse, build, and hand over to Megatron's own training program."""
    check_environment(os.environ)
    end_with_launcher()
    raise_open_files()
    _, device_name = read_prores_flags(sys.argv[1:])
    device.prepare(device_name)

    # Megatron may only be imported now that the device is known.
    from megatron.core.enums import ModelType
    from megatron.training import pretrain, set_startup_timestamps
    from megatron.training.argument_utils import pretrain_cfg_container_from_args

    from megatron_prores.checkpoint import guard
    from megatron_prores.command_line.advice import advice
    from megatron_prores.measure.install import install as install_measurements
    from megatron_prores.training import lifecycle
    from megatron_prores.training.gpt import (
        embedding_ranks,
        forward_step,
        train_valid_test_datasets_provider,
    )
    from megatron_prores.training.prores_run import model_config
    from megatron_prores.upstream import datasets, optimizer, start_up, training_loop
    from megatron_prores.warmup.scalars import close_tensorboard

    # What was imported stays: a collection, as of --manual-gc, need not walk through it. At the end
    # it must, else Triton's bindings tell of leaks.
    gc.freeze()
    atexit.register(gc.unfreeze)
    set_startup_timestamps(program_start=PROGRAM_START, main_entry=time.time())
    start_up.read_flag_help_once()
    datasets.fork_data_workers()
    datasets.use_prebuilt_dataset_helpers()
    datasets.read_indices_as_numbers()
    optimizer.let_torch_adam_resume()
    optimizer.let_sgd_resume()
    optimizer.align_saved_optimizer_state()
    training_loop.end_interval_with_first_line()
    guard.install()
    args, prores = parse_args(device_name)
    if args.rank == 0:
        for line in advice(args, prores, argv=sys.argv[1:]):
            print(f"warning: {line}")
    config = pretrain_cfg_container_from_args(args, model_config(args, prores))
    install_measurements(args)
    with lifecycle.installed(args):
        pretrain(
            config,
            train_valid_test_datasets_provider,
            ModelType.encoder_or_decoder,
            forward_step,
            get_embedding_ranks=embedding_ranks,
        )
    close_tensorboard()


if __name__ == "__main__":
    run_program(main)
