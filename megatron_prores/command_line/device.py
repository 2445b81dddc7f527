"""Chooses the device before Megatron is imported."""

from __future__ import annotations

from megatron_prores.command_line.resiliency import check_start
from megatron_prores.errors import UserError
from megatron_prores.upstream.start_up import import_on_demand


def prepare(device: str) -> None:
    """Make the device ready, or end the run: the CPU is chosen by the user, never silently.

    Args:
        device: "cuda" or "cpu".

    Raises:
        UserError: There is no GPU and the user did not ask for the CPU; or Megatron could not be
            imported.
    """
    check_start()
    import_on_demand("wandb")  # Megatron imports it whether or not a run logs there
    if device == "cpu":
        from megatron_prores.cpu import gpu_packages, torch_device

        gpu_packages.hide()
        torch_device.install()
        from megatron_prores.cpu import megatron_device

        megatron_device.install()
        return
    import torch

    if not torch.cuda.is_available():
        raise UserError(
            "no CUDA GPU was found on this machine: give --device cpu to train on the CPU "
            "(slow: for small models and tests)"
        )
