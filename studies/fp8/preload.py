"""What the fork server of the study imports once, so that each run on the CPU need not."""

from megatron_prores.command_line import device

device.prepare("cpu")

import megatron.training  # noqa: E402, F401
import torch.utils.tensorboard  # noqa: E402, F401

import megatron_prores.training.gpt  # noqa: E402
import megatron_prores.training.prores_run  # noqa: E402, F401
