"""What the fork server of the study imports once, so that each run on the CPU need not."""

from megatron_prores import device

device.prepare("cpu")

import megatron.training  # noqa: E402, F401
import torch.utils.tensorboard  # noqa: E402, F401

import megatron_prores.fp8_study.linear  # noqa: E402
import megatron_prores.gpt  # noqa: E402
import megatron_prores.training  # noqa: E402, F401
