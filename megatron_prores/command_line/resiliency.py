"""What needs nvidia-resiliency-ext, and the version that Megatron needs of it."""

from __future__ import annotations

import importlib.util
from typing import Any

from megatron_prores.errors import UserError
from megatron_prores.system.environment import THIS_MACHINE, TargetEnvironment

PACKAGE = "nvidia-resiliency-ext"
LEAST = "0.6.0"
"""``NVRX_MIN_VERSION`` of megatron/core/dist_checkpointing/strategies/nvrx.py in 0.19.2. Megatron
asks for it where it saves asynchronously; the other places import names and say no version."""

_MODULE = "nvidia_resiliency_ext"
_ASKS_FOR_VERSION = f"{_MODULE}.checkpointing.async_ckpt.cached_metadata_filesystem_reader"


def check_start() -> None:
    """Refuse a version that Megatron's own import ends with a traceback, whatever the flags.

    Megatron asserts the version as soon as it finds the modules that it wants. To be called before
    Megatron is imported.

    Raises:
        UserError: Names the version that is installed and the one that is needed.
    """
    found = THIS_MACHINE.version_below(PACKAGE, LEAST)
    if found is None:
        return
    try:
        asks = importlib.util.find_spec(_ASKS_FOR_VERSION) is not None
    except ImportError:
        return  # a version without these modules, which Megatron treats as none at all
    if asks:
        raise UserError(
            f"{PACKAGE} {found} is installed, and Megatron does not start with it: upgrade it to "
            f"{LEAST} or newer, or uninstall it"
        )


def check_resiliency(args: Any, target: TargetEnvironment = THIS_MACHINE) -> None:
    """Refuse flags that need nvidia-resiliency-ext where it is missing or too old.

    Args:
        args: Parsed, not yet validated by Megatron.
        target: The machine of the run.

    Raises:
        UserError: Names the flag, the version that is installed, and the one that is needed.
    """
    for flag, is_given, instead in (
        (
            "--async-strategy nvrx (the default of --async-save)",
            args.async_save and args.async_strategy == "nvrx",
            ", or use --async-strategy mcore",
        ),
        ("--enable-ft-package", args.enable_ft_package, ""),
        ("--fault-injector-ranks", args.fault_injector_ranks is not None, ""),
        ("--fault-injector-num-ranks", args.fault_injector_num_ranks is not None, ""),
    ):
        if not is_given:
            continue
        needs = f"{flag} needs {PACKAGE} {LEAST} or newer"
        if not target.is_installed(_MODULE):
            raise UserError(f"{needs}, which is not installed: install it{instead}")
        if (found := target.version_below(PACKAGE, LEAST)) is not None:
            raise UserError(f"{needs}, and {found} is installed: upgrade it{instead}")
