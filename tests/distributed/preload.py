"""What the fork server imports once, so that each rank need not."""

import argparse
import atexit
import gc

from megatron_prores.command_line import device

device.prepare("cpu")

import megatron.core.models.mimo  # noqa: E402
import megatron.core.tokenizers.text.libraries  # noqa: E402
import megatron.training.training  # noqa: E402, F401
import tensorboard.summary.writer.event_file_writer  # noqa: E402, F401
import torch.utils.tensorboard  # noqa: E402, F401
from megatron.training.arguments import add_megatron_arguments  # noqa: E402

import megatron_prores.checkpoint.guard  # noqa: E402
import megatron_prores.command_line.advice  # noqa: E402
import megatron_prores.command_line.arguments  # noqa: E402
import megatron_prores.command_line.cpu  # noqa: E402
import megatron_prores.command_line.paths  # noqa: E402
import megatron_prores.command_line.setup_checks  # noqa: E402
import megatron_prores.training.gpt  # noqa: E402
import megatron_prores.training.lifecycle  # noqa: E402
import megatron_prores.training.prores_run  # noqa: E402, F401
from megatron_prores.upstream.start_up import read_flag_help_once  # noqa: E402

read_flag_help_once()
add_megatron_arguments(argparse.ArgumentParser())

# What is here stays: a rank's collector need not walk through it, nor copy its pages to do so.
gc.collect()
gc.freeze()
atexit.register(gc.unfreeze)
